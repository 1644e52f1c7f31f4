"""What a training step holds in memory, term by term, from the shape of a model: nothing is allocated.

On a CPU the most that the process holds is this, the Python process with TensorFlow (0.6 GB), and the traced graph
(20 MB a block). The terms were read from the graph of a step and from the blocks that were allocated at its peak.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

import keras
import tensorflow as tf

from lmzoo.config import ActivationBytes, ModelConfig
from lmzoo.engine.optimizers import make_optimizer
from lmzoo.layers import losses
from lmzoo.models import LanguageModel

_UNITS = {"": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
COMPUTE_BYTES = {"float32": 4, "mixed_bfloat16": 2, "mixed_float16": 2}
# The most temporaries, of the size of the largest variable, that an update holds at a time; counted while it ran.
_UPDATE_TEMPORARIES = {"adamw": 1, "adafactor": 2, "lamb": 4, "lion": 4, "muon": 4}
# Pages that the allocator holds beyond the tensors in them, as a share of what comes and goes in a step.
_FRAGMENTATION = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variables:
    """What a run holds for as long as it lives, counted on the model and the optimizer themselves.

    Args:
        parameters: trainable numbers.
        weights: bytes of all weights.
        optimizer_state: bytes of the optimizer's variables.
        largest: bytes of the largest trainable variable.
        kernels: numbers in the kernels that a mixed policy casts.
    """

    parameters: int
    weights: int
    optimizer_state: int
    largest: int
    kernels: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device at the moment of a step when it holds most.

    Args:
        moment: "loss", "backward" (of the last block, which comes first), "end of backward" or "update".
        weights: in float32, and the kernels as a mixed policy casts them.
        optimizer_state: as the optimizer declares it.
        gradients: those that exist at that moment, and the sums over micro-batches.
        activations: of the forward pass.
        working: what the loss, or the update, makes and forgets.
        allocator: pages held beyond all that.
    """

    moment: str
    weights: int
    optimizer_state: int
    gradients: int
    activations: int
    working: int
    allocator: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        parts = (self.weights, self.optimizer_state, self.gradients, self.activations, self.working, self.allocator)
        return sum(parts)


def count_variables(
    model_class: type[LanguageModel], shape: ModelConfig, *, optimizer: str = "adamw", dtype: str = "float32"
) -> Variables:
    """Counts the variables of a model and of its optimizer, which are made in a graph that never runs: no memory."""
    with tf.Graph().as_default():
        model = model_class(shape, dtype=dtype)
        made = make_optimizer(optimizer, 1e-3)
        made.build(model.trainable_variables)
    trainable = model.trainable_variables
    return Variables(
        parameters=sum(math.prod(variable.shape) for variable in trainable),
        weights=sum(_size(variable) for variable in model.weights),
        optimizer_state=sum(_size(variable) for variable in made.variables),
        largest=max(_size(variable) for variable in trainable),
        kernels=sum(math.prod(variable.shape) for variable in trainable if variable.name == "kernel"),
    )


def step_memory(
    shape: ModelConfig,
    variables: Variables,
    *,
    rows: int,
    lengths: Sequence[int] = (),
    remat: bool = False,
    accumulates: bool = False,
    optimizer: str = "adamw",
    dtype: str = "float32",
    devices: int = 1,
) -> Memory:
    """What a device holds at the fullest moment of a training step.

    Args:
        shape: the model's.
        variables: as `count_variables` counts them.
        rows: rows at a time.
        lengths: places in them: T, and U too where there is a decoder; empty for as many as the model has positions.
        remat: whether blocks are recomputed.
        accumulates: whether gradients are added up over micro-batches.
        optimizer, dtype: of the run.
        devices: how many there are in all.
    """
    size = COMPUTE_BYTES[dtype]
    made = row_bytes(shape, rows, lengths or (shape.context_length,), size)
    kept, gradients = kept_bytes(made, remat=remat), 4 * variables.parameters
    table = 4 * shape.vocab_size * made.head_dim
    sums = gradients if accumulates else 0
    # Recomputing takes copies of what the block and all blocks are given, so that it cannot come too early.
    copies = made.block_input + made.shared if remat else 0
    in_block = made.block_backward + copies
    last_block = kept + in_block - (made.block_input if remat else made.block)
    moments = {
        "loss": (sums + table, kept, _loss_bytes(made, shape.vocab_size, size)),
        "start of the backward pass": (sums + table, last_block, 0),
        "end of the backward pass": (sums + gradients, in_block if remat else 0, variables.largest),
        # The sums over all devices come out while those of this one are still there.
        "update": (gradients * (2 if devices > 1 else 1), 0, _UPDATE_TEMPORARIES[optimizer] * variables.largest),
    }
    moment, parts = max(moments.items(), key=lambda item: sum(item[1]))
    return Memory(
        moment=moment,
        weights=variables.weights + (variables.kernels * size if size < 4 else 0),
        optimizer_state=variables.optimizer_state,
        gradients=parts[0],
        activations=parts[1],
        working=parts[2],
        allocator=int(_FRAGMENTATION * sum(parts)),
    )


def parse_bytes(text: str) -> int:
    """Bytes of a size such as "80GB" (80e9) or "80GiB" (80 * 2**30).

    Raises:
        ValueError: it is not a number above 0 and a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    unit = match and {"b": "", "k": "kb", "m": "mb", "g": "gb", "t": "tb"}.get(match[2], match[2])
    if not match or unit not in _UNITS or float(match[1]) <= 0.0:
        raise ValueError(f"memory is {text!r}, but must be a number above 0 and a unit: 80GB, 80GiB, 512MB.")
    return int(float(match[1]) * _UNITS[unit])


def row_bytes(shape: ModelConfig, rows: int, lengths: Sequence[int], compute_bytes: int) -> ActivationBytes:
    """What a step makes of rows of T places, and of U where there is a decoder."""
    return shape.activation_bytes(rows, lengths[0], compute_bytes, *lengths[1:])


def kept_bytes(made: ActivationBytes, *, remat: bool) -> int:
    """What the forward pass keeps for the backward pass."""
    blocks = made.num_blocks * (made.block_input if remat else made.block)
    return made.ends + blocks + (made.shared if remat else 0)


def _loss_bytes(made: ActivationBytes, vocab_size: int, size: int) -> int:
    """What `token_cross_entropy` makes beside the gradient of the table."""
    tokens, width = made.head_tokens, made.head_dim
    _, chunk = losses.cut_tokens(tokens, losses.longest_chunk(width))
    start, stop = losses.table_blocks(vocab_size, width)[0]
    block, hidden, table = (stop - start) * width, tokens * width, vocab_size * width
    cast = size if size < 4 else 0
    logits = (4 + 4 + cast) * chunk * vocab_size  # And their softmax; and that as the products take it.
    product = (4 + (4 + cast if cast else 0)) * block  # The next sum of a block, and the product in both types.
    # At the end, the gradients of the chunks and of the blocks are there in parts and as one.
    return 4 * hidden + max(logits + product, 4 * hidden + 4 * table) + cast * table


def _size(variable: keras.Variable) -> int:
    """Bytes of a variable."""
    return math.prod(variable.shape) * tf.as_dtype(variable.dtype).size

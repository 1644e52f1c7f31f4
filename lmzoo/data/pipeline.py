"""From a corpus to batches, where a position in training is a number.

Example `index` of a run is row `permute(index % rows)` of the packed corpus, by the permutation of epoch
`index // rows`, whatever process makes it and whatever came before. So there is no state to save: a run is resumed by
`start_index`, and global batch k holds the examples [start_index + k * B, start_index + (k + 1) * B) on one machine as
on many.
"""

import atexit
import copy
import functools
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lmzoo.data.corpus import Corpus
from lmzoo.data.objectives import Batch, Objective, Rows, lengths_of
from lmzoo.data.packing import Method, Packing, pack
from lmzoo.data.randomness import GOLDEN, mix

if TYPE_CHECKING:
    import tensorflow as tf

_ROUNDS = 8
_LEAST_BITS = 6  # with fewer, some orders of a handful of rows come up measurably more often than others
_PARALLEL_CALLS = 2
_PREFETCH = 4
_ATTEMPTS = 10  # to draw a row of another document
_SAMPLE = 256  # rows, to see how much of them is padding
_QUIET_SECONDS = 0.1
_LONGEST_WAIT_SECONDS = 10.0
_LEAST = {"seq_length": 1, "batch_size": 1, "seed": 0, "start_index": 0, "num_examples": 1, "epochs": 1}


@dataclass(frozen=True, eq=False)
class Batches:
    """The batches of a run, each a pure function of its number; in NumPy.

    ```python
    training = Batches(corpus, Causal(), seq_length=256, batch_size=32, seed=1, start_index=32 * 5000)
    model.fit(training.dataset(), steps_per_epoch=1000)
    everything_once = Batches(validation, Causal(), seq_length=256, batch_size=32, shuffle=False, epochs=1)
    model.evaluate(everything_once.dataset())
    ```

    Args:
        corpus: what to read.
        objective: what to make of a row.
        seq_length: T, tokens in a row; of an encoder's, where there is a decoder too.
        batch_size: B, examples in a global batch, that of all machines together.
        packing: how documents become rows, see `lmzoo.data.packing`. None is the objective's usual method.
        seed: of the order of the rows and of all that is random in the objective.
        shuffle: whether to go through the rows in another order in each epoch.
        start_index: the first example; those of the batches done, if a run is resumed.
        num_examples: the index to stop at, so that it does not change when a run is resumed. None goes on for ever.
        epochs: the same, in passes over the corpus.
        drop_remainder: whether to leave out a last batch that is not full. If not, it is filled up with padding of
            weight 0: every batch has the same shape, and every token counts once.
    """

    corpus: Corpus
    objective: Objective
    seq_length: int
    batch_size: int
    packing: Method | None = None
    seed: int = 0
    shuffle: bool = True
    start_index: int = 0
    num_examples: int | None = None
    epochs: int | None = None
    drop_remainder: bool = False
    _packed: Packing = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: {value}; it must be at least {least}")
        if self.num_examples is not None and self.epochs is not None:
            raise ValueError(f"num_examples={self.num_examples} and epochs={self.epochs}: give one of the two")
        ends, objective = self.corpus.document_ends, self.objective
        packing = self.packing or objective.packings[0]
        if packing not in objective.packings:
            allowed = " or ".join(map(repr, objective.packings))
            raise ValueError(f"packing: {packing!r}; for {type(objective).__name__} it must be {allowed}")
        if not objective.separate_documents:
            if packing == "best-fit":
                raise ValueError("packing: 'best-fit' puts documents beside each other that must be kept separate")
            if packing == "stream":
                ends = ends[-1:]
        costs = objective.costs(self.seq_length)
        object.__setattr__(self, "_packed", pack(ends, self.seq_length, packing, objective.frame, costs))

    def between(self, start_index: int, num_examples: int) -> "Batches":
        """The batches of the examples from `start_index` up to `num_examples`, without packing the corpus again."""
        part = copy.copy(self)
        for name, value in {"start_index": start_index, "num_examples": num_examples, "epochs": None}.items():
            object.__setattr__(part, name, value)
        return part

    @property
    def rows_per_epoch(self) -> int:
        """Examples in a pass over the corpus."""
        return self._packed.num_rows

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """Places in the rows of a batch: T, and U too where there is a decoder."""
        return lengths_of(self.examples(np.zeros(1, np.int64)))

    @functools.cached_property
    def real_share(self) -> float:
        """Share of the places in rows that are no padding, over an epoch.

        Where there is a decoder, of the places on both sides, in a sample of the rows.
        """
        if len(self.lengths) == 1:
            return self._packed.num_places / (self._packed.num_rows * self._packed.seq_length)
        inputs, _, weights = self.examples(self.spread(_SAMPLE))
        read = inputs["segment_ids"] if "segment_ids" in inputs else inputs["padding_mask"]
        return float(((read > 0).sum() + (weights > 0).sum()) / (len(weights) * sum(self.lengths)))

    def spread(self, most: int) -> np.ndarray:
        """Indices of at most so many examples, evenly spread over the first epoch."""
        end = self.rows_per_epoch if self.stop_index is None else min(self.rows_per_epoch, self.stop_index)
        number = min(end, most)
        return np.arange(number) * end // number

    @property
    def stop_index(self) -> int | None:
        """The index after the last example; None if there is no last one."""
        return self.rows_per_epoch * self.epochs if self.epochs is not None else self.num_examples

    @property
    def num_batches(self) -> int | None:
        """Batches from `start_index` on; None if they never end."""
        if self.stop_index is None:
            return None
        examples = max(0, self.stop_index - self.start_index)
        return examples // self.batch_size if self.drop_remainder else -(-examples // self.batch_size)

    def rows_at(self, indices: np.ndarray) -> np.ndarray:
        """Gives the rows of the packed corpus that examples [B] are made of; -1 from `stop_index` on."""
        epochs, rows = np.divmod(indices, self.rows_per_epoch)
        if self.shuffle:
            rows = permute(rows, self.rows_per_epoch, self.seed, epochs)
        return rows if self.stop_index is None else np.where(indices < self.stop_index, rows, -1)

    def examples(self, indices: np.ndarray) -> Batch:
        """Makes the examples of these indices [B], in this order; padding from `stop_index` on."""
        indices = np.asarray(indices, np.int64)
        rows = self.rows_at(indices)
        seeds = mix(np.uint64(self.seed) ^ mix(indices.astype(np.uint64)))
        given = self._read(rows, seeds)
        if self.objective.needs_other:
            others = _other_rows(np.maximum(rows, 0), seeds, self._packed, self.corpus.document_ends)
            given = given._replace(other=self._read(others, seeds))
        return self.objective(given)

    def _read(self, rows: np.ndarray, seeds: np.ndarray) -> Rows:
        """Reads rows [B] of the packed corpus; padding for -1."""
        layout = self._packed.layout(np.maximum(rows, 0))
        real = rows >= 0
        in_row = (layout.segment_ids > 0) & real[:, None]
        has_next = layout.has_next & real[:, None]
        following = np.minimum(layout.places + 1, self.corpus.num_tokens - 1)
        return Rows(
            token_ids=self.corpus.take(layout.places) * in_row,
            next_token_ids=self.corpus.take(following) * has_next,
            has_next=has_next,
            segment_ids=layout.segment_ids * in_row,
            positions=layout.positions * in_row,
            seeds=seeds,
            seq_length=self.seq_length,
        )

    def batch_at(self, step: int) -> Batch:
        """Makes global batch `step`, counted from `start_index`."""
        if step < 0 or (self.num_batches is not None and step >= self.num_batches):
            raise IndexError(f"no batch {step}; there are {self.num_batches}, counted from 0")
        return self.examples(self._indices(step, 0, 1))

    def dataset(
        self, num_shards: int = 1, shard_index: int = 0, replicas: int = 1, on_made: Callable[[int], None] | None = None
    ) -> "tf.data.Dataset":
        """Gives the batches as a `tf.data.Dataset` of static shapes, whose length is known if it has one.

        Args:
            num_shards: input pipelines that share the work, one a machine; each makes its own part of every batch.
            shard_index: which of them this is.
            replicas: parts into which the shard's part of a batch is cut again, which follow one another as elements.
            on_made: is given the number of each element that has been made, by whatever thread made it.
        """
        import tensorflow as tf

        parts = num_shards * replicas
        if self.batch_size % parts:
            raise ValueError(f"batch_size: {self.batch_size}; it must be a multiple of {num_shards} x {replicas} parts")
        if not 0 <= shard_index < num_shards:
            raise ValueError(f"shard_index: {shard_index}; with num_shards={num_shards} it must be below that, from 0")

        def make(element: np.ndarray) -> list[np.ndarray]:
            with exit_guard:
                step, replica = divmod(int(element), replicas)
                inputs, labels, weights = self.examples(self._indices(step, shard_index * replicas + replica, parts))
                return [*inputs.values(), labels, weights]

        names = list(self.examples(self._indices(0, 0, parts))[0])
        specs = [tf.TensorSpec(array.shape, array.dtype) for array in make(np.zeros((), np.int64))]

        def make_and_tell(element: np.ndarray) -> list[np.ndarray]:
            arrays = make(element)
            if on_made is not None:
                on_made(int(element))
            return arrays

        def to_batch(element: "tf.Tensor") -> Any:
            tensors = tf.numpy_function(make_and_tell, [element], [spec.dtype for spec in specs], stateful=False)
            for tensor, spec in zip(tensors, specs, strict=True):
                tensor.set_shape(spec.shape)
            *inputs, labels, weights = tensors
            return dict(zip(names, inputs, strict=True)), labels, weights

        if self.num_batches is None:
            elements = tf.data.Dataset.counter()
        else:
            elements = tf.data.Dataset.range(self.num_batches * replicas)
        options = tf.data.Options()
        options.autotune.enabled = (
            False  # nothing here is for it to tune, and its thread may hang the interpreter's end
        )
        # A whole batch may be cut up by tf.distribute; a part that was made for one machine may not.
        policies = tf.data.experimental.AutoShardPolicy
        options.experimental_distribute.auto_shard_policy = policies.DATA if parts == 1 else policies.OFF
        made = elements.map(to_batch, num_parallel_calls=_PARALLEL_CALLS, deterministic=True)
        return made.prefetch(_PREFETCH).with_options(options)

    def dataset_fn(
        self, context: "tf.distribute.InputContext", on_made: Callable[[int], None] | None = None
    ) -> "tf.data.Dataset":
        """Gives a machine's part, for `strategy.distribute_datasets_from_function(batches.dataset_fn)`.

        Every replica gets its own slice of the global batch, and the machines together get all of it. The length that
        `tf.distribute` gives to the result counts one machine's slices: pass `num_batches` as the number of steps.
        """
        shards = context.num_input_pipelines
        return self.dataset(shards, context.input_pipeline_id, context.num_replicas_in_sync // shards, on_made)

    def _indices(self, step: int, part: int, parts: int) -> np.ndarray:
        size = self.batch_size // parts
        return self.start_index + step * self.batch_size + part * size + np.arange(size)


def _other_rows(rows: np.ndarray, seeds: np.ndarray, packed: Packing, document_ends: np.ndarray) -> np.ndarray:
    """Draws for each of the rows [B] another one, of another document if a few attempts find one."""
    others = rows
    document = documents = packed.documents(rows, document_ends)
    for _ in range(_ATTEMPTS):
        seeds = mix(seeds ^ GOLDEN)
        again = (documents == document) | (others == rows)
        others = np.where(again, (seeds % np.uint64(packed.num_rows)).astype(np.int64), others)
        documents = packed.documents(others, document_ends)
    return others


def permute(positions: np.ndarray, size: int, seed: int, epochs: np.ndarray) -> np.ndarray:
    """Maps positions [B] below `size` by the pseudorandom permutation of (seed, epoch [B]), in constant memory.

    A Feistel network permutes the numbers of as many bits as `size` has; one that falls outside is sent through again
    until it does not, which leaves a permutation of those inside.

    Reference: Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains", section 3 (cycle walking).
    """
    bits = max(_LEAST_BITS, (size - 1).bit_length())
    widths = (bits - bits // 2, bits // 2)
    keys = mix(np.uint64(seed) ^ mix(~epochs.astype(np.uint64)))
    permuted = _feistel(positions.astype(np.uint64), keys, widths)
    while (outside := permuted >= size).any():
        permuted[outside] = _feistel(permuted[outside], keys[outside], widths)
    return permuted.astype(np.int64)


def _feistel(numbers: np.ndarray, keys: np.ndarray, widths: tuple[int, int]) -> np.ndarray:
    left_width, right_width = widths
    left, right = numbers >> np.uint64(right_width), numbers & np.uint64((1 << right_width) - 1)
    for _ in range(_ROUNDS):  # an even number, so that the widths end as they began
        keys = keys + GOLDEN
        left, right = right, left ^ (mix(keys ^ right) >> np.uint64(64 - left_width))
        left_width, right_width = right_width, left_width
    return left << np.uint64(right_width) | right


class _ExitGuard:
    """Lets the interpreter end only when no thread of tf.data is at work in Python.

    A thread that is inside Python when the interpreter ends never comes back, and TensorFlow, as it destroys the
    iterator that the thread fills, would wait for it for ever. The threads stop by themselves, once nobody takes what
    they make.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls = 0
        self._last_call = -math.inf

    def __enter__(self) -> None:
        with self._lock:
            self._calls += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._calls -= 1
            self._last_call = time.monotonic()

    def wait(self) -> None:
        """Waits for there to be no call for a while; not for ever, since a thread may go on taking batches."""
        give_up = time.monotonic() + _LONGEST_WAIT_SECONDS
        while time.monotonic() < give_up and (self._calls or time.monotonic() < self._last_call + _QUIET_SECONDS):
            time.sleep(_QUIET_SECONDS / 10)


exit_guard = _ExitGuard()
atexit.register(exit_guard.wait)

"""From encoded examples with labels to batches of rows that are about equally long, each a pure function of its number.

In each epoch the examples are put into another order, cut into windows, sorted by length inside each window and cut
into batches, and the batches are put into another order. So a batch needs little padding, and is still a random choice
from the whole. Batch k holds the same examples on one machine as on many, and whatever came before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lmzoo.data.objectives import Batch
from lmzoo.data.pipeline import exit_guard, permute

if TYPE_CHECKING:
    import tensorflow as tf

WINDOW_BATCHES = 50
"""Batches whose examples are sorted by length together."""

_WIDTH_STEP = 8  # Rows are padded up to a multiple of it.
_PARALLEL_CALLS = 2
_PREFETCH = 4
_ORDER_OF_BATCHES = 0x9E37  # Mixed into the seed, so that batches are not ordered as their examples were.
_LEAST = {"batch_size": 1, "seed": 0, "start": 0, "num_batches": 0}


class Ragged:
    """Rows of numbers of different lengths, in one array."""

    def __init__(self, rows: Sequence[Any], dtype: Any = np.int32) -> None:
        self.lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        self._starts = np.cumsum(self.lengths) - self.lengths
        self._values = np.concatenate([np.zeros(1, dtype), *(np.asarray(row, dtype) for row in rows)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> np.ndarray:
        start = self._starts[row] + 1
        return self._values[start : start + self.lengths[row]]

    def take(self, rows: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows [B], empty ones for -1, as [B, width] with zeros behind, and a mask [B, width] of what is no padding."""
        column = np.arange(width)
        mask = column < np.where(rows >= 0, self.lengths[rows], 0)[:, None]
        places = np.where(mask, self._starts[rows][:, None] + 1 + column, 0)
        return self._values[places], mask


@dataclass(frozen=True, eq=False)
class Examples:
    """Encoded examples.

    Args:
        inputs: `token_ids`, and where they apply `token_type_ids`, `pair_token_ids` and `decoder_token_ids`.
        labels: [N] or [N, C], or a row of them for each token, that of the decoder if there is one.
        weights: [N], or a row of them for each token.
        pad_token_id: stands behind the tokens of a row.
        records: [N], number of the record that an example was made of.
    """

    inputs: Mapping[str, Ragged]
    labels: np.ndarray | Ragged
    weights: np.ndarray | Ragged
    pad_token_id: int
    records: np.ndarray

    def __len__(self) -> int:
        return len(self.records)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example [N], of both texts."""
        return np.sum([rows.lengths for name, rows in self.inputs.items() if name.endswith("token_ids")], axis=0)

    def shuffled(self, seed: int, epoch: int) -> np.ndarray:
        """Numbers of as many examples as there are, in the order of an epoch: each of them once."""
        count = len(self)
        return permute(np.arange(count), count, seed, np.full(count, epoch))


@dataclass(frozen=True, eq=False)
class LabelledBatches:
    """Batches of examples, in NumPy or as a `tf.data.Dataset`.

    Args:
        examples: what to take them from.
        batch_size: B, examples in a global batch, that of all machines together. The last one of an epoch is filled up
            with rows of weight 0.
        seed: of the order.
        shuffle: whether each epoch has an order of its own; otherwise all examples go by length.
        start: number of the first batch; that of the batches done, if a run goes on.
        num_batches: how many there are from there on; None is one epoch.
        width: tokens a row, the same in every batch, where shapes must be static; None is as few as a batch needs.
        decoder_width: the same of what a decoder reads and writes; None is `width`.
    """

    examples: Examples
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    start: int = 0
    num_batches: int | None = None
    width: int | None = None
    decoder_width: int | None = None

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: {value}; it must be at least {least}")
        if not len(self.examples):
            raise ValueError("there are no examples to make batches of")
        for name, rows in self.examples.inputs.items():
            width, longest = self._fixed_width(name), int(rows.lengths.max())
            if width is not None and width < longest:
                raise ValueError(
                    f"width: {width}; the longest example has {longest} tokens, so it must be at least that"
                )
        if self.num_batches is None:
            object.__setattr__(self, "num_batches", self.batches_per_epoch)

    @property
    def batches_per_epoch(self) -> int:
        """Batches that hold each example once."""
        return -(-len(self.examples) // self.batch_size)

    def rows_at(self, step: int) -> np.ndarray:
        """Numbers of the examples in batch `step`, counted from `start`: [B], -1 for rows that fill it up."""
        if not 0 <= step < (self.num_batches or 0):
            raise IndexError(f"no batch {step}; there are {self.num_batches}, counted from 0")
        epoch, number = divmod(self.start + step, self.batches_per_epoch)
        return self._order(epoch if self.shuffle else 0)[number]

    def batch_at(self, step: int) -> Batch:
        """Global batch `step`, counted from `start`."""
        return self._part(step, 0, 1)

    def dataset(
        self, num_shards: int = 1, shard_index: int = 0, replicas: int = 1, on_made: Callable[[int], None] | None = None
    ) -> tf.data.Dataset:
        """The batches as a `tf.data.Dataset`; the arguments are those of `lmzoo.data.pipeline.Batches.dataset`."""
        import tensorflow as tf

        parts = num_shards * replicas
        if self.batch_size % parts:
            raise ValueError(f"batch_size: {self.batch_size}; it must be a multiple of {num_shards} x {replicas} parts")

        def make(element: np.ndarray) -> list[np.ndarray]:
            with exit_guard:
                step, replica = divmod(int(element), replicas)
                inputs, labels, weights = self._part(step, shard_index * replicas + replica, parts)
                if on_made is not None:
                    on_made(int(element))
                return [*inputs.values(), labels, weights]

        inputs, labels, weights = self._part(0, 0, parts)
        samples = [*inputs.values(), labels, weights]
        values = (self.examples.labels, self.examples.weights)
        widths = [(len(sample), self._fixed_width(name)) for name, sample in inputs.items()]
        shapes = [
            *widths,
            *(
                sample.shape if isinstance(rows, np.ndarray) else (len(sample), self._fixed_width(self._labelled))
                for sample, rows in zip((labels, weights), values, strict=True)
            ),
        ]

        def to_batch(element: tf.Tensor) -> Any:
            tensors = tf.numpy_function(make, [element], [sample.dtype for sample in samples], stateful=False)
            for tensor, shape in zip(tensors, shapes, strict=True):
                tensor.set_shape(shape)
            *tokens, labelled, weighted = tensors
            return dict(zip(inputs, tokens, strict=True)), labelled, weighted

        options = tf.data.Options()
        options.autotune.enabled = False
        policies = tf.data.experimental.AutoShardPolicy
        options.experimental_distribute.auto_shard_policy = policies.DATA if parts == 1 else policies.OFF
        elements = tf.data.Dataset.range((self.num_batches or 0) * replicas)
        made = elements.map(to_batch, num_parallel_calls=_PARALLEL_CALLS, deterministic=True)
        return made.prefetch(_PREFETCH).with_options(options)

    def dataset_fn(
        self, context: tf.distribute.InputContext, on_made: Callable[[int], None] | None = None
    ) -> tf.data.Dataset:
        """A machine's part, for `strategy.distribute_datasets_from_function`; see `Batches.dataset_fn`."""
        shards = context.num_input_pipelines
        return self.dataset(shards, context.input_pipeline_id, context.num_replicas_in_sync // shards, on_made)

    def _order(self, epoch: int) -> np.ndarray:
        cache: dict[int, np.ndarray] = self.__dict__.setdefault("_orders", {})
        if epoch not in cache:
            if len(cache) > 1:  # Threads work on two epochs at the most.
                cache.pop(min(cache))
            cache[epoch] = self._make_order(epoch)
        return cache[epoch]

    def _make_order(self, epoch: int) -> np.ndarray:
        """Numbers of the examples of an epoch: [batches, B]."""
        count, batches, size = len(self.examples), self.batches_per_epoch, self.batch_size
        order = np.arange(count)
        if self.shuffle:
            order = self.examples.shuffled(self.seed, epoch)
        window = np.arange(count) // (WINDOW_BATCHES * size if self.shuffle else count)
        order = order[np.lexsort((self.examples.lengths[order], window))]
        filled = np.full(batches * size, -1)
        filled[:count] = order
        rows = filled.reshape(batches, size)
        if self.shuffle:
            rows = rows[permute(np.arange(batches), batches, self.seed ^ _ORDER_OF_BATCHES, np.full(batches, epoch))]
        return rows

    def _part(self, step: int, part: int, parts: int) -> Batch:
        """One of the equal parts of a batch, as wide as the whole of it."""
        whole = self.rows_at(step)
        rows = np.array_split(whole, parts)[part]
        examples = self.examples
        inputs: dict[str, np.ndarray] = {}
        for name, values in examples.inputs.items():
            taken, mask = values.take(rows, self._width(name, values, whole))
            if name.endswith("token_ids"):
                mask[rows < 0, 0] = True  # What attends to nothing at all is for nobody to work out.
                inputs[name] = np.where(mask, taken, np.int32(examples.pad_token_id))
                if not name.startswith("decoder_"):  # Whose padding comes after all that is asked of it.
                    inputs[name.replace("token_ids", "padding_mask")] = mask
            else:
                inputs[name] = taken
        labels, weights = (self._of_rows(values, rows, whole) for values in (examples.labels, examples.weights))
        return inputs, labels, weights

    def _of_rows(self, values: np.ndarray | Ragged, rows: np.ndarray, whole: np.ndarray) -> np.ndarray:
        if isinstance(values, Ragged):
            return values.take(rows, self._width(self._labelled, values, whole))[0]
        taken = values[rows]
        taken[rows < 0] = 0
        return taken

    @property
    def _labelled(self) -> str:
        """The input that labels belong to, if each of its tokens has one."""
        return "decoder_token_ids" if "decoder_token_ids" in self.examples.inputs else "token_ids"

    def _fixed_width(self, name: str) -> int | None:
        return self.decoder_width or self.width if name.startswith("decoder_") else self.width

    def _width(self, name: str, values: Ragged, rows: np.ndarray) -> int:
        longest = int(values.lengths[rows[rows >= 0]].max())
        return self._fixed_width(name) or -(-longest // _WIDTH_STEP) * _WIDTH_STEP

"""Static-shape key/value cache: what decoding remembers of the tokens it has read."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

from keras import ops

Tensor = Any


class KeyValueCache(NamedTuple):
    """Keys and values of the tokens read so far, as a nest of tensors that loops and functions can carry.

    Tokens are written to slots 0, 1, 2, ... in the order in which they are read, in all rows alike. A row whose
    prompt is shorter than the longest one leaves slots that `mask` marks as empty for ever, so that one scalar
    says where the next token of every row goes. It is updated by value: each update returns a new cache.

    Attributes:
        keys: one [B, N, S, H] tensor a layer.
        values: one [B, N, S, H] tensor a layer.
        mask: [B, S] bool, True where a slot holds a token that may be attended to.
        next_slot: int32 scalar, the slot that the next token is written to.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    mask: Tensor
    next_slot: Tensor

    @classmethod
    def empty(
        cls, batch_size: Any, num_layers: int, num_heads: int, cache_length: int, head_dim: int, dtype: str
    ) -> Self:
        """A cache of `cache_length` empty slots a row; `batch_size` may be a scalar tensor."""
        shape = (batch_size, num_heads, cache_length, head_dim)
        return cls(
            keys=tuple(ops.zeros(shape, dtype) for _ in range(num_layers)),
            values=tuple(ops.zeros(shape, dtype) for _ in range(num_layers)),
            mask=ops.zeros((batch_size, cache_length), "bool"),
            next_slot=ops.zeros((), "int32"),
        )

    @property
    def slots(self) -> Tensor:
        """[S] int32, the numbers of the slots."""
        return ops.arange(ops.shape(self.mask)[1], dtype="int32")

    def reserve(self, token_mask: Tensor) -> Self:
        """Marks the next T slots as holding the tokens for which `token_mask` [B, T] is True.

        `next_slot` stays where it is until `advance`, since every layer still has to write there.
        """
        mask = write_slots(self.mask, token_mask, self.next_slot, axis=1)
        return self._replace(mask=mask)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> Self:
        """Writes `keys` and `values` [B, N, T, H] of one layer to the next T slots."""
        new_keys, new_values = list(self.keys), list(self.values)
        new_keys[layer] = write_slots(self.keys[layer], keys, self.next_slot, axis=2)
        new_values[layer] = write_slots(self.values[layer], values, self.next_slot, axis=2)
        return self._replace(keys=tuple(new_keys), values=tuple(new_values))

    def advance(self, num_tokens: int) -> Self:
        """Moves on by the `num_tokens` slots just written."""
        return self._replace(next_slot=self.next_slot + num_tokens)

    def take(self, rows: Tensor) -> Self:
        """The cache whose row i is this one's row `rows[i]`, [R] int32: in another order, or repeated."""
        keys, values = (tuple(ops.take(each, rows, axis=0) for each in group) for group in (self.keys, self.values))
        return self._replace(keys=keys, values=values, mask=ops.take(self.mask, rows, axis=0))


def write_slots(slots: Tensor, updates: Tensor, start: Tensor, axis: int) -> Tensor:
    """`slots` with `updates` in place of the entries from `start` on, along `axis`.

    Written as a selection, which every runtime has (TF Serving, TFLite, XLA) and which costs no more on a CPU than
    a scatter or a dynamic update: all three copy the cache once a step.

    Shapes:
        slots [..., S, ...], updates [..., T, ...] with T <= S, start int32 scalar with start + T <= S.
    """
    num_slots, num_updates = ops.shape(slots)[axis], ops.shape(updates)[axis]
    trailing = (1,) * (len(slots.shape) - axis - 1)
    offset = ops.arange(num_slots, dtype="int32") - start
    written = ops.logical_and(offset >= 0, offset < num_updates)
    if updates.shape[axis] != 1:  # One update stretches over the slots by broadcasting; more are laid out slot by slot.
        # No clip: to [0, 6] it would be a Relu6 of TFLite's, which has none for integers.
        updates = ops.take(updates, ops.where(written, offset, 0), axis=axis)
    return ops.where(ops.reshape(written, (num_slots, *trailing)), updates, slots)

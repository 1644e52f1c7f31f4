"""Text to text: pairs of a source and a target as examples for a model with an encoder and a decoder, and tasks mixed.

`LabelledBatches` makes batches of them: of pairs of about the same length or, once they are packed, of full rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lmzoo.data.corruption import SentinelFacts
from lmzoo.data.labelled import Examples, Ragged
from lmzoo.data.packing import PlannedPacking, pack
from lmzoo.data.pipeline import permute
from lmzoo.data.records import Records
from lmzoo.data.tokenizers import Tokenizer

_SIDES = {"token_ids": ("segment_ids", "positions"), "decoder_token_ids": ("decoder_segment_ids", "decoder_positions")}
_BLOCK = 10_000  # draws in which each task has its share
_ORDER_OF_TASKS = 0x7A5C  # mixed into the seed, so that tasks are not drawn as their examples are ordered


def encode_text_to_text(
    records: Records,
    tokenizer: Tokenizer,
    *,
    source: str,
    target: str,
    prefix: str | Sequence[str] = "",
    max_source_length: int = 512,
    max_target_length: int = 128,
) -> Examples:
    """Examples of a task that turns one text into another.

    Their inputs are `token_ids`, the source, and `decoder_token_ids`, the target moved one place on behind the token
    that decoders start with; their labels are the target.

    Args:
        records: what to encode.
        tokenizer: that of the model.
        source, target: names of the fields.
        prefix: stands in front of each source and says which task it is, such as "translate English to German: "; one
            for all, or one for each record.
        max_source_length, max_target_length: tokens, the one that ends the text included; the end of a longer text is
            cut off.

    Raises:
        ValueError: a field is missing or holds something else than text, a length is below 1, or the tokenizer has no
            token that ends a text, or none for padding.

    Reference: Raffel et al. 2020, section 2.4.
    """
    for name, length in {"max_source_length": max_source_length, "max_target_length": max_target_length}.items():
        if length < 1:
            raise ValueError(f"{name}: {length}; it must be at least 1")
    facts = SentinelFacts.of(tokenizer)
    end = facts.eos_token_id
    prefixes = [prefix] * len(records) if isinstance(prefix, str) else prefix
    read, written = (
        [[*ids[: longest - 1], end] for ids in tokenizer.encode(texts)]
        for texts, longest in (
            ([before + text for before, text in zip(prefixes, records.texts(source), strict=True)], max_source_length),
            (records.texts(target), max_target_length),
        )
    )
    return Examples(
        {
            "token_ids": Ragged(read),
            "decoder_token_ids": Ragged([[facts.start_token_id, *row[:-1]] for row in written]),
        },
        Ragged(written),
        Ragged([[1.0] * len(row) for row in written], np.float32),
        facts.pad_token_id,
        np.arange(len(records)),
    )


def pack_pairs(examples: Examples, source_length: int, target_length: int) -> Examples:
    """Puts as many pairs into a row as it has room for, on both sides.

    Which pairs share a row is the same in each epoch. `segment_ids` and `positions` of both sides keep them apart.

    Args:
        examples: pairs, by `encode_text_to_text`.
        source_length: T, places of the encoder.
        target_length: U, places of the decoder.

    Raises:
        ValueError: a text is longer than its side of a row.
    """
    rooms = {"token_ids": source_length, "decoder_token_ids": target_length}
    lengths = {name: examples.inputs[name].lengths for name in rooms}
    for name, room in rooms.items():
        if (longest := int(lengths[name].max())) > room:
            raise ValueError(
                f"{name}: a text of {longest} tokens, but rows have {room} places; cut texts, or take more"
            )
    # A pair costs its share of the side that it fills more of, so what a row's encoder has room for, its decoder has.
    costs = np.maximum(lengths["token_ids"], -(-lengths["decoder_token_ids"] * source_length // target_length))
    ends = np.cumsum(costs)
    packed = pack(ends, source_length, "best-fit")
    assert isinstance(packed, PlannedPacking)
    rows = np.split(np.searchsorted(ends, packed.starts, side="right"), packed.row_ends[:-1])
    inputs: dict[str, Ragged] = {}
    for name, (segments, positions) in _SIDES.items():
        inputs[name] = _joined(examples.inputs[name], rows)
        of_rows = [lengths[name][row] for row in rows]
        inputs[segments] = Ragged([np.repeat(np.arange(1, len(sizes) + 1), sizes) for sizes in of_rows])
        inputs[positions] = Ragged([np.concatenate([np.arange(size) for size in sizes]) for sizes in of_rows])
    assert isinstance(examples.labels, Ragged)
    assert isinstance(examples.weights, Ragged)
    labels, weights = _joined(examples.labels, rows), _joined(examples.weights, rows, np.float32)
    return Examples(
        inputs, labels, weights, examples.pad_token_id, np.array([examples.records[row[0]] for row in rows])
    )


def mixing_rates(sizes: Sequence[int], *, cap: int | None = None, temperature: float = 1.0) -> np.ndarray:
    """The share of each task of a mixture.

    Args:
        sizes: examples of each.
        cap: as many examples count, at most: so that a task with very many does not crowd out the others. None for no
            such limit.
        temperature: 1 gives shares in proportion to the examples that count, more evens them out, and infinity gives
            equal ones.

    Raises:
        ValueError: a number is out of range.

    Reference: Raffel et al. 2020, section 3.5.2.
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes: {list(sizes)}; there must be tasks, of at least 1 example each")
    if cap is not None and cap < 1:
        raise ValueError(f"cap: {cap}; it must be at least 1")
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature}; it must be more than 0")
    counted = np.minimum(sizes, np.inf if cap is None else cap).astype(np.float64)
    rates = (counted / counted.max()) ** (1.0 / temperature)
    return rates / rates.sum()


@dataclass(frozen=True, eq=False)
class Mixture(Examples):
    """Examples of several tasks, each of which is drawn as often as its rate says.

    An epoch has as many examples as all tasks together. What the n-th one of a run is depends on the seed and on n
    alone. The examples of one task are drawn equally often, but for those of the last 10,000 draws.

    Args:
        sizes: examples of each task; they follow one another.
        rates: the share of each.
    """

    sizes: np.ndarray
    rates: np.ndarray

    @classmethod
    def of(cls, tasks: Iterable[Examples], *, cap: int | None = None, temperature: float = 1.0) -> Mixture:
        """Mixes tasks that have the same inputs; for `cap` and `temperature` see `mixing_rates`.

        Raises:
            ValueError: tasks differ in their inputs or in the padding token, or a number is out of range.
        """
        parts = list(tasks)
        sizes = list(map(len, parts))
        rates = mixing_rates(sizes, cap=cap, temperature=temperature)
        kinds = {(tuple(part.inputs), part.pad_token_id, type(part.labels), type(part.weights)) for part in parts}
        if len(kinds) > 1:
            inputs = " and ".join(str(list(names)) for names, *_ in sorted(kinds, key=str))
            raise ValueError(f"the tasks differ in their inputs, {inputs}, labels or padding; make all of them alike")
        return cls(
            {name: _one_after_another([part.inputs[name] for part in parts]) for name in parts[0].inputs},
            _all([part.labels for part in parts], np.int32),
            _all([part.weights for part in parts], np.float32),
            parts[0].pad_token_id,
            np.concatenate([part.records for part in parts]),
            np.asarray(sizes),
            rates,
        )

    def shuffled(self, seed: int, epoch: int) -> np.ndarray:
        """Numbers of as many examples as there are, in the order of an epoch, drawn by the tasks' rates."""
        count = len(self)
        quotas = np.maximum(1, np.diff(np.rint(np.cumsum(self.rates) * _BLOCK), prepend=0)).astype(np.int64)
        block, place = np.divmod(epoch * count + np.arange(count), quotas.sum())
        slot = permute(place, int(quotas.sum()), seed ^ _ORDER_OF_TASKS, block)
        ends = np.cumsum(quotas)
        tasks = np.searchsorted(ends, slot, side="right")
        numbers = np.empty(count, np.int64)
        for task, (size, quota) in enumerate(zip(self.sizes, quotas, strict=True)):
            here = tasks == task
            # Draws of this task, counted from the run's start.
            passes, position = np.divmod(block[here] * quota + slot[here] - (ends[task] - quota), size)
            numbers[here] = permute(position, int(size), seed + task, passes) + self.sizes[:task].sum()
        return numbers


def _joined(values: Ragged, rows: Sequence[np.ndarray], dtype: type = np.int32) -> Ragged:
    return Ragged([np.concatenate([values[number] for number in row]) for row in rows], dtype)


def _one_after_another(parts: Iterable[Ragged], dtype: type = np.int32) -> Ragged:
    return Ragged([part[number] for part in parts for number in range(len(part))], dtype)


def _all(parts: Sequence[Ragged | np.ndarray], dtype: type) -> Ragged | np.ndarray:
    of_tokens = [part for part in parts if isinstance(part, Ragged)]
    if of_tokens:
        return _one_after_another(of_tokens, dtype)
    return np.concatenate([part for part in parts if isinstance(part, np.ndarray)])

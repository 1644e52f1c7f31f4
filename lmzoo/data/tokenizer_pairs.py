"""Texts and pairs of texts as an encoder reads them: special tokens around them, cut to a length, with token types."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import tokenizers
from tokenizers import processors

from lmzoo.data.tokenizer_training import without_surrogates


class Encodings(NamedTuple):
    """Encoded texts, or pairs of them: lists of lists from Python, ragged tensors from a graph.

    Shapes:
        token_ids: [B, None].
        token_type_ids: [B, None], 0 for the first text of a pair and 1 for the second.
        offsets: [B, None, 2], the characters [start, end) that a token stands for in its own text; (0, 0) for the
            special tokens around the texts.
    """

    token_ids: Any
    token_type_ids: Any
    offsets: Any


def encode_pairs(
    backend: tokenizers.Tokenizer,
    untrimmed: tokenizers.Tokenizer,
    first: Iterable[str],
    second: Iterable[str] | None,
    max_length: int | None,
) -> Encodings:
    """See `Tokenizer.encode_pairs`; `untrimmed` is the same tokenizer before its post-processor trims offsets."""
    first = [without_surrogates(text) for text in first]
    second = None if second is None else [without_surrogates(text) for text in second]
    if second is not None and len(first) != len(second):
        raise ValueError(f"{len(first)} first and {len(second)} second texts: give a second text for each first one.")
    num_special = backend.num_special_tokens_to_add(second is not None)
    check_max_length(max_length, num_special)
    ones = untrimmed.encode_batch(first, add_special_tokens=False)
    twos = [None] * len(ones) if second is None else untrimmed.encode_batch(second, add_special_tokens=False)
    whole = []
    for one, two in zip(ones, twos, strict=True):
        if max_length is not None:
            lengths = truncated_lengths(len(one), 0 if two is None else len(two), max_length - num_special)
            one.truncate(lengths[0])
            if two is not None:
                two.truncate(lengths[1])
        whole.append(backend.post_process(one, two, add_special_tokens=True))
    if backend.post_processor is None or isinstance(backend.post_processor, processors.ByteLevel):
        # Those that frame texts tell the two apart.
        types = [[0] * len(one) + [1] * (len(both) - len(one)) for one, both in zip(ones, whole, strict=True)]
    else:
        types = [encoding.type_ids for encoding in whole]
    return Encodings(
        [encoding.ids for encoding in whole],
        types,
        [encoding.offsets for encoding in whole],
    )


def truncated_lengths(first: int, second: int, limit: int) -> tuple[int, int]:
    """Tokens left of two texts once the longer has been cut until both fit, or then both by turns."""
    shorter = min(first, second, limit // 2)
    longer = min(max(first, second), limit - shorter)
    return (shorter, longer) if first <= second else (longer, shorter)


def check_max_length(max_length: int | None, num_special: int) -> None:
    """Refuses a length that the special tokens alone do not fit into."""
    if max_length is not None and max_length < num_special:
        raise ValueError(f"max_length={max_length}: the {num_special} special tokens alone need more; raise it.")


class Windows(NamedTuple):
    """Pairs whose second text is read through windows, one after the other, as lists of lists.

    Args:
        token_ids: of each window, the first text and the special tokens included.
        token_type_ids: 0 for the first text of a pair and 1 for the second.
        offsets: the characters [start, end) of the second text that a token stands for; (-1, -1) for all others.
        rows: the number of the pair that each window is of.
    """

    token_ids: list[list[int]]
    token_type_ids: list[list[int]]
    offsets: list[list[tuple[int, int]]]
    rows: list[int]


def encode_windows(
    backend: tokenizers.Tokenizer,
    untrimmed: tokenizers.Tokenizer,
    first: Iterable[str],
    second: Iterable[str],
    max_length: int,
    stride: int,
) -> Windows:
    """See `Tokenizer.encode_windows`, and `encode_pairs` for `untrimmed`."""
    first = [without_surrogates(text) for text in first]
    second = [without_surrogates(text) for text in second]
    if len(first) != len(second):
        raise ValueError(f"{len(first)} first and {len(second)} second texts: give a second text for each first one.")
    num_special = backend.num_special_tokens_to_add(True)
    if not 0 <= stride < (least := max_length - num_special) // 2:
        raise ValueError(
            f"stride={stride}: it must lie in [0, {least // 2}), since windows have max_length={max_length} tokens, "
            "and half of them may be the first text."
        )
    windows = Windows([], [], [], [])
    ones, twos = (untrimmed.encode_batch(texts, add_special_tokens=False) for texts in (first, second))
    for row, (one, two) in enumerate(zip(ones, twos, strict=True)):
        one.truncate(least // 2)
        two.truncate(least - len(one), stride=stride)
        for part in (two, *two.overflowing):
            whole = backend.post_process(one, part, add_special_tokens=True)
            if backend.post_processor is None:
                types = [0] * len(one) + [1] * len(part)
                sides: list[int | None] = [*types]
            else:
                types, sides = whole.type_ids, whole.sequence_ids
            windows.token_ids.append(whole.ids)
            windows.token_type_ids.append(types)
            windows.offsets.append(
                [span if side == 1 else (-1, -1) for span, side in zip(whole.offsets, sides, strict=True)]
            )
            windows.rows.append(row)
    return windows

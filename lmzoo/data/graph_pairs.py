"""What `tokenizer_pairs` does, in a graph."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from lmzoo.data.graph_code_points import row_ids
from lmzoo.data.tokenizer_pairs import Encodings, check_max_length

_Item = tuple[str | int, int]
_Texts = tuple[tf.RaggedTensor, tf.RaggedTensor]


class PairTemplate:
    """The special tokens around a text or a pair, read from the post-processor of a `tokenizer.json`.

    Args:
        post_processor: that of the file; None adds nothing.

    Raises:
        ValueError: it is neither BERT's nor RoBERTa's nor a template of one token or text after the other.
    """

    def __init__(self, post_processor: dict[str, Any] | None):
        # A text is "A" or "B", a special token its id; beside it the token type.
        self._single: list[_Item] = [("A", 0)]
        self._pair: list[_Item] = [("A", 0), ("B", 1)]
        templates = [processor for processor in _processors(post_processor) if processor["type"] != "ByteLevel"]
        if not templates:
            return
        post_processor, *more = templates
        kind = post_processor["type"]
        if more:
            kind += f" and then {more[0]['type']}"
            raise ValueError(f"This tokenizer has no in-graph twin: its post-processor is {kind}.")
        if kind == "RobertaProcessing":
            start, end = post_processor["cls"][1], post_processor["sep"][1]
            self._single = [(start, 0), ("A", 0), (end, 0)]
            self._pair = [*self._single, (end, 0), ("B", 0), (end, 0)]
        elif kind == "BertProcessing":
            start, end = post_processor["cls"][1], post_processor["sep"][1]
            self._single = [(start, 0), ("A", 0), (end, 0)]
            self._pair = [*self._single, ("B", 1), (end, 1)]
        elif kind == "TemplateProcessing":
            self._single, self._pair = (_items(post_processor, name) for name in ("single", "pair"))
        else:
            raise ValueError(f"This tokenizer has no in-graph twin: its post-processor is {kind}.")

    def join(self, first: _Texts, second: _Texts | None, max_length: int | tf.Tensor | None) -> Encodings:
        """Puts texts, given as ids and offsets, together, and cuts the longer one until both fit in `max_length`."""
        items = self._single if second is None else self._pair
        num_special = sum(isinstance(item, int) for item, _ in items)
        texts = {"A": first} if second is None else {"A": first, "B": second}
        if max_length is not None:
            if isinstance(max_length, int):
                check_max_length(max_length, num_special)
            limit = tf.maximum(tf.cast(max_length, tf.int64) - num_special, 0)
            texts = _truncated(texts, limit)
        rows = first[0].nrows()
        parts = []
        for item, token_type in items:
            if isinstance(item, int):
                ids = tf.RaggedTensor.from_row_lengths(tf.fill([rows], item), tf.ones([rows], tf.int64), validate=False)
                offsets = ids.with_values(tf.zeros([rows, 2], tf.int32))
            else:
                ids, offsets = texts[item]
            parts.append((ids, ids.with_values(tf.fill(tf.shape(ids.values), token_type)), offsets))
        return Encodings(*(tf.concat(columns, 1) for columns in zip(*parts, strict=True)))


def trims_offsets(post_processor: dict[str, Any] | None) -> list[bool]:
    """For each time that white space is taken from tokens' offsets, whether a first token may keep its one space."""
    return [processor["add_prefix_space"] for processor in _processors(post_processor) if processor.get("trim_offsets")]


def _processors(post_processor: dict[str, Any] | None) -> list[dict[str, Any]]:
    if post_processor is None:
        return []
    return post_processor["processors"] if post_processor["type"] == "Sequence" else [post_processor]


def _items(post_processor: dict[str, Any], name: str) -> list[_Item]:
    items: list[_Item] = []
    for entry in post_processor[name]:
        if "Sequence" in entry:
            items.append((entry["Sequence"]["id"], entry["Sequence"]["type_id"]))
        else:
            token = entry["SpecialToken"]
            ids = post_processor["special_tokens"][token["id"]]["ids"]
            items += [(index, token["type_id"]) for index in ids]
    return items


def _truncated(texts: dict[str, _Texts], limit: tf.Tensor) -> dict[str, _Texts]:
    lengths = {name: ids.row_lengths() for name, (ids, _) in texts.items()}
    if "B" in lengths:
        one, two = lengths["A"], lengths["B"]
        shorter = tf.minimum(tf.minimum(one, two), limit // 2)
        longer = tf.minimum(tf.maximum(one, two), limit - shorter)
        lengths = {"A": tf.where(one <= two, shorter, longer), "B": tf.where(one <= two, longer, shorter)}
    else:
        lengths["A"] = tf.minimum(lengths["A"], limit)
    return {name: (_head(ids, lengths[name]), _head(offsets, lengths[name])) for name, (ids, offsets) in texts.items()}


def _head(ragged: tf.RaggedTensor, lengths: tf.Tensor) -> tf.RaggedTensor:
    """The first values of each row, [B] of them."""
    row = row_ids(ragged)
    kept = tf.range(tf.size(row, tf.int64)) < tf.gather(ragged.row_starts() + lengths, row)
    return tf.RaggedTensor.from_row_lengths(tf.boolean_mask(ragged.values, kept), lengths, validate=False)

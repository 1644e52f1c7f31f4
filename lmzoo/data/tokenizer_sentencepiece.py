"""Reading SentencePiece's own model files (`spiece.model`), without SentencePiece."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from lmzoo.data.tokenizer_training import bert_template, t5_template

# Numbers of fields, and of kinds of pieces, in sentencepiece_model.proto.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE, _SCORE, _KIND = 1, 2, 3
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_MODEL_TYPE, _BYTE_FALLBACK, _UNIGRAM = 3, 35, 1
_CHARSMAP, _ADD_DUMMY_PREFIX, _REMOVE_EXTRA_SPACES = 2, 3, 4


def load_sentencepiece(file: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """Loads a Unigram model of SentencePiece as a tokenizer of the library.

    What T5 and ALBERT do outside of the file is done too: T5's `extra_ids` of the configuration are sentinels, the
    first of which has the last id; with [CLS] and [SEP] among the pieces, quotes are made equal, accents taken away
    unless `keep_accents`, and letters lower-cased unless `do_lower_case` is false.

    Args:
        file: the model.
        config: that of the tokenizer (`tokenizer_config.json`).

    Raises:
        ValueError: it is no such file, or its model is not Unigram.
    """
    try:
        pieces, trainer, rules = _read(file.read_bytes())
    except (IndexError, KeyError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"Cannot read {file} as a SentencePiece model: {error!r}.") from error
    if trainer.get(_MODEL_TYPE, _UNIGRAM) != _UNIGRAM:
        raise ValueError(f"{file} is a SentencePiece model of type {trainer[_MODEL_TYPE]}; only 1, Unigram, is read.")
    unknown = next((index for index, (_, _, kind) in enumerate(pieces) if kind == _UNKNOWN), None)
    if unknown is None:
        raise ValueError(f"{file} is not a SentencePiece model: none of its {len(pieces)} pieces is the unknown one.")
    sentinels = [f"<extra_id_{number}>" for number in reversed(range(int(config.get("extra_ids") or 0)))]
    vocabulary = [*((piece, score) for piece, score, _ in pieces), *((sentinel, 0.0) for sentinel in sentinels)]
    by_bytes = bool(trainer.get(_BYTE_FALLBACK, 0))
    backend = tokenizers.Tokenizer(models.Unigram(vocabulary, unknown, by_bytes))
    names = {piece for piece, _, _ in pieces}
    is_albert = {"[CLS]", "[SEP]"} <= names
    backend.normalizer = _normalizer(rules, config, is_albert)
    scheme = "always" if rules.get(_ADD_DUMMY_PREFIX, 1) else "never"
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    metaspace = decoders.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), metaspace]) if by_bytes else metaspace
    for piece, _, kind in pieces:
        if kind in (_UNKNOWN, _CONTROL) or (is_albert and piece in ("[CLS]", "[SEP]", "[MASK]")):
            is_mask = piece in ("[MASK]", "<mask>")
            backend.add_special_tokens([AddedToken(piece, special=True, normalized=False, lstrip=is_mask)])
        elif kind == _USER_DEFINED:
            backend.add_tokens([AddedToken(piece, normalized=False)])
    backend.add_special_tokens([AddedToken(sentinel, special=True, normalized=False) for sentinel in sentinels])
    if is_albert:
        backend.post_processor = bert_template(backend, "[CLS]", "[SEP]")
    elif "</s>" in names:
        backend.post_processor = t5_template(backend, "</s>")
    return backend


def _normalizer(rules: dict[int, Any], config: dict[str, Any], is_albert: bool) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if is_albert:
        steps += [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
        if not config.get("keep_accents", False):
            steps += [normalizers.NFKD(), normalizers.StripAccents()]
        if config.get("do_lower_case", True):
            steps.append(normalizers.Lowercase())
    if rules.get(_CHARSMAP):
        steps.append(normalizers.Precompiled(rules[_CHARSMAP]))
    if rules.get(_REMOVE_EXTRA_SPACES, 1):
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    return normalizers.Sequence(steps)


def _read(message: bytes) -> tuple[list[tuple[str, float, int]], dict[int, Any], dict[int, Any]]:
    """The pieces with their scores and kinds, and the fields of the trainer's and of the normalizer's settings."""
    pieces: list[tuple[str, float, int]] = []
    settings: dict[int, dict[int, Any]] = {_TRAINER: {}, _NORMALIZER: {}}
    for number, value in _fields(message):
        if number == _PIECES:
            fields = dict(_fields(value))
            score = struct.unpack("<f", fields.get(_SCORE, bytes(4)))[0]
            pieces.append((fields[_PIECE].decode(), score, fields.get(_KIND, _NORMAL)))
        elif number in settings:
            settings[number] = dict(_fields(value))
    return pieces, settings[_TRAINER], settings[_NORMALIZER]


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protocol buffer's message: integers as int, all others as their bytes."""
    place = 0
    while place < len(message):
        tag, place = _integer(message, place)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            value, place = _integer(message, place)
            yield number, value
            continue
        if wire_type == 2:
            length, place = _integer(message, place)
        else:
            length = {1: 8, 5: 4}[wire_type]
        if place + length > len(message):
            raise IndexError(f"field {number} ends behind the end of the file")
        yield number, message[place : place + length]
        place += length


def _integer(message: bytes, place: int) -> tuple[int, int]:
    """A number of as many bytes as it needs, seven bits in each, and the place behind it."""
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place

"""Tokenizers: train, load, save, encode fast; the work is done by the `tokenizers` library.

Five kinds: byte-level BPE ("bpe", as GPT-2 and RoBERTa), WordPiece ("wordpiece", as BERT), Unigram ("unigram", as T5,
ALBERT and SentencePiece), one token a character ("char") and one token a byte ("byte", as ByT5). What is saved is a
`tokenizer.json`, which Hugging Face opens. TensorFlow is imported only when the in-graph twin, `Tokenizer.graph`, is
asked for.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, overload

import tokenizers

from lmzoo.data import tokenizer_files, tokenizer_pairs, tokenizer_training
from lmzoo.files import write_whole

if TYPE_CHECKING:
    from lmzoo.data.graph_tokenizers import GraphTokenizer

ROLES = tuple(tokenizer_files.USUAL_TOKENS)


class Tokenizer:
    """Text to token ids and back.

    Make one with `Tokenizer.train` or `Tokenizer.from_pretrained`:

    ```python
    tokenizer = Tokenizer.train("book.txt", kind="bpe", vocab_size=4096)
    ids = tokenizer.encode("It was the best of times")
    tokenizer.save_pretrained("my-tokenizer")
    ```

    Args:
        backend: a tokenizer of the `tokenizers` library. Its truncation and padding are switched off: ids are those
            of the whole text.
        special_tokens: role (`"eos_token"`, ...) to token; a role that is left out goes to the special token with
            the usual name for it, if there is one, else to none.

    Raises:
        ValueError: a role is not one of `ROLES`.
    """

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str] | None = None):
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self._roles = _assign_roles(backend, special_tokens or {})

    # ---- making

    @classmethod
    def train(
        cls,
        source: tokenizer_training.Source,
        *,
        kind: str = "bpe",
        vocab_size: int | None = None,
        special_tokens: Sequence[str] | Mapping[str, str] | None = None,
        lowercase: bool = True,
        masked: bool = False,
        num_sentinels: int = 0,
    ) -> Self:
        """Trains a tokenizer. The same text gives the same tokenizer.

        Args:
            source: a UTF-8 text file, a list or tuple of such files, or any other iterable of texts. A list of
                strings means files: pass `iter(texts)` to train on the strings themselves.
            kind: "bpe" (byte-level, any text round-trips), "wordpiece", "unigram", "char", or "byte", which learns
                nothing and does not read the source.
            vocab_size: number of tokens, special ones included; fewer come out of a short text. None: 8192, and as
                many as there are characters for "char" or bytes for "byte".
            special_tokens: their ids are 0, 1, 2... in this order; or a dict from role to token. None:
                `<|endoftext|>` for "bpe", `<|endoftext|> <unk>` for "char", `[PAD] [UNK] [CLS] [SEP] [MASK]` for
                "wordpiece", `<pad> </s> <unk>` for "unigram" and "byte".
            lowercase: for "wordpiece" only: lower-case the text and strip its accents.
            masked: take the special tokens of encoders instead, and put them around texts: those of RoBERTa, `<s> <pad>
                </s> <unk> <mask>`, for "bpe" and "char", of ALBERT, `<pad> <unk> [CLS] [SEP] [MASK]`, for "unigram".
                WordPiece has them anyway.
            num_sentinels: how many `<extra_id_0>`, `<extra_id_1>`... there are to mark spans with, for "unigram" and
                "byte". They come last: in descending order for "unigram", as in T5, ascending for "byte", as in ByT5.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: an unknown kind or role, a file that is not UTF-8, a text without anything to learn from, or a
                vocabulary too small for the alphabet.

        Reference: Sennrich et al. 2016 (BPE), Wu et al. 2016 (WordPiece), Kudo 2018 (Unigram).
        """
        if isinstance(special_tokens, Mapping):
            _check_roles(special_tokens)
        backend, roles = tokenizer_training.train(
            source, kind, vocab_size, special_tokens, lowercase, masked, num_sentinels
        )
        return cls(backend, roles)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> Self:
        """Loads a tokenizer from a directory, or from one file of it.

        A directory is searched for `tokenizer.json`, then `vocab.json` with `merges.txt` (GPT-2), then `vocab.txt`
        (BERT), then `spiece.model` (SentencePiece's Unigram, as T5 and ALBERT). `tokenizer_config.json` beside them, if
        there, names the special tokens and, for the others than the first, says what they do not: `do_lower_case`
        (default true), `add_prefix_space` (default false), `extra_ids` (T5's number of sentinels, default 0).

        Raises:
            FileNotFoundError: the path or every known file is missing.
            ValueError: a file cannot be read as what it is named.
        """
        return cls(*tokenizer_files.load(Path(path)))

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json` for Hugging Face to open.

        Each file appears whole or not at all, `tokenizer.json` last.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if self._spec["post_processor"] and 1 in self._backend.encode("a", "b").type_ids:
            config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]  # Not so by default.
        pre_tokenizer = self._spec["pre_tokenizer"] or {}
        if "add_prefix_space" in pre_tokenizer:
            config["add_prefix_space"] = pre_tokenizer["add_prefix_space"]
        files = {
            "special_tokens_map.json": json.dumps(self.special_tokens, indent=2, ensure_ascii=False),
            "tokenizer_config.json": json.dumps(config | self.special_tokens, indent=2, ensure_ascii=False),
            "tokenizer.json": self._backend.to_str(pretty=True),
        }
        for name, text in files.items():
            write_whole(directory / name, text)

    # ---- using

    @overload
    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]: ...  # type: ignore[overload-overlap]
    @overload
    def encode(self, text: Iterable[str], add_special_tokens: bool = False) -> list[list[int]]: ...
    def encode(self, text: str | Iterable[str], add_special_tokens: bool = False) -> list[int] | list[list[int]]:
        """Turns a text into its token ids, or several texts, in parallel, into a list for each.

        Args:
            text: one text, or any iterable of texts. A lone surrogate, which no UTF-8 can carry, counts as U+FFFD. The
                literal of a special token inside a text becomes that token.
            add_special_tokens: add what the tokenizer puts around a text ([CLS] and [SEP] for BERT, `</s>` for T5).

        Raises:
            TypeError: a text is not a str.
        """
        if isinstance(text, str):
            return self.encode([text], add_special_tokens)[0]
        texts = list(text)
        for index, item in enumerate(texts):
            if not isinstance(item, str):
                raise TypeError(f"Text {index} is {type(item).__name__}, not str: decode bytes before encoding them.")
        try:
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        except TypeError:  # a lone surrogate: rare, so looked for only after the failure
            texts = [tokenizer_training.without_surrogates(item) for item in texts]
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    def encode_pairs(
        self, first: Iterable[str], second: Iterable[str] | None = None, *, max_length: int | None = None
    ) -> tokenizer_pairs.Encodings:
        """Encodes texts, or pairs of texts, as an encoder reads them: special tokens around, token types, offsets.

        ```python
        encodings = tokenizer.encode_pairs(["Who wrote it?"], ["A book by Jane Austen."], max_length=128)
        encodings.token_ids, encodings.token_type_ids, encodings.offsets
        ```

        Args:
            first: the texts.
            second: the text that belongs to each of them; None for single texts.
            max_length: tokens, special ones included. What is longer is cut at its end, the longer text of a pair
                first, until both are equally long. None cuts nothing.

        Raises:
            ValueError: `first` and `second` differ in number, or `max_length` leaves no room for the special tokens.
        """
        return tokenizer_pairs.encode_pairs(self._backend, self._untrimmed, first, second, max_length)

    def encode_windows(
        self, first: Iterable[str], second: Iterable[str], *, max_length: int, stride: int
    ) -> tokenizer_pairs.Windows:
        """Encodes pairs of texts as `encode_pairs` does, the second one through windows if it is long.

        Args:
            first: the texts that stand in every window, cut to half of it.
            second: the text that belongs to each of them.
            max_length: tokens of a window, the first text and special tokens included.
            stride: tokens of the second text that two windows in a row have in common.

        Raises:
            ValueError: `first` and `second` differ in number, or `stride` is half of a window or more.
        """
        return tokenizer_pairs.encode_windows(self._backend, self._untrimmed, first, second, max_length, stride)

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str | list[str]:
        """Turns token ids into text: a flat sequence gives a str, a nested one, row by row, a list of str.

        Args:
            ids: a list, a NumPy array, a tensor or a ragged tensor of ids.
            skip_special_tokens: leave special tokens out of the text.

        Raises:
            ValueError: an id is outside [0, vocab_size).
        """
        rank = len(getattr(ids, "shape", ()))
        ids = _as_lists(ids)
        nested = rank == 2 or (bool(ids) and isinstance(ids[0], list))
        rows = ids if nested else [ids]
        for row in rows:
            for bound in (min(row, default=0), max(row, default=0)):
                if not 0 <= bound < self.vocab_size:
                    raise ValueError(f"Token id {bound} is outside the vocabulary, [0, {self.vocab_size}).")
        texts = self._backend.decode_batch(rows, skip_special_tokens=skip_special_tokens)
        return texts if nested else texts[0]

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, None if the vocabulary has no such token."""
        return self._backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The token with this id, as the vocabulary writes it, None if there is none."""
        return self._backend.id_to_token(token_id) if token_id >= 0 else None

    # ---- facts

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the highest id: the rows an embedding needs."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @functools.cached_property
    def kind(self) -> str:
        """One of the five, or the name of the model, in lower case, if it is none."""
        model, pre_tokenizer = self._spec["model"], self._spec["pre_tokenizer"]
        if model["type"] == "BPE" and not model["merges"]:
            if pre_tokenizer is None:
                return "char"
            if pre_tokenizer["type"] == "ByteLevel" and not pre_tokenizer["use_regex"]:
                return "byte"
        return model["type"].lower()

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the canonical `tokenizer.json`: equal for equal tokenizers, however it is laid out."""
        canonical = json.dumps(self._spec, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @functools.cached_property
    def graph(self) -> GraphTokenizer:
        """The in-graph twin: `encode` and `decode` as TensorFlow graphs, for export. See `graph_tokenizers`.

        Raises:
            ValueError: there is no twin for this kind of tokenizer.
        """
        from lmzoo.data.graph_tokenizers import make_graph_tokenizer

        return make_graph_tokenizer(self._backend)

    @property
    def special_tokens(self) -> dict[str, str]:
        """Role to token, for the roles that are taken."""
        return {role: token for role, token in self._roles.items() if token is not None}

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text, None if there is none."""
        return self._role_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a text, None if there is none."""
        return self._role_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """Id of the padding token, None if there is none."""
        return self._role_id("pad_token")

    @property
    def unk_token_id(self) -> int | None:
        """Id of the token that stands for unknown text, None if there is none."""
        return self._role_id("unk_token")

    @property
    def cls_token_id(self) -> int | None:
        """Id of the token in front of a classified text, None if there is none."""
        return self._role_id("cls_token")

    @property
    def sep_token_id(self) -> int | None:
        """Id of the token after each of two texts, None if there is none."""
        return self._role_id("sep_token")

    @property
    def mask_token_id(self) -> int | None:
        """Id of the token that hides a masked one, None if there is none."""
        return self._role_id("mask_token")

    def __repr__(self) -> str:
        return f"Tokenizer(kind={self.kind!r}, vocab_size={self.vocab_size}, special_tokens={self.special_tokens})"

    def __reduce__(self) -> tuple[Any, ...]:  # worker processes get the tokenizer, not the graph that hangs off it
        return _unpickle, (self._backend.to_str(), self.special_tokens)

    @functools.cached_property
    def _spec(self) -> dict[str, Any]:
        return json.loads(self._backend.to_str())

    @functools.cached_property
    def _untrimmed(self) -> tokenizers.Tokenizer:
        """A tokenizer whose offsets the post-processor has not trimmed yet, which a second time would be too much."""
        post_processor = self._spec["post_processor"] or {}
        if not any(part.get("trim_offsets") for part in post_processor.get("processors", [post_processor])):
            return self._backend
        return tokenizers.Tokenizer.from_str(json.dumps(self._spec | {"post_processor": None}))

    def _role_id(self, role: str) -> int | None:
        token = self._roles[role]
        return None if token is None else self._backend.token_to_id(token)


def _unpickle(serialized: str, roles: dict[str, str]) -> Tokenizer:
    return Tokenizer(tokenizers.Tokenizer.from_str(serialized), roles)


def _check_roles(roles: Iterable[str]) -> None:
    unknown = sorted(set(roles) - set(ROLES))
    if unknown:
        raise ValueError(f"Unknown special-token role {unknown}: the roles are {', '.join(ROLES)}.")


def _assign_roles(backend: tokenizers.Tokenizer, given: Mapping[str, str]) -> dict[str, str | None]:
    """Role to token: as given; else by the usual names among the special tokens; else None."""
    _check_roles(given)
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    roles: dict[str, str | None] = {}
    for role in ROLES:
        candidates = (
            (given[role],) if role in given else tuple(t for t in tokenizer_files.USUAL_TOKENS[role] if t in special)
        )
        roles[role] = next((token for token in candidates if backend.token_to_id(token) is not None), None)
    return roles


def _as_lists(ids: Any) -> list[Any]:
    for method in ("to_list", "tolist"):  # a ragged tensor; a NumPy array
        if hasattr(ids, method):
            return getattr(ids, method)()
    if hasattr(ids, "numpy"):
        return ids.numpy().tolist()
    return [_as_lists(item) if hasattr(item, "__len__") else int(item) for item in ids]

"""Reading the files of a tokenizer: Hugging Face's, GPT-2's, BERT's and SentencePiece's."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from lmzoo.data.tokenizer_sentencepiece import load_sentencepiece
from lmzoo.data.tokenizer_training import SPECIAL_TOKENS, bert_template

# The roles of special tokens, and which token plays each when no configuration says so: the names that the published
# models use.
USUAL_TOKENS = {
    "bos_token": ("<s>", "<|endoftext|>"),
    "eos_token": ("</s>", "<|endoftext|>"),
    "pad_token": ("<pad>", "[PAD]"),
    "unk_token": ("<unk>", "[UNK]"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "mask_token": ("[MASK]", "<mask>"),
}
_SENTENCEPIECE_FILES = ("spiece.model", "sentencepiece.model", "tokenizer.model")
# GPT-2's own release calls the same two files encoder.json and vocab.bpe.
_BPE_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))

Loaded = tuple[tokenizers.Tokenizer, dict[str, str]]


def load(path: Path) -> Loaded:
    """Loads a tokenizer of the library, and the roles of special tokens that its configuration names.

    See `Tokenizer.from_pretrained`.
    """
    if path.is_dir():
        file = _find_vocabulary(path)
    elif path.is_file():
        file = path
    else:
        raise FileNotFoundError(f"No tokenizer at {path}: no such file or directory.")
    config = _read_config(file.parent)
    if any(file.name in pair for pair in _BPE_FILES):
        return _load_gpt2(file, config)
    if file.suffix == ".model":
        return load_sentencepiece(file, config), _configured_roles(config)
    if file.suffix == ".txt":
        return _load_bert(file, config)
    try:
        backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"Cannot read {file} as a tokenizer.json: {error}") from error
    return backend, _configured_roles(config)


def _load_gpt2(file: Path, config: dict[str, Any]) -> Loaded:
    names = next(pair for pair in _BPE_FILES if file.name in pair)
    vocabulary, merges = (file.with_name(name) for name in names)
    for needed in (vocabulary, merges):
        if not needed.is_file():
            raise FileNotFoundError(f"{file.name} needs {needed.name} beside it: {needed} is missing.")
    try:
        model = models.BPE.from_file(str(vocabulary), str(merges))
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"Cannot read {vocabulary} and {merges} as BPE files: {error}") from error
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return _with_special_tokens(backend, config, SPECIAL_TOKENS["bpe"])


def _load_bert(file: Path, config: dict[str, Any]) -> Loaded:
    roles = _configured_roles(config)
    unknown, classify, separate = (
        roles.get(role, usual)
        for role, usual in (("unk_token", "[UNK]"), ("cls_token", "[CLS]"), ("sep_token", "[SEP]"))
    )
    try:
        model = models.WordPiece.from_file(str(file), unk_token=unknown)
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"Cannot read {file} as a WordPiece vocabulary: {error}") from error
    backend = tokenizers.Tokenizer(model)
    missing = [token for token in (unknown, classify, separate) if backend.token_to_id(token) is None]
    if missing:
        raise ValueError(f"{file} is not a BERT vocabulary: it lacks {', '.join(missing)}.")
    backend.normalizer = normalizers.BertNormalizer(
        lowercase=config.get("do_lower_case", True),
        strip_accents=config.get("strip_accents"),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.post_processor = bert_template(backend, classify, separate)
    return _with_special_tokens(backend, config, SPECIAL_TOKENS["wordpiece"])


def _with_special_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any], usual: Iterable[str]) -> Loaded:
    """Makes special the usual and the configured tokens that the vocabulary has; adds none to it."""
    roles = _configured_roles(config)
    known = [token for token in dict.fromkeys((*usual, *roles.values())) if backend.token_to_id(token) is not None]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in known])
    return backend, roles


def _find_vocabulary(directory: Path) -> Path:
    names = ["tokenizer.json", *(vocabulary for vocabulary, _ in _BPE_FILES), "vocab.txt"]
    names += _SENTENCEPIECE_FILES
    for name in names:
        if (directory / name).is_file():
            return directory / name
    raise FileNotFoundError(f"No tokenizer in {directory}: it holds none of {', '.join(names)}.")


def _read_config(directory: Path) -> dict[str, Any]:
    """`special_tokens_map.json` with `tokenizer_config.json` on top; either may be missing."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = directory / name
        if not file.is_file():
            continue
        try:
            config |= dict(json.loads(file.read_text(encoding="utf-8")).items())
        except (ValueError, AttributeError) as error:
            raise ValueError(f"Cannot read {file} as a JSON object: {error}") from error
    return config


def _configured_roles(config: dict[str, Any]) -> dict[str, str]:
    """Role to token from a Hugging Face configuration, where a token is a string or an object with its content."""
    values = {role: config[role] for role in USUAL_TOKENS if config.get(role) is not None}
    return {role: value["content"] if isinstance(value, dict) else value for role, value in values.items()}

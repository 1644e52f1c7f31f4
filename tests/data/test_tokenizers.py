import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizer_texts import TEXTS, gpt2_directory, sentencepiece_file, training_text
from tokenizers import models

from lmzoo.data.masking import TokenFacts
from lmzoo.data.tokenizers import Tokenizer

KINDS = ("bpe", "wordpiece", "unigram", "char")  # those that are learned
VOCAB_SIZES = {"bpe": 1000, "wordpiece": 1000, "unigram": 1000, "char": None}


@pytest.fixture(scope="module")
def trained() -> dict[str, Tokenizer]:
    return {kind: train(kind) for kind in KINDS}


def train(kind: str) -> Tokenizer:
    return Tokenizer.train(iter([training_text()]), kind=kind, vocab_size=VOCAB_SIZES[kind])


# ---- training


@pytest.mark.parametrize("kind", KINDS)
def test_training_keeps_to_the_vocabulary_and_round_trips(trained, kind):
    tokenizer = trained[kind]
    text = "The for statement is used to iterate over the elements of a sequence."
    assert tokenizer.kind == kind
    assert tokenizer.vocab_size == (VOCAB_SIZES[kind] or len(set(training_text())) + 2)
    assert tokenizer.decode(tokenizer.encode(text)) == (text.lower() if kind == "wordpiece" else text)
    fewer = 1 if kind == "char" else 0.5
    assert len(tokenizer.encode(text)) <= fewer * len(text)


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_repeatable(trained, kind):
    assert train(kind).fingerprint == trained[kind].fingerprint


def test_byte_level_bpe_and_characters_keep_every_byte(trained):
    for text in TEXTS:
        assert trained["bpe"].decode(trained["bpe"].encode(text)) == text.replace("<|endoftext|>", "")
    known = "".join(c for c in training_text()[:5000])
    assert trained["char"].decode(trained["char"].encode(known)) == known


def test_files_and_texts_train_the_same(tmp_path):
    blank_lines = "a\n\n\nb\r\n" * 50
    first, second = training_text()[:60_000] + "\n", training_text()[60_000:90_000] + "\n" + blank_lines
    for name, text in (("first.txt", first), ("second.txt", second)):
        (tmp_path / name).write_bytes(text.encode())
    files = [tmp_path / "first.txt", str(tmp_path / "second.txt")]
    from_files = Tokenizer.train(files, vocab_size=700)
    assert from_files.fingerprint == Tokenizer.train(iter([first, second]), vocab_size=700).fingerprint
    assert from_files.token_to_id("ĊĊ") is not None, "runs of line ends were cut apart"
    assert "\r" in Tokenizer.train(files[1], kind="char")._backend.get_vocab(), "line ends were translated"


def test_wordpiece_keeps_case_if_told():
    cased = Tokenizer.train(iter(["Hello World, hello world"]), kind="wordpiece", vocab_size=60, lowercase=False)
    assert cased.decode(cased.encode("Hello hello")) == "Hello hello"


def test_special_tokens_have_ids_by_kind(trained):
    ids = {
        kind: {
            role: getattr(trained[kind], f"{role}_token_id")
            for role in ("bos", "eos", "pad", "unk", "cls", "sep", "mask")
        }
        for kind in KINDS
    }
    none = dict.fromkeys(ids["bpe"])
    assert ids["bpe"] == none | {"bos": 0, "eos": 0}
    assert ids["char"] == none | {"bos": 0, "eos": 0, "unk": 1}
    assert ids["unigram"] == none | {"pad": 0, "eos": 1, "unk": 2}
    assert ids["wordpiece"] == none | {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}


def test_special_tokens_can_be_named_by_role():
    roles = {"pad_token": "<blank>", "eos_token": "<end>"}
    tokenizer = Tokenizer.train(iter(["some text"]), vocab_size=300, special_tokens=roles)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 1, None)
    assert tokenizer.special_tokens == roles
    words = ["[UNK]", "[CLS]", "[SEP]", "<extra>"]
    tokenizer = Tokenizer.train(iter(["some text"]), kind="wordpiece", vocab_size=60, special_tokens=words)
    assert [tokenizer.token_to_id(word) for word in words] == [0, 1, 2, 3]
    assert tokenizer.encode("some text", add_special_tokens=True)[:: len(tokenizer.encode("some text")) + 1] == [1, 2]


@pytest.mark.parametrize(
    ("kind", "tokens", "single", "pair"),
    [
        ("bpe", "<s> <pad> </s> <unk> <mask>", "<s> A </s>", "<s> A </s> </s> B </s>"),
        ("char", "<s> <pad> </s> <unk> <mask>", "<s> A </s>", "<s> A </s> </s> B </s>"),
        ("wordpiece", "[PAD] [UNK] [CLS] [SEP] [MASK]", "[CLS] A [SEP]", "[CLS] A [SEP] B [SEP]"),
        ("unigram", "<pad> <unk> [CLS] [SEP] [MASK]", "[CLS] A [SEP]", "[CLS] A [SEP] B [SEP]"),
    ],
)
def test_tokens_of_encoders(kind, tokens, single, pair):
    size = None if kind == "char" else 700
    tokenizer = Tokenizer.train(iter([training_text()]), kind=kind, vocab_size=size, masked=True)
    assert [tokenizer.id_to_token(index) for index in range(5)] == tokens.split()
    facts = TokenFacts.of(tokenizer)
    assert [tokenizer.id_to_token(i) for i in (facts.cls_token_id, facts.sep_token_id)] == single.split()[::2]
    assert facts.is_special.sum() == 5
    a, b = tokenizer.encode("in"), tokenizer.encode("the")
    for frame, texts in ((single, (["in"],)), (pair, (["in"], ["the"]))):
        expected = [
            index for part in frame.split() for index in {"A": a, "B": b}.get(part, [tokenizer.token_to_id(part)])
        ]
        assert tokenizer.encode_pairs(*texts).token_ids == [expected]


def test_the_space_before_a_mask_goes_with_it():
    for kind in ("bpe", "unigram"):
        tokenizer = Tokenizer.train(iter([training_text()]), kind=kind, vocab_size=700, masked=True)
        mask = tokenizer.special_tokens["mask_token"]
        assert tokenizer.encode(f"in {mask}") == [*tokenizer.encode("in"), tokenizer.mask_token_id]


def test_sentinels_come_last():
    tokenizer = Tokenizer.train(iter([training_text()]), kind="unigram", vocab_size=700, num_sentinels=20)
    assert tokenizer.vocab_size == 700
    assert [tokenizer.token_to_id(f"<extra_id_{number}>") for number in range(20)] == list(range(699, 679, -1))
    assert tokenizer.encode("<extra_id_3>", add_special_tokens=True) == [696, 1]
    assert tokenizer.decode(tokenizer.encode("in<extra_id_0>the")) == "in the"


def test_bytes_are_those_of_byt5(tmp_path):
    tokenizer = Tokenizer.train("", kind="byte", num_sentinels=125)
    assert (tokenizer.kind, tokenizer.vocab_size) == ("byte", 384)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.encode("aé", add_special_tokens=True) == [100, 198, 172, 1]
    assert [tokenizer.token_to_id(f"<extra_id_{number}>") for number in (0, 124)] == [259, 383]
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in TEXTS)
    tokenizer.save_pretrained(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path).kind == "byte"


@pytest.mark.parametrize("kind", KINDS)
def test_the_literal_of_a_special_token_is_that_token(trained, kind):
    tokenizer = trained[kind]
    token, token_id = next((t, tokenizer.token_to_id(t)) for t in tokenizer.special_tokens.values())
    ids = tokenizer.encode(f"in {token} out")
    assert ids.count(token_id) == 1
    assert token not in tokenizer.decode(ids)
    assert token in tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("some text", {"kind": "bytes"}, "kind='bytes'.* bpe, wordpiece, unigram, char, byte"),
        ("some text", {"masked": True, "special_tokens": ["<s>"]}, "masked=True chooses the special tokens"),
        ("some text", {"masked": True, "kind": "byte"}, "kind='byte'.* leaves nothing to choose"),
        ("some text", {"num_sentinels": 3}, "num_sentinels=3: kinds unigram and byte have sentinels, bpe has none"),
        ("some text", {"kind": "byte", "special_tokens": ["<s>"]}, "those of kind 'byte' are <pad> </s> <unk>"),
        ("some text", {"kind": "byte", "vocab_size": 300}, "vocab_size=300: .* are 259"),
        ("some text", {"vocab_size": 256}, "vocab_size=256 is too small.* 257"),
        ("some text", {"vocab_size": 0}, "vocab_size=0"),
        ("some text", {"kind": "char", "vocab_size": 8}, "vocab_size=8 is too small.* 9"),
        ("some text", {"kind": "wordpiece", "vocab_size": 10}, "vocab_size=10 is too small"),
        ("some text", {"kind": "unigram", "vocab_size": 8}, "vocab_size=8 is too small"),
        ("some text", {"kind": "wordpiece", "special_tokens": ["[PAD]"]}, r"needs an unk_token; add '\[UNK\]'"),
        ("some text", {"kind": "unigram", "special_tokens": ["</s>"]}, "needs an unk_token; add '<unk>'"),
        ("some text", {"special_tokens": {"end": "<end>"}}, r"role \['end'\].* eos_token"),
        ("some text", {"special_tokens": "<end>"}, "give a list"),
        *(("", {"kind": kind}, "training text is empty") for kind in KINDS),
        (" \n\t", {}, "training text is empty"),
    ],
)
def test_training_errors_say_what_to_do(text, options, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer.train(iter([text]), **options)


def test_training_sources_are_checked(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"'once upon a time'.*iter\(strings\)"):
        Tokenizer.train(["once upon a time"])
    with pytest.raises(TypeError, match="text 1 is bytes"):
        Tokenizer.train(iter(["some text", b"bytes"]))
    (tmp_path / "binary").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(ValueError, match="binary is not UTF-8"):
        Tokenizer.train(tmp_path / "binary")


# ---- encoding and decoding


def test_batches_are_encoded_as_single_texts_are(trained):
    for tokenizer in trained.values():
        assert tokenizer.encode(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
        assert tokenizer.encode(iter(TEXTS), add_special_tokens=True)[0] == tokenizer.encode(TEXTS[0], True)
        assert tokenizer.encode([]) == []


def test_special_tokens_are_added_on_request(trained):
    assert trained["wordpiece"].encode("a", add_special_tokens=True)[::2] == [2, 3]
    assert trained["unigram"].encode("a", add_special_tokens=True)[-1] == 1
    assert trained["bpe"].encode("a", add_special_tokens=True) == trained["bpe"].encode("a")


def test_unknown_characters_become_the_unknown_token(trained):
    assert trained["char"].encode("a\U0001f600b")[1] == trained["char"].unk_token_id


def test_lone_surrogates_count_as_replacement_characters(trained):
    for tokenizer in trained.values():
        assert tokenizer.encode(["a", "b\ud800c"]) == tokenizer.encode(["a", "b\ufffdc"])
    assert trained["bpe"].encode("\ud83d\ude00") == trained["bpe"].encode("\U0001f600")
    Tokenizer.train(iter(["some\ud800 text"]), vocab_size=300)


def test_texts_must_be_strings(trained):
    with pytest.raises(TypeError, match="Text 1 is bytes"):
        trained["bpe"].encode(["a", b"b"])


def test_decode_takes_whatever_holds_ids(trained):
    import tensorflow as tf

    tokenizer = trained["bpe"]
    ids = tokenizer.encode(["in the list", "if it is a set"])
    width = min(map(len, ids))
    dense = np.array([row[:width] for row in ids])
    expected = [tokenizer.decode(row[:width]) for row in ids]
    for form in (dense, dense.tolist(), list(dense), tf.constant(dense), tf.RaggedTensor.from_tensor(dense)):
        assert tokenizer.decode(form) == expected
    assert tokenizer.decode(dense[0]) == tokenizer.decode(tf.constant(dense[0])) == expected[0]
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([[], ids[0]]) == ["", "in the list"]
    assert tokenizer.decode(np.zeros((0, 3), np.int32)) == []


@pytest.mark.parametrize("token_id", [-1, 1000])
def test_decode_names_an_id_out_of_range(trained, token_id):
    with pytest.raises(ValueError, match=rf"{token_id} is outside the vocabulary, \[0, 1000\)"):
        trained["bpe"].decode([[3], [5, token_id, 7]])


def test_tokens_and_ids_look_each_other_up(trained):
    tokenizer = trained["bpe"]
    assert tokenizer.id_to_token(tokenizer.token_to_id("Ġthe")) == "Ġthe"
    assert tokenizer.token_to_id("no such token") is None
    assert tokenizer.id_to_token(-1) is None
    assert tokenizer.id_to_token(1000) is None


def test_workers_get_the_tokenizer_and_not_its_graph(trained):
    tokenizer = trained["bpe"]
    assert tokenizer.graph is tokenizer.graph
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint
    assert copy.special_tokens == tokenizer.special_tokens
    assert "graph" not in vars(copy)


def test_importing_does_not_import_tensorflow():
    code = (
        "import sys, lmzoo.data.tokenizers as t; t.Tokenizer.train(iter(['ab'])); sys.exit('tensorflow' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- files


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(trained, kind, tmp_path):
    tokenizer = trained[kind]
    tokenizer.save_pretrained(tmp_path / "deep" / "er")
    assert sorted(file.name for file in (tmp_path / "deep" / "er").iterdir()) == [
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for path in (tmp_path / "deep" / "er", tmp_path / "deep" / "er" / "tokenizer.json"):
        loaded = Tokenizer.from_pretrained(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.special_tokens == tokenizer.special_tokens
        assert loaded.encode(TEXTS) == tokenizer.encode(TEXTS)


def test_fingerprints_tell_tokenizers_apart(trained):
    assert len({tokenizer.fingerprint for tokenizer in trained.values()}) == len(KINDS)
    assert train("bpe").fingerprint == trained["bpe"].fingerprint


def test_a_full_disk_leaves_the_old_tokenizer_whole(trained, tmp_path, monkeypatch):
    trained["bpe"].save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail_half_way(descriptor):
        os.ftruncate(descriptor, 10)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail_half_way)
    with pytest.raises(OSError, match="No space left"):
        trained["char"].save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def write_gpt2_files(tokenizer: Tokenizer, directory: Path) -> None:
    model = json.loads(tokenizer._backend.to_str())["model"]
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]))


def test_gpt2_files(trained, tmp_path):
    write_gpt2_files(trained["bpe"], tmp_path)
    for path in (tmp_path, tmp_path / "vocab.json", tmp_path / "merges.txt"):
        loaded = Tokenizer.from_pretrained(path)
        assert loaded.encode(TEXTS) == trained["bpe"].encode(TEXTS)
        assert loaded.special_tokens == {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    (tmp_path / "tokenizer_config.json").write_text('{"add_prefix_space": true, "pad_token": {"content": "a"}}')
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert loaded.encode("the") == trained["bpe"].encode(" the")
    assert loaded.pad_token_id == trained["bpe"].token_to_id("a")


def test_bert_vocabulary(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##aff", "##able", "Un", "e", "é", ",", "中"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    lower = Tokenizer.from_pretrained(tmp_path)
    assert lower.kind == "wordpiece"
    assert lower.encode("Unaffable, É中 zebra [MASK]", add_special_tokens=True) == [2, 5, 6, 7, 11, 9, 12, 1, 4, 3]
    assert lower.decode([5, 6, 7, 11, 9]) == "unaffable, e"
    assert (lower.pad_token_id, lower.mask_token_id) == (0, 4)
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert Tokenizer.from_pretrained(tmp_path / "vocab.txt").encode("Unaffable é") == [8, 6, 7, 10]


def test_truncation_and_padding_of_a_file_are_off(trained, tmp_path):
    backend = tokenizers.Tokenizer.from_str(trained["bpe"]._backend.to_str())
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_pretrained(tmp_path).encode(TEXTS) == trained["bpe"].encode(TEXTS)


def test_vocab_size_counts_to_the_highest_id():
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 9}, merges=[]))
    assert Tokenizer(backend).vocab_size == 10


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such file"):
        Tokenizer.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(
        FileNotFoundError, match=r"tokenizer\.json, vocab\.json, encoder\.json, vocab\.txt, spiece\.model"
    ):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"vocab\.json needs merges\.txt"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": '{"version": "1.0", "model": {"type": "BP'}, r"tokenizer\.json as a tokenizer\.json"),
        ({"tokenizer.json": "{}"}, r"tokenizer\.json as a tokenizer\.json"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a b\n"}, r"vocab\.json and .*merges\.txt as BPE files.*`b`"),
        ({"vocab.json": '{"a": ', "merges.txt": ""}, r"vocab\.json and .*merges\.txt as BPE files"),
        ({"vocab.txt": "a\nb\n"}, r"not a BERT vocabulary: it lacks \[UNK\], \[CLS\], \[SEP\]"),
        ({"vocab.txt": "a", "tokenizer_config.json": "[1]"}, r"tokenizer_config\.json as a JSON object"),
        ({"vocab.txt": "a", "tokenizer_config.json": "{"}, r"tokenizer_config\.json as a JSON object"),
    ],
)
def test_broken_files_are_named(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(tmp_path)


def test_a_binary_tokenizer_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\x00")
    with pytest.raises(ValueError, match=r"tokenizer\.json as a tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)


# ---- SentencePiece


def field(number: int, value: bytes | int | float) -> bytes:
    """A field of a protocol buffer's message, small enough for lengths of at most two bytes."""
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)
    size = value if isinstance(value, int) else len(value)
    tag = (number << 3 | (0 if isinstance(value, int) else 2)).to_bytes(1, "little") if number < 16 else b""
    tag = tag or bytes([(number << 3) & 0x7F | 0x80, number >> 4])
    length = bytes([size]) if size < 0x80 else bytes([size & 0x7F | 0x80, size >> 7])
    return tag + length + (b"" if isinstance(value, int) else value)


def sentencepiece(pieces: list[tuple[str, float, int]], trainer: bytes = b"", rules: bytes = b"") -> bytes:
    entries = (field(1, piece.encode()) + field(2, score) + field(3, kind) for piece, score, kind in pieces)
    return b"".join(field(1, entry) for entry in entries) + field(2, trainer) + field(3, rules)


T5_PIECES = [
    *(("<pad>", 0.0, 3), ("</s>", 0.0, 3), ("<unk>", 0.0, 2), ("▁", -2.0, 1), ("▁in", -1.5, 1), ("n", -3.0, 1)),
    *(("é", -4.0, 1), ("<user>", 0.0, 4)),
]


def test_sentencepiece_files_of_t5(tmp_path):
    (tmp_path / "spiece.model").write_bytes(sentencepiece(T5_PIECES))
    (tmp_path / "tokenizer_config.json").write_text('{"extra_ids": 3}')
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert (tokenizer.kind, tokenizer.vocab_size) == ("unigram", 11)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert [tokenizer.token_to_id(f"<extra_id_{number}>") for number in range(3)] == [10, 9, 8]
    assert tokenizer.encode("  in  né<user>xy<extra_id_0>", add_special_tokens=True) == [4, 3, 5, 6, 7, 3, 2, 10, 1]
    assert tokenizer.decode([4, 3, 5, 6, 1]) == "in né"
    pairs = tokenizer.encode_pairs(["in"], ["né"])
    assert pairs.token_ids == tokenizer.graph.encode_pairs(["in"], ["né"]).token_ids.to_list() == [[4, 1, 3, 5, 6, 1]]


def test_sentencepiece_files_of_albert(tmp_path):
    names = ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")
    pieces = [(name, 0.0, kind) for name, kind in zip(names, (3, 2, 3, 3, 3), strict=True)]
    pieces += [("▁in", -1.0, 1), ("e", -2.0, 1), ('"', -2.0, 1), ("▁", -2.0, 1), ("E", -2.0, 1), ("é", -2.0, 1)]
    (tmp_path / "spiece.model").write_bytes(sentencepiece(pieces))
    tokenizer = Tokenizer.from_pretrained(tmp_path / "spiece.model")
    assert tokenizer.encode("In``é [MASK]", add_special_tokens=True) == [2, 5, 7, 6, 4, 3]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false, "keep_accents": true}')
    assert Tokenizer.from_pretrained(tmp_path).encode("Eé") == [8, 9, 10]


def test_sentencepiece_files_with_bytes_and_settings_of_their_own(tmp_path):
    bytes_ = [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    trainer, rules = field(3, 1) + field(35, 1), field(3, 0) + field(4, 0)  # no space in front, and spaces as they are
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece([*T5_PIECES, *bytes_], trainer, rules))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode("n  ☃") == [5, 3, 3, *(8 + byte for byte in "☃".encode())]
    assert tokenizer.decode(tokenizer.encode("n  ☃")) == "n  ☃"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x0a\xff", r"spiece\.model as a SentencePiece model: IndexError"),
        (b"\x0a\x05ab", r"spiece\.model as a SentencePiece model"),
        (sentencepiece(T5_PIECES)[:40], r"spiece\.model as a SentencePiece model: IndexError"),
        (sentencepiece(T5_PIECES, field(3, 2)), "type 2; only 1, Unigram"),
        (sentencepiece([("a", -1.0, 1)]), "none of its 1 pieces is the unknown one"),
        (b"", "none of its 0 pieces"),
    ],
)
def test_broken_sentencepiece_files_are_named(tmp_path, content, message):
    (tmp_path / "spiece.model").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.slow
def test_a_published_sentencepiece_file(tmp_path):
    tokenizer = Tokenizer.from_pretrained(sentencepiece_file(tmp_path))
    assert tokenizer.vocab_size == 26
    assert [tokenizer.id_to_token(index) for index in range(4)] == ["<pad>", "</s>", "<unk>", "▁"]
    assert tokenizer.encode("ａ\u3000e\u200b") == tokenizer.encode("a e")


# ---- published vocabularies and the reference implementation


@pytest.mark.slow
def test_gpt2_ids_are_the_published_ones(tmp_path):
    tokenizer = Tokenizer.from_pretrained(gpt2_directory(tmp_path))
    assert tokenizer.vocab_size == 50257
    assert tokenizer.eos_token_id == 50256
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.encode(" Hello world<|endoftext|>") == [18435, 995, 50256]
    assert tokenizer.decode([464, 3290, 318, 13779]) == "The dog is cute"


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", [None, "gpt2"])
def test_transformers_opens_what_is_saved(trained, kind, model_type, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = trained[kind]
    tokenizer.save_pretrained(tmp_path)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == tokenizer.vocab_size
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    for text in TEXTS:
        for add in (False, True):
            ids = tokenizer.encode(text, add_special_tokens=add)
            assert theirs(text, add_special_tokens=add)["input_ids"] == ids
            assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


@pytest.mark.parity
@pytest.mark.parametrize("options", [{"kind": "bpe", "masked": True}, {"kind": "unigram", "masked": True}])
def test_transformers_opens_tokenizers_of_encoders(options, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.train(iter([training_text()]), vocab_size=700, **options)
    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.mask_token_id == tokenizer.mask_token_id
    for text in (*TEXTS, f"in {theirs.mask_token}."):
        ours = tokenizer.encode_pairs([text], ["the  end"])
        pair = theirs(text, "the  end", return_offsets_mapping=True)
        assert (pair["input_ids"], pair["offset_mapping"]) == (ours.token_ids[0], ours.offsets[0])


@pytest.mark.parity
def test_transformers_opens_sentinels_and_bytes(tmp_path):
    transformers = pytest.importorskip("transformers")
    for kind in ("unigram", "byte"):
        size = 700 if kind == "unigram" else None
        tokenizer = Tokenizer.train(iter([training_text()]), kind=kind, vocab_size=size, num_sentinels=125)
        tokenizer.save_pretrained(tmp_path)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for text in (*TEXTS, "in <extra_id_0> the <extra_id_124>."):
            ids = tokenizer.encode(text, add_special_tokens=True)
            assert theirs(text)["input_ids"] == ids
            assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
    byt5 = transformers.ByT5Tokenizer()
    text = "in é <extra_id_0><extra_id_7>"
    assert byt5(text)["input_ids"] == tokenizer.encode(text, add_special_tokens=True)


@pytest.mark.parity
@pytest.mark.parametrize("options", [{}, {"byte_fallback": True}, {"control_symbols": "[CLS],[SEP]", "unk_id": 1}])
def test_sentencepiece_gives_the_same_ids(options, tmp_path):
    """But for ties, which it breaks in single precision: so no rows of one character over and over."""
    sentencepiece_library = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text(training_text(), encoding="utf-8")
    options = {"bos_id": -1, "eos_id": -1, "pad_id": 0} | options if "unk_id" in options else options
    sentencepiece_library.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "spiece"),
        vocab_size=1000,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    theirs = sentencepiece_library.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    ours = Tokenizer.from_pretrained(tmp_path)
    texts = [line for line in training_text().split("\n") if line.strip(" *-+'|")][:1500]
    texts = [text for text in texts if "---" not in text and "***" not in text]
    texts += ["", " ", "ﬁ ½\u3000x", "naïve café 中文 \U0001f600"]
    if "unk_id" in options:  # those of ALBERT, which changes the text before
        texts = [text.lower() for text in texts if "``" not in text and "''" not in text and text.isascii()]
    assert ours.encode(texts) == theirs.encode(texts)


@pytest.mark.parity
def test_gpt2_and_bert_files_give_the_ids_of_transformers(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    write_gpt2_files(trained["bpe"], tmp_path)
    theirs = transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    assert [theirs(text)["input_ids"] for text in TEXTS] == Tokenizer.from_pretrained(tmp_path).encode(TEXTS, True)
    vocabulary = json.loads(trained["wordpiece"]._backend.to_str())["model"]["vocab"]
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.get)), encoding="utf-8")
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path / "bert")
    ours = Tokenizer.from_pretrained(tmp_path / "bert")
    assert [theirs(text)["input_ids"] for text in TEXTS] == ours.encode(TEXTS, True)

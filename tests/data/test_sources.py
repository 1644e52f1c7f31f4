import bz2
import gzip
import json
import lzma
import subprocess
import sys
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmzoo.data import sources
from lmzoo.data.python_help import module_help
from lmzoo.data.sources import DOCUMENT_LENGTH, open_sources, read_documents


def read(*arguments, **settings):
    return list(read_documents(*arguments, **settings))


def write_json(path, *records):
    path.write_text("\n".join(json.dumps(record) for record in records))


def test_text_files(tmp_path):
    (tmp_path / "b.txt").write_text("second\n")
    (tmp_path / "a.txt").write_text("first, ünïcödé 🎉\n")
    (tmp_path / "empty.txt").write_text(" \n\t\n")
    (tmp_path / "sub" / "deep").mkdir(parents=True)
    (tmp_path / "sub" / "deep" / "c.md").write_text("# third")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "d.txt").write_text("never")
    first, second, third = "first, ünïcödé 🎉\n", "second\n", "# third"
    assert read(str(tmp_path / "*.txt")) == [first, second]
    assert read(tmp_path / "b.txt") == [second]
    assert read([tmp_path / "b.txt", str(tmp_path / "a.txt")]) == [second, first]
    assert read(str(tmp_path)) == [first, second, third]
    assert read(str(tmp_path / "**" / "*.md")) == [third]


def test_a_name_with_magic_characters_that_is_there_is_that_file(tmp_path):
    (tmp_path / "a[1].txt").write_text("brackets")
    (tmp_path / "a1.txt").write_text("plain")
    assert read(str(tmp_path / "a[1].txt")) == ["brackets"]


def test_byte_order_mark_and_line_ends_are_made_plain(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_CHUNK_BYTES", 5)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\r\n\nfour \xe2\x82\xac\r")
    assert read(tmp_path / "a.txt") == ["one\ntwo\nthree\n\nfour €\n"]


@pytest.mark.parametrize(("suffix", "module"), [(".gz", gzip), (".bz2", bz2), (".xz", lzma)])
def test_compressed_files(tmp_path, suffix, module):
    text = "".join(f"line {number}\n" for number in range(5000))
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(module.compress(text.encode()))
    assert read(path) == [text]
    lines = tmp_path / f"a.jsonl{suffix}"
    lines.write_bytes(module.compress(b'{"body": "one"}\n{"body": "two"}\n'))
    assert read(f"{lines}#body") == ["one", "two"]
    for name in (path, lines):
        name.write_bytes(name.read_bytes()[:-10])
        with pytest.raises(ValueError, match=f"{name.name}.*: compressed data that is broken or cut short"):
            read(f"{name}#body" if name == lines else name)


@given(st.text(alphabet="ab \n\t", max_size=300), st.integers(2, 40))
def test_cutting_loses_nothing_and_keeps_to_the_limit(text, limit):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "DOCUMENT_LENGTH", limit)
        pieces = list(sources._cut(text))
    assert "".join(pieces) == text
    assert all(len(piece) <= limit for piece in pieces)
    assert len(pieces) == 1 or all(len(piece) >= limit // 2 for piece in pieces[:-1])


def test_a_long_file_is_cut_at_blank_lines(tmp_path, monkeypatch):
    paragraphs = [f"Paragraph {number}. " + "word " * (number % 400) + "\n  still it\n \n" for number in range(1000)]
    text = "".join(paragraphs)
    path = tmp_path / "long.txt"
    path.write_text(text)
    documents = read(path)
    assert len(documents) > 10
    assert "".join(documents) == text
    assert all(document.startswith("Paragraph") and len(document) <= DOCUMENT_LENGTH for document in documents)
    monkeypatch.setattr(sources, "_CHUNK_BYTES", 999)  # where a file is cut does not depend on how it is read
    assert read(path) == documents


def test_separator(tmp_path, monkeypatch):
    path = tmp_path / "stories.txt"
    path.write_text("one\n<|endoftext|>\ntwo<|endoftext|><|endoftext|>three<|endofte")
    assert read(path, separator="<|endoftext|>") == ["one\n", "\ntwo", "three<|endofte"]
    monkeypatch.setattr(sources, "_CHUNK_BYTES", 3)
    assert read(path, separator="<|endoftext|>") == ["one\n", "\ntwo", "three<|endofte"]
    assert read(path, separator="\n") == ["one", "<|endoftext|>", "two<|endoftext|><|endoftext|>three<|endofte"]
    monkeypatch.setattr(sources, "_LONGEST_DOCUMENT", 40)
    with pytest.raises(ValueError, match=r"stories.txt: the separator '###' does not occur in 4\d characters"):
        read(path, separator="###")
    with pytest.raises(ValueError, match="separator: '' separates nothing"):
        read(path, separator="")


def test_a_large_file_is_read_in_little_memory(tmp_path):
    path = tmp_path / "one-line.txt"
    path.write_text("x" * 30_000_000)
    tracemalloc.start()
    try:
        assert sum(len(document) for document in read_documents(path)) == 30_000_000
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"text": "one", "body": "eins"}\n\n{"body": "zwei", "text": "tw\\u00f6"}')
    assert read(path) == ["one", "twö"]
    assert read(f"{path}#body") == ["eins", "zwei"]
    assert read(f"{tmp_path}/*.jsonl#body") == ["eins", "zwei"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"line 2: not JSON"),
        ("\udcff", r"line 2: not JSON .*utf-8"),
        ('"only a string"', r"line 2: a JSON str; every line must be one JSON object"),
        ('{"body": "x", "id": 1}', r"line 2: no field 'text' among \['body', 'id'\]; .*a.jsonl#body"),
        ("{}", r"line 2: no field 'text' among \[\]"),
        ('{"text": 3}', r"line 2: the field 'text' is a int"),
        ('{"text": null}', r"line 2: the field 'text' is a NoneType"),
        ('{"text": "\\ud800"}', r"line 2: the field 'text' has a lone surrogate"),
        ("[" * 100_000, r"line 2: not JSON"),
    ],
)
def test_a_wrong_json_line_is_told_by_file_and_number(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n", errors="surrogateescape")
    with pytest.raises(ValueError, match=r"a.jsonl, " + message):
        read(path)


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [f"row {number}" for number in range(1000)]
    kinds = {"text": pa.string(), "large": pa.large_string(), "coded": pa.dictionary(pa.int32(), pa.string())}
    columns = {name: pa.array(rows).cast(kind) for name, kind in kinds.items()}
    numbers = {"n": pa.array(range(1000)), "gaps": pa.array([None, *rows[1:]]), "raw": pa.array([b"\xff"] * 1000)}
    pq.write_table(pa.table(columns | numbers), path, row_group_size=300)
    for name in ("text", "large", "coded"):
        assert read(f"{path}#{name}") == rows
    assert read(path) == rows
    for column, message in [
        ("body", r"a.parquet: no column 'body' among \['text', .*; name the one that holds the text"),
        ("n", r"a.parquet: the column 'n' is of type int64; it must hold strings"),
        ("raw", r"a.parquet: the column 'raw' is of type binary"),
        ("gaps", r"a.parquet, row 1: 'gaps' is null"),
    ]:
        with pytest.raises(ValueError, match=message):
            read(f"{path}#{column}")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"a.parquet: not a Parquet file that can be read"):
        read(path)


def test_positions_grow_to_the_sum_of_the_sizes(tmp_path):
    (tmp_path / "a.txt").write_text("text\n" * 100_000)
    write_json(tmp_path / "b.jsonl", *[{"text": "x" * 1000}] * 300)
    pq.write_table(pa.table({"text": ["one", "two", "three"]}), tmp_path / "c.parquet")
    opened = open_sources(tmp_path)
    positions = [position for _, position in sources.iterate(opened)]
    assert positions == sorted(positions)
    assert len(set(positions)) > 5
    assert positions[-1] == sum(source.size for source in opened)


def test_tensorflow_datasets():
    tf = pytest.importorskip("tensorflow")
    tfds = pytest.importorskip("tensorflow_datasets")
    splits = {"train": ["who?", "whät?".encode(), "why?"], "test": ["no\n"], "broken": [b"\xff"]}

    def as_dataset(builder, split, **settings):
        assert not settings["shuffle_files"]
        if split not in splits:
            raise ValueError(f"Unknown split {split!r}")
        return tf.data.Dataset.from_tensor_slices(
            {"sentence1": splits[split], "sentence2": ["I."] * len(splits[split])}
        )

    with tfds.testing.mock_data(num_examples=3):
        assert len(read("tfds:imdb_reviews")) == 3
        with pytest.raises(ValueError, match=r"tfds:imdb_reviews@train: no text feature 'body' among \['text'\]"):
            read("tfds:imdb_reviews#body")
        with pytest.raises(ValueError, match=r"tfds:mnist@train: more than one text feature or none: \[\]"):
            read("tfds:mnist")
        with pytest.raises(ValueError, match="tfds:no_such_thing@train: TensorFlow Datasets has no such dataset"):
            read("tfds:no_such_thing")
    with tfds.testing.mock_data(as_dataset_fn=as_dataset):
        assert read("tfds:glue/mrpc#sentence1") == ["who?", "whät?", "why?"]
        assert read("tfds:glue/mrpc:2.0.0@test#sentence1") == ["no\n"]
        assert read("tfds:glue/mrpc@test#sentence2") == ["I."]
        with pytest.raises(ValueError, match=r"more than one text feature or none: \['sentence1', 'sentence2'\]"):
            read("tfds:glue/mrpc")
        with pytest.raises(ValueError, match="tfds:glue/mrpc@dev: there is no such split"):
            read("tfds:glue/mrpc@dev#sentence1")
        with pytest.raises(ValueError, match="tfds:glue/mrpc@broken, example 0: not UTF-8"):
            read("tfds:glue/mrpc@broken#sentence1")
        identity = open_sources("tfds:glue/mrpc@test#sentence1")[0].identity()
    assert identity == {"kind": "TensorFlowDataset", "dataset": "glue/mrpc/2.0.0", "split": "test", "key": "sentence1"}
    with pytest.raises(ValueError, match="not of the form tfds:NAME"):
        open_sources("tfds:@train")


def test_what_is_not_there_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nothing").mkdir()
    for spec, message in [
        ("missing.txt", "source 'missing.txt': there is no such file"),
        ("*.txt", r"source '\*.txt': no file matches this pattern"),
        ("*.jsonl#body", r"source '\*.jsonl#body': no file matches this pattern"),
        ("nothing", "source 'nothing': there are no files in this directory"),
    ]:
        with pytest.raises(FileNotFoundError, match=message):
            read_documents(spec)
    with pytest.raises(ValueError, match="sources: none given"):
        read_documents([])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", r"a.txt: a zero at byte 8, so this is a binary file or UTF-16"),
        ("é".encode("utf-16"), r"a.txt: a zero at byte 3, so this is a binary file or UTF-16"),
        ("é".encode("latin-1"), r"a.txt: not UTF-8 at byte 0"),
        (b"fine \xff", r"a.txt: not UTF-8 at byte 5 \(invalid start byte\); convert it to UTF-8"),
        (b"x" * 25 + b"\xe2\x82", r"a.txt: not UTF-8 at byte 25 \(unexpected end of data\)"),
        (b"x" * 19 + b"\xe2\x82x", r"a.txt: not UTF-8 at byte 19 \(invalid continuation byte\)"),
    ],
)
def test_a_file_that_is_not_utf8_is_told_by_byte(tmp_path, monkeypatch, data, message):
    monkeypatch.setattr(sources, "_CHUNK_BYTES", 10)
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "a.txt")


def test_no_text_at_all_is_told(tmp_path):
    (tmp_path / "a.txt").write_text("")
    write_json(tmp_path / "b.jsonl", {"text": ""}, {"text": "  "})
    with pytest.raises(ValueError, match=r"a.txt, .*b.jsonl: there is no text in it"):
        read([tmp_path / "a.txt", tmp_path / "b.jsonl"])


@pytest.mark.slow
def test_python_help_is_prose_and_always_the_same():
    documents = read("pydoc")
    assert documents == read("pydoc")
    assert len(set(documents)) == len(documents)
    assert 1_000_000 < sum(len(document.encode()) for document in documents) < 10_000_000
    assert any("Assert statements are a convenient way" in document for document in documents[:100])
    modules = {document.split("\n", 1)[0].split(".")[0] for document in documents}
    assert {"json", "argparse", "collections"} <= modules
    assert not {"pip", "pytest", "test", "numpy", "site-packages"} & modules


def test_python_help_imports_no_module_that_it_reads():
    program = (
        "import sys; from lmzoo.data.sources import read_documents; "
        "import pydoc_data.topics; before = set(sys.modules); list(read_documents('pydoc')); "
        "print([name for name in sys.modules if name not in before and not name.startswith('encodings.')])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


ZOO = '''"""A zoo.

    With animals.
    """
if True:
    class Cat:
        """Purrs."""
        def sit(self):
            """Sits.

            Returns:
              nothing
            """
        async def run(self):
            """Purrs."""
try:
    pass
except OSError as error:
    def late():
        """Late."""
raise RuntimeError("imported")
'''


def test_docstrings_stand_below_their_names_and_only_once(tmp_path):
    path = tmp_path / "zoo.py"
    path.write_text(ZOO)
    seen = set()
    assert module_help(path, "zoo", seen) == [
        "zoo\n\nA zoo.\n\nWith animals.",
        "zoo.Cat\n\nPurrs.",
        "zoo.Cat.sit\n\nSits.\n\nReturns:\n  nothing",
        "zoo.late\n\nLate.",
    ]
    assert module_help(path, "again", seen) == []
    path.write_text("this is not Python")
    assert module_help(path, "broken", seen) == []


def test_identity_tells_when_the_text_may_have_changed(tmp_path):
    path = tmp_path / "a.jsonl"
    write_json(path, {"text": "one", "body": "two"})

    def identity(spec):
        return [source.identity() for source in open_sources(spec)]

    before = identity(path)
    assert json.loads(json.dumps(before)) == before
    assert identity(path) == before
    assert identity(f"{path}#body") != before
    write_json(path, {"text": "three"})
    assert identity(path) != before
    assert identity("pydoc")[0]["version"] == ".".join(map(str, sys.version_info[:3]))

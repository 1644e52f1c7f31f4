import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lmzoo.data.records import Records, read_records

ROWS = [{"text": 'good, "really"', "label": "yes"}, {"text": "bäd", "label": "no"}]
SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "t",
            "paragraphs": [
                {
                    "context": "Ada wrote it.",
                    "qas": [
                        {"id": "1", "question": "Who?", "answers": [{"text": "Ada", "answer_start": 0}]},
                        {"id": "2", "question": "When?", "answers": [], "is_impossible": True},
                    ],
                }
            ],
        }
    ],
}


def write(path, content):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(content), path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", "\n".join(map(json.dumps, ROWS)) + "\n\n"),
        ("a.ndjson", "\ufeff" + "\r\n".join(map(json.dumps, ROWS))),
        ("a.json", json.dumps(ROWS)),
        ("a.json", json.dumps({"data": ROWS})),
        ("a.csv", 'text,label\r\n"good, ""really""",yes\r\nbäd,no\r\n'),
        ("a.tsv", 'text\tlabel\ngood, "really"\tyes\nbäd\tno\n'),
        ("a.parquet", ROWS),
    ],
)
def test_every_kind_of_file_gives_the_same_records(tmp_path, name, content):
    records = read_records(write(tmp_path / name, content))
    assert list(records) == ROWS
    assert records.texts("text") == [row["text"] for row in ROWS]


def test_quoted_fields_may_hold_line_ends(tmp_path):
    file = write(tmp_path / "a.csv", 'text,label\n"one\ntwo",yes\nthree,no\n')
    records = read_records(file)
    assert records[0] == {"text": "one\ntwo", "label": "yes"}
    assert records.places[1] == f"{file}, line 4"


def test_squad(tmp_path):
    records = read_records(write(tmp_path / "dev.json", json.dumps(SQUAD)))
    assert list(records) == [
        {
            "id": "1",
            "question": "Who?",
            "context": "Ada wrote it.",
            "answers": {"text": ["Ada"], "answer_start": [0]},
        },
        {"id": "2", "question": "When?", "context": "Ada wrote it.", "answers": {"text": [], "answer_start": []}},
    ]
    broken = {"data": [{"paragraphs": [{"qas": [{"question": "Who?"}]}]}]}
    with pytest.raises(ValueError, match=r"item 1: not of SQuAD's layout \(KeyError: 'context'\)"):
        read_records(write(tmp_path / "broken.json", json.dumps(broken)))


@pytest.mark.parametrize("name", ["a.conll", "a.txt"])
def test_conll(tmp_path, name):
    file = write(tmp_path / name, "-DOCSTART- -X- O\n\nAda NNP B-PER\nwrote VBD O\n\n\nLondon B-LOC")
    records = read_records(file)
    assert list(records) == [
        {"tokens": ["Ada", "wrote"], "tags": ["B-PER", "O"]},
        {"tokens": ["London"], "tags": ["B-LOC"]},
    ]
    assert records.places == [f"{file}, line 3", f"{file}, line 7"]


def test_several_sources_follow_one_another(tmp_path):
    files = [write(tmp_path / name, json.dumps({"text": name})) for name in ("b.jsonl", "a.jsonl")]
    assert [row["text"] for row in read_records(files)] == ["b.jsonl", "a.jsonl"]


def test_tensorflow_datasets():
    tf = pytest.importorskip("tensorflow")
    tfds = pytest.importorskip("tensorflow_datasets")

    def as_dataset(builder, split, **settings):
        assert not settings["shuffle_files"]
        if split not in ("train", "test"):
            raise ValueError(split)
        labels = [1, 0] if split == "train" else [-1, -1]
        return tf.data.Dataset.from_tensor_slices({"sentence": ["gööd", "bad"], "label": labels, "idx": [0, 1]})

    with tfds.testing.mock_data(as_dataset_fn=as_dataset):
        records = read_records("tfds:glue/sst2")
        assert list(records) == [
            {"sentence": "gööd", "label": "positive", "idx": 0},
            {"sentence": "bad", "label": "negative", "idx": 1},
        ]
        assert records.places[1] == "tfds:glue/sst2, example 2"
        assert [row["label"] for row in read_records("tfds:glue/sst2@test")] == [None, None]
        with pytest.raises(ValueError, match="tfds:glue/sst2@dev: there is no split 'dev'"):
            read_records("tfds:glue/sst2@dev")
        with pytest.raises(ValueError, match="tfds:no_such_thing: TensorFlow Datasets has no such dataset"):
            read_records("tfds:no_such_thing")
    with tfds.testing.mock_data(num_examples=2):
        squad = read_records("tfds:squad")
        assert isinstance(squad[0]["answers"]["text"], list)
        assert all(isinstance(text, str) for text in squad[0]["answers"]["text"])
        tagged = read_records("tfds:conll2003")
        assert isinstance(tagged[0]["ner"][0], str)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": 1}\n{"text"', r"a.jsonl, line 2: not JSON"),
        ("a.jsonl", "[1]", r"a.jsonl, line 1: \[1\]; it must be a JSON object"),
        ("a.jsonl", b'{"a": 1}\n\xff', r"a.jsonl, line 2: not UTF-8"),
        ("a.jsonl", "\n", r"a.jsonl: there is no record in it"),
        ("a.json", '"text"', r"a.json: neither a list of objects nor"),
        ("a.csv", "a,b\n1,2\n3\n", r"a.csv, line 3: 1 fields, but the first line names 2: \['a', 'b'\]"),
        ("a.csv", 'a,b\n"1,2\n', r"a.csv, line 2: not CSV"),
        ("a.conll", "Ada\n", r"a.conll, line 1: one column, 'Ada'"),
        ("a.parquet", b"PAR1", r"a.parquet: not a Parquet file"),
        ("a.docx", "x", r"a.docx': its kind is not known; it must be tfds:NAME or end in .jsonl"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(tmp_path, name, content, message):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_records(file)


def test_what_is_not_there():
    with pytest.raises(FileNotFoundError, match=r"source 'none.jsonl': there is no such file"):
        read_records("none.jsonl")
    with pytest.raises(ValueError, match="none given"):
        read_records([])


def test_fields_are_checked_where_they_are_asked_for(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"text": "a", "n": 1}\n{"body": "b", "n": 2}\n')
    records = read_records(file)
    assert records.column("n") == [1, 2]
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: no field 'text' among \['body', 'n'\]"):
        records.texts("text")
    with pytest.raises(ValueError, match=r"a.jsonl, line 1: the field 'n' is 1; it must be a string"):
        records.texts("n")
    with pytest.raises(ValueError, match="must be a list of strings"):
        records.words("n")
    assert records.take([1]).places == [f"{file}, line 2"]
    assert Records([{"a": 1}]).places == ["record 1"]

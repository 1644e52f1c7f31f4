"""Where labelled examples come from: a source becomes records, which are dicts of named fields.

| source | a record is |
|---|---|
| `*.jsonl`, `*.ndjson` | the JSON object of a line |
| `*.json` | an object of the list in the file, or of the list under its key `data`; in SQuAD's layout, a question |
| `*.csv` | a row, by the names in the first one |
| `*.tsv` | the same; a quotation mark is a character like others, as in GLUE's files |
| `*.parquet` | a row |
| `*.conll`, `*.txt` | a sentence, `tokens` and `tags`: the first and the last column of lines up to a blank one |
| `tfds:NAME`, `tfds:NAME/CONFIG:VERSION@SPLIT` | an example of the split (`train`); classes by their names |

Text is UTF-8. All records of a source are held in memory.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

Record = dict[str, Any]
Placed = Iterable[tuple[str, Record]]

_TFDS = re.compile(r"tfds:(?P<name>[^@#]+)(@(?P<split>[^#]+))?")


class Records(Sequence[Record]):
    """Records, and where each of them was read.

    Args:
        rows: the records.
        places: of each of them, for messages; by default their numbers from 1.
        sources: number of the source of each of them, from 0; by default all are of one.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        places: Sequence[str] | None = None,
        sources: Sequence[int] | None = None,
    ) -> None:
        self.rows = [dict(row) for row in rows]
        self.places = [f"record {number + 1}" for number in range(len(self.rows))] if places is None else list(places)
        self.sources = [0] * len(self.rows) if sources is None else list(sources)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Records: ...
    def __getitem__(self, index: int | slice) -> Record | Records:
        return self.take(range(len(self))[index]) if isinstance(index, slice) else self.rows[index]

    def take(self, indices: Iterable[int]) -> Records:
        """The records of these numbers, in this order."""
        numbers = list(indices)
        return Records(
            [self.rows[number] for number in numbers],
            [self.places[number] for number in numbers],
            [self.sources[number] for number in numbers],
        )

    def column(self, field: str) -> list[Any]:
        """The value of a field in each record.

        Raises:
            ValueError: a record has no such field; the message names its place and the fields that there are.
        """
        for row, place in zip(self.rows, self.places, strict=True):
            if field not in row:
                raise ValueError(f"{place}: no field {field!r} among {sorted(row)}; name the one that is meant")
        return [row[field] for row in self.rows]

    def texts(self, field: str) -> list[str]:
        """The same for a field that must hold text.

        Raises:
            ValueError: a record has no such field, or something else in it.
        """
        return self.checked(field, lambda value: isinstance(value, str), "a string")

    def words(self, field: str) -> list[list[str]]:
        """The same for a field that must hold a list of strings."""
        return self.checked(
            field,
            lambda value: isinstance(value, list) and all(isinstance(word, str) for word in value),
            "a list of strings",
        )

    def checked(self, field: str, is_right: Callable[[Any], bool], rule: str) -> list[Any]:
        """The same for a field whose values must all be right; `rule` says what they must be."""
        values = self.column(field)
        for value, place in zip(values, self.places, strict=True):
            if not is_right(value):
                raise ValueError(f"{place}: the field {field!r} is {_short(value)}; it must be {rule}")
        return values


def read_records(sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> Records:
    """Reads the records of one or more sources, one after the other.

    Args:
        sources: specifications, as in the table above.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: a file is of no known kind, is not UTF-8 or not what its name says, or there is no record at all.
    """
    given = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    if not given:
        raise ValueError("sources: none given; name a file, or tfds:NAME")
    places: list[str] = []
    rows: list[Record] = []
    numbers: list[int] = []
    for number, source in enumerate(os.fspath(each) for each in given):
        before = len(rows)
        for place, row in _read(source):
            places.append(place)
            rows.append(row)
        if len(rows) == before:
            raise ValueError(f"{source}: there is no record in it; name a source that has some")
        numbers += [number] * (len(rows) - before)
    return Records(rows, places, numbers)


def _read(source: str) -> Placed:
    if source.startswith("tfds:"):
        return _read_tfds(source)
    path = Path(source).expanduser()
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"source {source!r}: its kind is not known; it must be tfds:NAME or end in {_ENDINGS}")
    if not path.is_file():
        raise FileNotFoundError(f"source {source!r}: there is no such file (seen from {os.getcwd()})")
    return reader(path)


def _read_jsonl(path: Path) -> Iterator[tuple[str, Record]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line and not line.isspace():
            place = f"{path}, line {number}"
            yield place, _object(_json(line, place), place)


def _read_json(path: Path) -> Iterator[tuple[str, Record]]:
    content = _json(_text(path), str(path))
    items = content.get("data") if isinstance(content, dict) else content
    if not isinstance(items, list):
        raise ValueError(f"{path}: neither a list of objects nor an object with such a list under 'data'")
    for number, item in enumerate(items, 1):
        place = f"{path}, item {number}"
        if "paragraphs" in _object(item, place):
            yield from _read_squad(item, place)
        else:
            yield place, item


def _read_squad(article: Record, place: str) -> Iterator[tuple[str, Record]]:
    try:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                answers = question.get("answers", [])
                yield (
                    f"{place}, question {question.get('id')!r}",
                    {
                        "id": question.get("id"),
                        "question": question["question"],
                        "context": paragraph["context"],
                        "answers": {key: [answer[key] for answer in answers] for key in ("text", "answer_start")},
                    },
                )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{place}: not of SQuAD's layout ({type(error).__name__}: {error})") from None


def _read_csv(path: Path) -> Iterator[tuple[str, Record]]:
    dialect: dict[str, Any] = {"strict": True}
    if path.suffix.lower() == ".tsv":
        dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None}
    reader = csv.reader(io.StringIO(_text(path), newline=""), **dialect)
    names: list[str] | None = None
    try:
        for row in reader:
            if names is None:
                names = row
            elif row:
                place = f"{path}, line {reader.line_num}"
                if len(row) != len(names):
                    raise ValueError(f"{place}: {len(row)} fields, but the first line names {len(names)}: {names}")
                yield place, dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not CSV ({error})") from None


def _read_parquet(path: Path) -> Iterator[tuple[str, Record]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            rows = table.read().to_pylist()
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a Parquet file that can be read ({error})") from None
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", row


def _read_conll(path: Path) -> Iterator[tuple[str, Record]]:
    tokens: list[str] = []
    tags: list[str] = []
    first = 1
    for number, line in enumerate([*_text(path).split("\n"), ""], 1):
        columns = line.split()
        if columns and columns[0] != "-DOCSTART-":
            if len(columns) < 2:
                raise ValueError(f"{path}, line {number}: one column, {line!r}; a line is a word and, last, its tag")
            if not tokens:
                first = number
            tokens.append(columns[0])
            tags.append(columns[-1])
        elif tokens:
            yield f"{path}, line {first}", {"tokens": tokens, "tags": tags}
            tokens, tags = [], []


def _read_tfds(source: str) -> Iterator[tuple[str, Record]]:
    import tensorflow_datasets as tfds

    match = _TFDS.fullmatch(source)
    if match is None:
        raise ValueError(f"source {source!r}: not of the form tfds:NAME[/CONFIG][:VERSION][@SPLIT]")
    name, split = match["name"], match["split"] or "train"
    try:
        builder = tfds.builder(name)
    except (tfds.core.DatasetNotFoundError, AssertionError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{source}: TensorFlow Datasets has no such dataset ({reason})") from None
    builder.download_and_prepare()
    try:
        examples = builder.as_dataset(split=split, shuffle_files=False)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{source}: there is no split {split!r}, only {sorted(builder.info.splits)}") from error
    features = builder.info.features
    for number, example in enumerate(tfds.as_numpy(examples), 1):
        place = f"{source}, example {number}"
        yield place, {key: _plain(value, features[key], place) for key, value in example.items()}


def _plain(value: Any, feature: Any, place: str) -> Any:
    """A value of TensorFlow Datasets as JSON would have it; a class by its name, and none for -1."""
    inner = getattr(feature, "feature", feature)
    if isinstance(value, dict):
        return {key: _plain(each, inner[key], place) for key, each in value.items()}
    if isinstance(value, np.ndarray):
        return [_plain(each, inner, place) for each in value]
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{place}: not UTF-8 ({error.reason})") from None
    number = value.item() if isinstance(value, np.generic) else value
    if hasattr(feature, "int2str") and isinstance(number, int):
        return None if number < 0 else feature.int2str(number)
    return number


def _text(path: Path) -> str:
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason}); convert it to UTF-8") from None


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: not JSON ({error})") from None


def _object(value: Any, place: str) -> Record:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: {_short(value)}; it must be a JSON object")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


_READERS: dict[str, Callable[[Path], Placed]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".conll": _read_conll,
    ".txt": _read_conll,
}
_ENDINGS = ", ".join(_READERS)

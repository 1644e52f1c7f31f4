"""Where text comes from: a source specification becomes a stream of documents.

| specification | names | a document is |
|---|---|---|
| `notes.md`, `data/**/*.txt`, `text.gz`, a directory | text files | a file; a long one is cut at blank lines |
| `data/*.jsonl`, `data/*.jsonl#body` | a JSON object a line | the field `text`, or the one named |
| `data/*.parquet`, `data/*.parquet#body` | Parquet tables | the column `text`, or the one named |
| `tfds:NAME`, `tfds:NAME/CONFIG:VERSION@SPLIT#KEY` | TensorFlow Datasets | an example of the split (`train`) |
| `pydoc` | the help of the running Python | a help topic; the docstrings of a module |

A name that ends in `.gz`, `.bz2` or `.xz` is decompressed. Text is UTF-8; line ends become `\\n`. No file is held as a
whole, so that it may be of any size. A document of nothing but white space is left out.
"""

import bz2
import codecs
import glob
import gzip
import io
import json
import lzma
import os
import platform
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from lmzoo.data.python_help import python_help

Spec: TypeAlias = str | os.PathLike[str]

DOCUMENT_LENGTH = 65_536
"""Characters that a document of a text file has at most, where no separator is given."""

_LONGEST_DOCUMENT = 1 << 26  # characters between two separators; with more the separator must be the wrong one
_CHUNK_BYTES = 1 << 18
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_CUTS = tuple(re.compile(pattern) for pattern in (r"\n(?:[ \t]*\n)+", r"\n", r"\s"))
_TABLE = re.compile(r"(?P<path>.*\.((?P<parquet>parquet)|(jsonl|ndjson)(\.gz|\.bz2|\.xz)?))(#(?P<field>.+))?", re.I)
_TFDS = re.compile(r"tfds:(?P<name>[^@#]+)(@(?P<split>[^#]+))?(#(?P<key>.+))?")


def read_documents(sources: Spec | Sequence[Spec], separator: str | None = None) -> Iterator[str]:
    """Streams the documents of one or more sources, in an order that depends on nothing but the sources.

    Args:
        sources: specifications, as in the table above.
        separator: what stands between two documents of a text file, such as a blank line or `<|endoftext|>`, in place
            of the rule that cuts long files.

    Raises:
        FileNotFoundError: a path that is not there, or a pattern that matches nothing. Raised at once.
        ValueError: text that is not UTF-8, a line or column that is not as said, no text at all. Raised while reading.
    """
    opened = open_sources(sources, separator)
    return (text for text, _ in iterate(opened))


def open_sources(sources: Spec | Sequence[Spec], separator: str | None = None) -> list["Source"]:
    """Finds what the specifications name, without reading any text."""
    specs = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    if not specs:
        raise ValueError("sources: none given; name a file, a pattern, `tfds:NAME` or `pydoc`")
    if separator == "":
        raise ValueError("separator: '' separates nothing; give what stands between two documents, or None")
    found: list[Source] = []
    for spec in [os.fspath(spec) for spec in specs]:
        if spec == "pydoc":
            found.append(PythonHelp())
        elif spec.startswith("tfds:"):
            found.append(_tfds_source(spec))
        else:
            found.extend(_file_sources(spec, separator))
    return found


def iterate(sources: Sequence["Source"]) -> Iterator[tuple[str, int]]:
    """Yields every document that has text in it, and how far reading has come, out of the sum of the sources' sizes.

    Raises:
        ValueError: none of the sources has any text.
    """
    empty, before = True, 0
    for source in sources:
        for text, position in source.documents():
            if text and not text.isspace():
                empty = False
                yield text, before + position
        before += source.size
    if empty:
        names = ", ".join(source.name for source in sources[:3]) + (", ..." if len(sources) > 3 else "")
        raise ValueError(f"{names}: there is no text in it; name a source that has some")


class Source(ABC):
    """Something that documents can be read from, any number of times and always in the same order."""

    name: str

    @property
    def size(self) -> int:
        """The position after the last document, in a unit of the source's own; 0 where it is not known."""
        return 0

    @abstractmethod
    def documents(self) -> Iterator[tuple[str, int]]:
        """Yields each document and the position after it."""

    def identity(self) -> dict[str, Any]:
        """What is different when the text may be different; fit for JSON."""
        settings = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {"kind": type(self).__name__} | settings


class _FileSource(Source):
    path: Path

    @property
    def name(self) -> str:  # type: ignore[override]
        """The path as it was given."""
        return str(self.path)

    @property
    def size(self) -> int:
        """Bytes of the file, as it is on disk."""
        return self.path.stat().st_size

    def identity(self) -> dict[str, Any]:
        """The settings, and the file's absolute path, size and time of modification."""
        status = self.path.stat()
        file = {"path": str(self.path.resolve()), "size": status.st_size, "modified": status.st_mtime_ns}
        return super().identity() | file


@dataclass(frozen=True)
class TextFile(_FileSource):
    """A file of UTF-8 text, compressed or not."""

    path: Path
    separator: str | None = None

    def documents(self) -> Iterator[tuple[str, int]]:
        """Yields what stands between the separators or, without one, pieces that make up the whole text."""
        rest, position = "", 0
        for text, position in _decode(self.path):
            if self.separator is None:
                *documents, rest = _cut(rest + text)
            else:
                *documents, rest = (rest + text).split(self.separator)
                if len(rest) > _LONGEST_DOCUMENT:
                    raise ValueError(
                        f"{self.path}: the separator {self.separator!r} does not occur in {len(rest):,} characters, "
                        "which would be one document; give the separator that the file uses, or None"
                    )
            for document in documents:
                yield document, position
        yield rest, position


@dataclass(frozen=True)
class JsonLines(_FileSource):
    """A file with one JSON object a line, compressed or not; empty lines are passed over."""

    path: Path
    field: str = "text"

    def documents(self) -> Iterator[tuple[str, int]]:
        """Yields the field of every line."""
        with _opened(self.path) as (raw, lines):
            for number, line in enumerate(lines, 1):
                if not line.isspace():
                    yield self._text(line, f"{self.path}, line {number}"), raw.tell()

    def _text(self, line: bytes, place: str) -> str:
        try:
            record = json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: not JSON ({error}); every line must be one JSON object") from None
        if not isinstance(record, dict):
            raise ValueError(f"{place}: a JSON {type(record).__name__}; every line must be one JSON object")
        if self.field not in record:
            raise ValueError(
                f"{place}: no field {self.field!r} among {sorted(record)}; name the one that holds the text, as in "
                f"'{self.path.name}#{min(record, default='body')}'"
            )
        text = record[self.field]
        if not isinstance(text, str):
            raise ValueError(f"{place}: the field {self.field!r} is a {type(text).__name__}; it must be a string")
        if not text.isascii() and re.search("[\ud800-\udfff]", text):
            raise ValueError(f"{place}: the field {self.field!r} has a lone surrogate, not a character; remove it")
        return text


@dataclass(frozen=True)
class ParquetColumn(_FileSource):
    """One string column of a Parquet file."""

    path: Path
    field: str = "text"

    def documents(self) -> Iterator[tuple[str, int]]:
        """Yields the column's value in every row."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        size, row = self.size, 0
        try:
            with pq.ParquetFile(self.path) as table:
                self._check_column(table.schema_arrow)
                for batch in table.iter_batches(batch_size=64, columns=[self.field]):
                    for text in batch.column(0).to_pylist():
                        row += 1
                        if text is None:
                            raise ValueError(f"{self.path}, row {row}: {self.field!r} is null; remove such rows")
                        yield text, size * row // table.metadata.num_rows
        except (pa.ArrowException, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path}: not a Parquet file that can be read ({error})") from None

    def _check_column(self, schema: Any) -> None:
        import pyarrow.types as pt

        if self.field not in schema.names:
            raise ValueError(
                f"{self.path}: no column {self.field!r} among {schema.names}; name the one that holds the text, as in "
                f"'{self.path.name}#{min(schema.names, default='body')}'"
            )
        kind = schema.field(self.field).type
        kind = kind.value_type if pt.is_dictionary(kind) else kind
        if not (pt.is_string(kind) or pt.is_large_string(kind)):
            raise ValueError(f"{self.path}: the column {self.field!r} is of type {kind}; it must hold strings")


@dataclass(frozen=True)
class TensorFlowDataset(Source):
    """One text feature of one split of a TensorFlow Datasets name, which is downloaded if that is still to be done."""

    dataset: str
    split: str = "train"
    key: str | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        """The specification."""
        return f"tfds:{self.dataset}@{self.split}"

    def identity(self) -> dict[str, Any]:
        """The settings, and the dataset's name with its configuration and version."""
        return super().identity() | {"dataset": self._builder().info.full_name}

    def documents(self) -> Iterator[tuple[str, int]]:
        """Yields the text of every example, in the order in which the dataset is stored."""
        import tensorflow_datasets as tfds

        builder = self._builder()
        key = self._text_key(builder.info.features)
        builder.download_and_prepare()
        try:
            examples = builder.as_dataset(split=self.split, shuffle_files=False)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{self.name}: there is no such split, only {sorted(builder.info.splits)}") from error
        for number, example in enumerate(tfds.as_numpy(examples)):
            try:
                text = example[key].decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{self.name}, example {number}: not UTF-8 ({error.reason})") from None
            yield text, 0

    def _builder(self) -> Any:
        import tensorflow_datasets as tfds

        try:
            return tfds.builder(self.dataset)
        except (tfds.core.DatasetNotFoundError, AssertionError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{self.name}: TensorFlow Datasets has no such dataset ({reason})") from None

    def _text_key(self, features: Any) -> str:
        import tensorflow_datasets as tfds

        texts = sorted(name for name, feature in features.items() if isinstance(feature, tfds.features.Text))
        usual = "text" if "text" in texts else texts[0] if len(texts) == 1 else None
        key = self.key or usual
        if key is None or key not in texts:
            wrong = f"no text feature {self.key!r} among" if self.key else "more than one text feature or none:"
            raise ValueError(f"{self.name}: {wrong} {texts}; write 'tfds:{self.dataset}#KEY'")
        return key


@dataclass(frozen=True)
class PythonHelp(Source):
    """The embedded corpus: `pydoc`'s help topics and the docstrings of the standard library, a few megabytes."""

    name: str = "pydoc"

    def identity(self) -> dict[str, Any]:
        """The version of Python."""
        return super().identity() | {"version": platform.python_version()}

    def documents(self) -> Iterator[tuple[str, int]]:
        """Yields the topics, then the docstrings."""
        return ((text, 0) for text in python_help())


def _tfds_source(spec: str) -> Source:
    match = _TFDS.fullmatch(spec)
    if match is None:
        raise ValueError(f"source {spec!r}: not of the form tfds:NAME[/CONFIG][:VERSION][@SPLIT][#KEY]")
    return TensorFlowDataset(match["name"], match["split"] or "train", match["key"])


def _file_sources(spec: str, separator: str | None) -> Iterator[Source]:
    """The files that a path, a directory or a pattern names, sorted by name."""
    table = None if os.path.exists(spec) else _TABLE.fullmatch(spec)
    pattern = os.path.expanduser(table["path"] if table else spec)
    if os.path.isdir(pattern):
        names = glob.glob("**", root_dir=pattern, recursive=True)  # leaves out hidden files and directories
        paths = [Path(pattern, name) for name in names]
    elif os.path.exists(pattern):
        paths = [Path(pattern)]
    else:
        paths = [Path(name) for name in glob.glob(pattern, recursive=True)]
    paths = sorted(path for path in paths if not path.is_dir())
    if not paths:
        wrong = "no file matches this pattern" if glob.has_magic(pattern) else "there is no such file"
        wrong = "there are no files in this directory" if os.path.isdir(pattern) else wrong
        raise FileNotFoundError(f"source {spec!r}: {wrong} (seen from {os.getcwd()})")
    field = (table["field"] if table else None) or "text"
    for path in paths:
        kind = _TABLE.fullmatch(path.name)
        if kind is None:
            yield TextFile(path, separator)
        elif kind["parquet"]:
            yield ParquetColumn(path, field)
        else:
            yield JsonLines(path, field)


def _cut(text: str) -> Iterator[str]:
    """Cuts at the first blank line (or line, or word) that ends past half of `DOCUMENT_LENGTH`; nothing is lost."""
    start = 0
    while len(text) - start > DOCUMENT_LENGTH:
        low, high = start + DOCUMENT_LENGTH // 2, start + DOCUMENT_LENGTH
        end = next((match.end() for cut in _CUTS if (match := cut.search(text, low, high))), high)
        yield text[start:end]
        start = end
    yield text[start:]


def _decode(path: Path) -> Iterator[tuple[str, int]]:
    """Yields pieces of a file's text, and the number of its bytes read so far."""
    utf8 = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset = 0
    with _opened(path) as (raw, stream):
        while True:
            data = stream.read(_CHUNK_BYTES)
            if b"\0" in data:
                where = f"byte {offset + data.index(0):,}"
                raise ValueError(f"{path}: a zero at {where}, so this is a binary file or UTF-16; text must be UTF-8")
            kept = len(utf8.getstate()[0])
            try:
                text = utf8.decode(data, final=not data)
            except UnicodeDecodeError as error:
                where = f"byte {offset - kept + error.start:,}"
                raise ValueError(f"{path}: not UTF-8 at {where} ({error.reason}); convert it to UTF-8") from None
            text = text.removeprefix("\ufeff") if offset == 0 else text
            yield newlines.decode(text, final=not data), raw.tell()
            if not data:
                return
            offset += len(data)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, Any]]:
    """Opens a file, once as it is on disk (to tell the position) and once decompressed (to read)."""
    try:
        with path.open("rb") as raw:
            opener = _OPENERS.get(path.suffix.lower())
            yield raw, opener(raw, "rb") if opener else raw
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        if (
            isinstance(error, OSError) and error.errno is not None
        ):  # broken gzip and bz2 data raise one without a number
            raise
        raise ValueError(f"{path}: compressed data that is broken or cut short ({error})") from None

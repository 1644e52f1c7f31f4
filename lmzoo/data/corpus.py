"""A token corpus on disk: documents of token ids, one after the other, written once and then memory-mapped.

A corpus is a directory:

| file | holds |
|---|---|
| `corpus.json` | format version, counts, vocabulary size, tokenizer fingerprint; size and SHA-256 of the other files |
| `tokens-00000.bin`, ... | token ids, little-endian uint16 (uint32 if the vocabulary has more than 65,536) |
| `documents.bin` | the end of every document, in tokens from the start of the corpus, little-endian uint64 |

A document lies within one shard. The directory gets its name when it is complete: there never is half a corpus that
could be taken for a whole one.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

FORMAT_VERSION = 1
SHARD_TOKENS = 1 << 27

_INFO = "corpus.json"
_DOCUMENTS = "documents.bin"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class HasFingerprint(Protocol):
    """A tokenizer, as far as a corpus needs to know it."""

    @property
    def fingerprint(self) -> str:
        """What tokenizers that give the same ids have in common."""
        ...


@dataclass(frozen=True, kw_only=True)
class CorpusInfo:
    """What `corpus.json` says."""

    format_version: int
    dtype: str
    num_tokens: int
    num_documents: int
    num_bytes: int
    vocab_size: int
    tokenizer_fingerprint: str
    shards: list[dict[str, Any]]
    documents: dict[str, Any]

    @classmethod
    def read(cls, directory: Path) -> "CorpusInfo":
        """Reads the description of a corpus; see `Corpus.open` for what it raises."""
        path = directory / _INFO
        if not path.is_file():
            raise FileNotFoundError(f"{directory}: not a corpus, it has no {_INFO}; make one with prepare()")
        try:
            values = json.loads(path.read_bytes())
            version = values["format_version"]
            info = cls(**values) if version == FORMAT_VERSION else None
            if info is not None:
                info._check_counts()
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: damaged ({error}); prepare the corpus again") from None
        if info is None:
            raise ValueError(f"{path}: format version {version}; this lmzoo reads {FORMAT_VERSION}, prepare it again")
        return info

    def _check_counts(self) -> None:
        sizes = {entry["file"]: entry["size"] for entry in [*self.shards, self.documents] if entry["sha256"]}
        width = np.dtype(self.dtype).itemsize
        if sizes.pop(_DOCUMENTS) != 8 * self.num_documents or sum(sizes.values()) != width * self.num_tokens:
            raise ValueError("sizes and counts do not agree")


class Corpus:
    """Documents of token ids, memory-mapped.

    Attributes:
        directory: where it is.
        num_tokens: tokens, those that end a document included.
        num_documents: documents, none of them empty.
        num_bytes: bytes of UTF-8 of the text that the tokens stand for, from which bits per byte are reckoned.
        vocab_size: every id is below it.
        tokenizer_fingerprint: that of the tokenizer that made the ids.
        document_ends: [num_documents] int64, the tokens up to the end of each document.
    """

    def __init__(self, directory: Path, info: CorpusInfo) -> None:
        self.directory = directory
        self.num_tokens = info.num_tokens
        self.num_documents = info.num_documents
        self.num_bytes = info.num_bytes
        self.vocab_size = info.vocab_size
        self.tokenizer_fingerprint = info.tokenizer_fingerprint
        # Read as int64: NumPy compares uint64 with int64 as float64, through a copy of the whole array.
        self.document_ends = _map(directory / _DOCUMENTS, "<i8")
        self._shards = [_map(directory / shard["file"], info.dtype) for shard in info.shards]
        self._shard_ends = np.cumsum([len(shard) for shard in self._shards])

    @classmethod
    def open(
        cls, directory: str | os.PathLike[str], tokenizer: HasFingerprint | None = None, verify: bool = True
    ) -> "Corpus":
        """Opens a corpus, once it has been seen to be whole.

        Args:
            directory: written by `CorpusWriter`, such as `train` and `validation` in what `prepare` wrote.
            tokenizer: if given, the one that the corpus must have been made with.
            verify: whether to compare the SHA-256 of every file, which reads it all. Sizes are compared in any case.

        Raises:
            FileNotFoundError: the directory is not a corpus, or a file of it is missing.
            ValueError: a file is cut short or altered, the format version is another, or the tokenizer is.
        """
        directory = Path(directory)
        info = CorpusInfo.read(directory)
        for entry in [*info.shards, info.documents]:
            _check_file(directory / entry["file"], entry, verify)
        if tokenizer is not None and tokenizer.fingerprint != info.tokenizer_fingerprint:
            raise ValueError(
                f"{directory}: made with tokenizer {info.tokenizer_fingerprint[:12]}, and the one given is "
                f"{tokenizer.fingerprint[:12]}; use the tokenizer that lies beside the corpus, or prepare it again"
            )
        return cls(directory, info)

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Gives the tokens at these places of the corpus, as int32 in the same shape."""
        if len(self._shards) == 1:
            return self._shards[0][indices].astype(np.int32)
        tokens = np.empty(indices.shape, np.int32)
        shard_of = np.searchsorted(self._shard_ends, indices, side="right")
        for number in np.unique(shard_of):
            here = shard_of == number
            shard = self._shards[number]
            tokens[here] = shard[indices[here] - (self._shard_ends[number] - len(shard))]
        return tokens

    def document(self, number: int) -> np.ndarray:
        """Gives the tokens of one document, as int32."""
        if not 0 <= number < self.num_documents:
            raise IndexError(f"{self.directory}: no document {number}, they are numbered 0 to {self.num_documents - 1}")
        start = self.document_ends[number - 1] if number else 0
        return self.take(np.arange(start, self.document_ends[number]))

    def __repr__(self) -> str:
        return f"Corpus({str(self.directory)!r}, {self.num_documents:,} documents, {self.num_tokens:,} tokens)"


class CorpusWriter:
    """Writes a corpus; made by `CorpusWriter.create`.

    ```python
    with CorpusWriter.create("corpus", vocab_size=512, tokenizer_fingerprint=tokenizer.fingerprint) as writer:
        writer.add(tokenizer.encode(text), [length], num_bytes)
    ```
    """

    def __init__(self, path: Path, vocab_size: int, tokenizer_fingerprint: str, shard_tokens: int) -> None:
        self.num_tokens = self.num_documents = self.num_bytes = 0
        self._path = path
        self._vocab_size = vocab_size
        self._fingerprint = tokenizer_fingerprint
        self._shard_tokens = shard_tokens
        self._dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
        self._shards = [_HashedFile(path / "tokens-00000.bin")]
        self._documents = _HashedFile(path / _DOCUMENTS)

    @classmethod
    @contextmanager
    def create(
        cls,
        directory: str | os.PathLike[str],
        *,
        vocab_size: int,
        tokenizer_fingerprint: str,
        shard_tokens: int = SHARD_TOKENS,
        overwrite: bool = False,
    ) -> Iterator["CorpusWriter"]:
        """Gives a writer; when the block ends the corpus is there, and when it ends with an exception nothing is.

        Args:
            directory: the corpus to be.
            vocab_size: more than the largest id.
            tokenizer_fingerprint: see `Corpus`.
            shard_tokens: tokens in a shard at most, unless one document alone has more.
            overwrite: whether to replace a corpus that is there.

        Raises:
            FileExistsError: there is something in the directory, and it is not a corpus or `overwrite` is false.
            ValueError: nothing was added.
            OSError: the disk is full.
        """
        if shard_tokens < 1:
            raise ValueError(f"shard_tokens: {shard_tokens}; a shard holds at least 1 token")
        with new_directory(directory, overwrite, marker=_INFO) as path:
            writer = cls(path, vocab_size, tokenizer_fingerprint, shard_tokens)
            try:
                yield writer
                writer._finish()
            finally:
                for file in [*writer._shards, writer._documents]:
                    file.abandon()

    def add(self, tokens: np.ndarray | Sequence[int], lengths: np.ndarray | Sequence[int], num_bytes: int) -> None:
        """Appends documents.

        Args:
            tokens: their ids, one document after the other.
            lengths: tokens of each of them, at least 1.
            num_bytes: bytes of UTF-8 of their text.

        Raises:
            ValueError: a document without tokens, lengths that do not add up, an id outside the vocabulary.
            OSError: the disk is full.
        """
        tokens, lengths = np.asarray(tokens, np.int64), np.asarray(lengths, np.int64)
        if len(lengths) == 0:
            return
        if lengths.min() < 1 or lengths.sum() != len(tokens):
            raise ValueError(f"lengths: {lengths.sum()} in all, {lengths.min()} the least, for {len(tokens)} tokens")
        if tokens.min() < 0 or tokens.max() >= self._vocab_size:
            wrong = tokens[(tokens < 0) | (tokens >= self._vocab_size)][0]
            raise ValueError(f"token id {wrong}: not below the vocabulary size {self._vocab_size}, or negative")
        ends = np.cumsum(lengths)
        self._documents.write((self.num_tokens + ends).astype("<u8"))
        self.num_tokens += len(tokens)
        self.num_documents += len(lengths)
        self.num_bytes += num_bytes
        start = 0
        while start < len(tokens):
            room = self._shard_tokens - self._shards[-1].size // self._dtype.itemsize
            fit = np.searchsorted(ends, start + room, side="right")
            end = int(ends[fit - 1]) if fit else 0
            if end <= start and self._shards[-1].size:
                self._shards[-1].close()
                self._shards.append(_HashedFile(self._path / f"tokens-{len(self._shards):05d}.bin"))
                continue
            end = end if end > start else int(ends[fit])  # longer than a shard
            self._shards[-1].write(tokens[start:end].astype(self._dtype))
            start = end

    def _finish(self) -> None:
        if not self.num_documents:
            raise ValueError(f"{self._path.parent}: no documents were added; a corpus cannot be empty")
        self._shards[-1].close()
        self._documents.close()
        info = CorpusInfo(
            format_version=FORMAT_VERSION,
            dtype=self._dtype.str,
            num_tokens=self.num_tokens,
            num_documents=self.num_documents,
            num_bytes=self.num_bytes,
            vocab_size=self._vocab_size,
            tokenizer_fingerprint=self._fingerprint,
            shards=[shard.entry() for shard in self._shards],
            documents=self._documents.entry(),
        )
        (self._path / _INFO).write_text(json.dumps(asdict(info), indent=2) + "\n")


class _HashedFile:
    """A file that is being written, with its size and its SHA-256."""

    def __init__(self, path: Path) -> None:
        self.size = 0
        self._path = path
        self._hash = hashlib.sha256()
        self._file = path.open("wb")

    def write(self, array: np.ndarray) -> None:
        data = array.tobytes()
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def abandon(self) -> None:
        with contextlib.suppress(OSError):  # on a full disk closing fails again, and frees the file all the same
            self._file.close()

    def entry(self) -> dict[str, Any]:
        return {"file": self._path.name, "size": self.size, "sha256": self._hash.hexdigest()}


def _map(path: Path, dtype: str) -> np.ndarray:
    return np.memmap(path, dtype=dtype, mode="r").view(np.ndarray)


def _check_file(path: Path, entry: dict[str, Any], verify: bool) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: this file of the corpus is missing; prepare the corpus again")
    size = path.stat().st_size
    if size != entry["size"]:
        raise ValueError(f"{path}: {size:,} bytes where {entry['size']:,} were written; prepare the corpus again")
    if verify:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != entry["sha256"]:
            raise ValueError(f"{path}: altered since it was written (SHA-256 differs); prepare the corpus again")


@contextmanager
def new_directory(directory: str | os.PathLike[str], overwrite: bool, marker: str) -> Iterator[Path]:
    """Gives a directory to write to, which takes the name asked for when the block ends, or goes when it fails.

    What a killed process left behind is removed by the next one that writes the same directory; a lock keeps two from
    writing it at a time.

    Args:
        directory: the name.
        overwrite: whether a directory that is there may be replaced.
        marker: a file that such a directory must have in it, so that nothing else is ever replaced.

    Raises:
        FileExistsError: there is something that may not be replaced, or another process is writing.
        OSError: the disk is full.
    """
    directory = Path(directory).resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial, replaced = (directory.with_name(f".{directory.name}.{part}") for part in ("partial", "replaced"))
    with _locked(partial):
        try:
            if replaced.exists() and not directory.exists():  # killed between the two renames below
                replaced.rename(directory)
            for leftover in (replaced, *partial.iterdir()):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
            _check_replaceable(directory, overwrite, marker)
            yield partial
            if directory.exists():
                directory.rename(replaced)
            partial.rename(directory)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in _FULL:
                raise OSError(
                    error.errno,
                    f"{os.strerror(error.errno)} while writing {directory}; nothing was left behind; make room (now "
                    f"{shutil.disk_usage(directory.parent).free:,} bytes are free) or name a directory on another disk",
                ) from error
            raise
        shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Makes a directory and holds its lock, which the system frees when the process ends, however it ends."""
    path.mkdir(exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not (path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor))):  # just renamed by its writer
            raise BlockingIOError
        yield
    except BlockingIOError:
        raise FileExistsError(f"{path}: another process is writing it; wait until that one ends") from None
    finally:
        os.close(descriptor)


def _check_replaceable(directory: Path, overwrite: bool, marker: str) -> None:
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not (directory / marker).is_file():
        raise FileExistsError(f"{directory}: is there and has no {marker} in it; name another directory")
    if not overwrite:
        raise FileExistsError(f"{directory}: is there already; pass overwrite=True, or name another directory")

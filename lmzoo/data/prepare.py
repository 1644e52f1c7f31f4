"""From text to a directory of token corpora: read, split, encode in several processes, write.

What is written depends on the sources, the tokenizer and the settings, not on the number of processes.
"""

import contextlib
import hashlib
import itertools
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from lmzoo.data.corpus import SHARD_TOKENS, Corpus, CorpusWriter, new_directory
from lmzoo.data.sources import Source, Spec, iterate, open_sources
from lmzoo.data.tokenizers import Tokenizer

_MANIFEST = "prepare.json"
_BATCH_CHARACTERS = 1 << 20
_SERVE = (
    "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); from lmzoo.data.prepare import serve; serve()"
)


class Prepared(NamedTuple):
    """The corpora of a directory that `prepare` wrote."""

    train: Corpus
    validation: Corpus | None


def prepare(
    sources: Spec | Sequence[Spec],
    tokenizer: Tokenizer,
    directory: str | os.PathLike[str],
    *,
    validation_fraction: float = 0.05,
    seed: int = 0,
    separator: str | None = None,
    end_documents: bool = True,
    num_processes: int = 1,
    shard_tokens: int = SHARD_TOKENS,
    overwrite: bool = False,
    progress: bool = True,
) -> Prepared:
    """Encodes the text of the sources and writes `train/`, `validation/` and `tokenizer/` into a directory.

    A directory that was made of the same sources, tokenizer and settings is opened and given back at once.

    Args:
        sources: files, patterns, dataset names; see `lmzoo.data.sources`.
        tokenizer: that encodes.
        directory: to be written.
        validation_fraction: documents set aside, from 0 up to but not including 1. A hash of the text and the seed
            decides, so that equal documents go the same way; if more than 0, at least one document goes each way.
        seed: of the split.
        separator: what stands between two documents of a text file; None for the rule of `lmzoo.data.sources`.
        end_documents: whether the tokenizer's end-of-sequence token, if it has one, is put after every document. Masked
            LM puts special tokens around documents itself.
        num_processes: processes that encode. With 1, the tokenizer works in this process, on all cores if it can.
        shard_tokens: tokens in a file of the corpus, see `CorpusWriter`.
        overwrite: whether to replace what was prepared in that directory from something else.
        progress: whether to show a progress bar on standard error.

    Raises:
        FileNotFoundError: a source is not there.
        FileExistsError: the directory has something else in it, and it is not a prepared one or `overwrite` is false.
        ValueError: a setting out of range; text that cannot be read; a single document, if some must be set aside.
        OSError: the disk is full. Nothing is left behind.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction: {validation_fraction}; it must be at least 0 and less than 1")
    if num_processes < 1:
        raise ValueError(f"num_processes: {num_processes}; it must be at least 1")
    opened = open_sources(sources, separator)
    directory = Path(directory)
    manifest = _manifest(opened, tokenizer, validation_fraction, seed, end_documents, shard_tokens)
    existing = _existing(directory, manifest, overwrite)
    if existing is not None:
        return existing
    with new_directory(directory, overwrite, marker=_MANIFEST) as path:
        tokenizer.save_pretrained(path / "tokenizer")
        with contextlib.ExitStack() as stack:
            writers = [
                stack.enter_context(
                    CorpusWriter.create(
                        path / name,
                        vocab_size=tokenizer.vocab_size,
                        tokenizer_fingerprint=tokenizer.fingerprint,
                        shard_tokens=shard_tokens,
                    )
                )
                for name in (("train", "validation") if validation_fraction else ("train",))
            ]
            documents = _split(iterate(opened), validation_fraction, seed)
            bar = stack.enter_context(_Bar(opened, progress))
            for batch, tokens, lengths in _encode(_batches(documents), tokenizer, end_documents, num_processes):
                _write(batch, tokens, lengths, writers)
                bar.show(batch.position, writers)
        (path / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    return _open(directory, verify=False)


class _Batch(NamedTuple):
    """Some documents to encode at a time; `sides` are 0 for training and 1 for validation."""

    texts: list[str]
    sides: list[int]
    position: int


def _manifest(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    validation_fraction: float,
    seed: int,
    end_documents: bool,
    shard_tokens: int,
) -> dict[str, Any]:
    manifest = {
        "format_version": 1,
        "sources": [source.identity() for source in sources],
        "tokenizer": tokenizer.fingerprint,
        "validation_fraction": validation_fraction,
        "seed": seed,
        "end_documents": end_documents,
        "shard_tokens": shard_tokens,
    }
    return json.loads(json.dumps(manifest))


def _existing(directory: Path, manifest: dict[str, Any], overwrite: bool) -> Prepared | None:
    """Opens what is there, if it was made as the manifest says."""
    try:
        found = {"end_documents": True, **json.loads((directory / _MANIFEST).read_bytes())}
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    differing = [name for name in manifest if found.get(name) != manifest[name]]
    if not differing:
        try:
            return _open(directory, verify=overwrite)
        except (ValueError, FileNotFoundError):
            if not overwrite:
                raise
    elif not overwrite:
        raise FileExistsError(
            f"{directory}: prepared from something else ({', '.join(differing)} not the same); pass overwrite=True, or "
            "name another directory"
        )
    return None


def _open(directory: Path, verify: bool) -> Prepared:
    validation = directory / "validation"
    return Prepared(
        Corpus.open(directory / "train", verify=verify),
        Corpus.open(validation, verify=verify) if validation.exists() else None,
    )


def _split(
    documents: Iterable[tuple[str, int]], validation_fraction: float, seed: int
) -> Iterator[tuple[str, int, int]]:
    """Yields each text, its side (1 is validation) and its position.

    As long as all documents go to one side, the one whose hash is nearest to the other side is held back: it goes there
    if no other does. (So the first few documents may change places.)
    """
    threshold = int(validation_fraction * 2.0**64)
    key = seed.to_bytes(16, "little", signed=True)
    held: tuple[int, str] | None = None
    both, first_side, single, position = validation_fraction == 0, 0, True, 0
    for text, position in documents:
        number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8, key=key).digest(), "little")
        side = int(number < threshold)
        if both:
            yield text, side, position
        elif held is None:
            held, first_side = (number, text), side
            continue
        elif side != first_side:
            yield held[1], first_side, position
            yield text, side, position
            both = True
        else:
            nearer = number > held[0] if first_side else number < held[0]
            if nearer:
                held, text = (number, text), held[1]
            yield text, side, position
        single = False
    if not both and held is not None:
        if single:
            raise ValueError(
                f"validation_fraction: {validation_fraction}, but a single document cannot be on both sides; "
                "give a separator, or more text, or set validation_fraction to 0"
            )
        yield held[1], 1 - first_side, position


def _batches(documents: Iterable[tuple[str, int, int]]) -> Iterator[_Batch]:
    texts: list[str] = []
    sides: list[int] = []
    size = position = 0
    for text, side, position in documents:
        texts.append(text)
        sides.append(side)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield _Batch(texts, sides, position)
            texts, sides, size = [], [], 0
    if texts:
        yield _Batch(texts, sides, position)


def _write(batch: _Batch, tokens: np.ndarray, lengths: np.ndarray, writers: Sequence[CorpusWriter]) -> None:
    sides = np.array(batch.sides)
    sizes = np.array([len(text.encode()) for text in batch.texts])
    side_of_token = np.repeat(sides, lengths)
    for side, writer in enumerate(writers):
        here = (sides == side) & (lengths > 0)
        writer.add(tokens[side_of_token == side], lengths[here], int(sizes[here].sum()))


class _Bar:
    """A progress bar; a context manager."""

    def __init__(self, sources: Sequence[Source], visible: bool) -> None:
        sizes = [source.size for source in sources]
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[counts]}"))
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, *times, console=Console(stderr=True), disable=not visible)
        self._task = self._progress.add_task("preparing", total=sum(sizes) if all(sizes) else None, counts="")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def show(self, position: int, writers: Sequence[CorpusWriter]) -> None:
        """Shows how far reading has come, and what has been written."""
        documents, size, tokens = (
            sum(getattr(writer, name) for writer in writers) for name in ("num_documents", "num_bytes", "num_tokens")
        )
        counts = f"{documents:,} documents, {size / 1e6:,.1f} MB, {tokens:,} tokens"
        self._progress.update(self._task, completed=position, counts=counts)

    def __exit__(self, *error: object) -> None:
        self._progress.stop()


def encode_documents(tokenizer: Tokenizer, texts: list[str], end: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Gives the ids of all the texts, each with the id `end` behind it if there is one, and how many each text has."""
    ids = tokenizer.encode(texts)
    if end is not None:
        for document in ids:
            document.append(end)
    lengths = np.fromiter(map(len, ids), np.int64, len(ids))
    return np.fromiter(itertools.chain.from_iterable(ids), np.int32, int(lengths.sum())), lengths


def _encode(
    batches: Iterable[_Batch], tokenizer: Tokenizer, end_documents: bool, num_processes: int
) -> Iterator[tuple[_Batch, np.ndarray, np.ndarray]]:
    """Encodes batches in their order, with no more than a few of them in memory."""
    end = tokenizer.eos_token_id if end_documents else None
    if num_processes == 1:
        for batch in batches:
            yield batch, *encode_documents(tokenizer, batch.texts, end)
        return
    workers = [_Worker(tokenizer) for _ in range(num_processes)]
    idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        worker = idle.get()
        try:
            return worker.encode(texts, end)
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(num_processes)
    pending: deque[tuple[_Batch, Future[tuple[np.ndarray, np.ndarray]]]] = deque()
    try:
        for batch in batches:
            pending.append((batch, threads.submit(encode, batch.texts)))
            if len(pending) > 2 * num_processes:
                done, result = pending.popleft()
                yield done, *result.result()
        while pending:
            done, result = pending.popleft()
            yield done, *result.result()
    finally:
        for worker in workers:
            worker.stop()
        threads.shutdown(cancel_futures=True)


class _Worker:
    """A process that encodes.

    It is a fresh interpreter, not a fork and not one of `multiprocessing`: a fork of a process that has TensorFlow in
    it may hang, and `multiprocessing` would run the caller's script again.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._start = pickle.dumps(sys.path) + pickle.dumps(tokenizer)

    def encode(self, texts: list[str], end: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Sends texts, and the id behind each of them, and waits for their ids."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(self._start + pickle.dumps((texts, end)))
            self._process.stdin.flush()
            self._start = b""
            answer = pickle.load(self._process.stdout)
        except (BrokenPipeError, EOFError) as error:
            status = self._process.wait()
            raise RuntimeError(f"a process that encodes text ended by itself (exit status {status})") from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def stop(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()


def serve() -> None:
    """The work of such a process: encodes what comes on standard input until that is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted as well, and ends this process
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not come between the answers
    tokenizer = pickle.load(requests)
    while True:
        try:
            texts, end = pickle.load(requests)
        except EOFError:
            return
        try:
            answer: Any = encode_documents(tokenizer, texts, end)
        except Exception as error:
            answer = error
        pickle.dump(answer, answers)
        answers.flush()

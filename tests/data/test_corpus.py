import errno
import json
import multiprocessing
import os
import resource
import signal
import time
from dataclasses import dataclass

import numpy as np
import pytest

from lmzoo.data.corpus import Corpus, CorpusWriter

DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 0]]


@dataclass
class FakeTokenizer:
    fingerprint: str


def write(directory, documents=DOCUMENTS, vocab_size=100, **settings):
    with CorpusWriter.create(directory, vocab_size=vocab_size, tokenizer_fingerprint="abc", **settings) as writer:
        for document in documents:
            writer.add(document, [len(document)], num_bytes=10)
    return directory


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize(("vocab_size", "width"), [(65_536, 2), (65_537, 4)])
@pytest.mark.parametrize("shard_tokens", [1, 4, 5, 1000])
def test_gives_back_what_was_written(tmp_path, vocab_size, width, shard_tokens):
    documents = [*DOCUMENTS, [vocab_size - 1, 0]]
    corpus = Corpus.open(write(tmp_path / "c", documents, vocab_size, shard_tokens=shard_tokens))
    flat = np.concatenate(documents)
    assert (corpus.num_tokens, corpus.num_documents, corpus.num_bytes) == (len(flat), 6, 60)
    assert (corpus.vocab_size, corpus.tokenizer_fingerprint) == (vocab_size, "abc")
    np.testing.assert_array_equal(corpus.document_ends, np.cumsum([len(document) for document in documents]))
    assert [corpus.document(number).tolist() for number in range(6)] == documents
    places = np.random.default_rng(0).integers(0, len(flat), (7, 5))
    taken = corpus.take(places)
    assert taken.dtype == np.int32
    np.testing.assert_array_equal(taken, flat[places])
    size = sum(path.stat().st_size for path in (tmp_path / "c").glob("tokens-*.bin"))
    assert size == width * len(flat)
    with pytest.raises(IndexError, match="no document 6"):
        corpus.document(6)


@pytest.mark.parametrize("shard_tokens", [4, 5, 8])
def test_shards_hold_whole_documents_whether_added_one_by_one_or_at_once(tmp_path, shard_tokens):
    write(tmp_path / "one", shard_tokens=shard_tokens)
    with CorpusWriter.create(
        tmp_path / "all", vocab_size=100, tokenizer_fingerprint="abc", shard_tokens=shard_tokens
    ) as writer:
        writer.add(np.concatenate(DOCUMENTS), [len(document) for document in DOCUMENTS], num_bytes=50)
    assert {name: (tmp_path / "one" / name).read_bytes() for name in names(tmp_path / "one")} == {
        name: (tmp_path / "all" / name).read_bytes() for name in names(tmp_path / "all")
    }
    lengths = [path.stat().st_size // 2 for path in sorted((tmp_path / "all").glob("tokens-*.bin"))]
    assert lengths == {4: [4, 7, 2, 3], 5: [4, 7, 5], 8: [4, 7, 5]}[shard_tokens]


def test_bad_documents_are_refused_and_nothing_is_left(tmp_path):
    for tokens, lengths, message in [
        ([1, 100], [2], "token id 100"),
        ([-1], [1], "token id -1"),
        ([1, 2], [2, 0], "0 the least"),
        ([1, 2], [1], "for 2 tokens"),
    ]:
        with (
            pytest.raises(ValueError, match=message),
            CorpusWriter.create(tmp_path / "c", vocab_size=100, tokenizer_fingerprint="abc") as writer,
        ):
            writer.add(tokens, lengths, num_bytes=1)
    with pytest.raises(ValueError, match="cannot be empty"):
        write(tmp_path / "c", documents=[])
    with pytest.raises(ValueError, match="shard_tokens: 0"):
        write(tmp_path / "c", shard_tokens=0)
    assert names(tmp_path) == []


def test_a_shard_cut_short_altered_or_gone_is_told(tmp_path):
    directory = write(tmp_path / "c", shard_tokens=4)
    shard = directory / "tokens-00001.bin"
    whole = shard.read_bytes()

    shard.write_bytes(whole[:-2])
    with pytest.raises(ValueError, match=r"tokens-00001.bin: 12 bytes where 14 were written; prepare"):
        Corpus.open(directory, verify=False)

    shard.write_bytes(whole[:-2] + b"\1\1")
    Corpus.open(directory, verify=False)
    with pytest.raises(ValueError, match=r"tokens-00001.bin: altered"):
        Corpus.open(directory)

    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"tokens-00001.bin: this file of the corpus is missing"):
        Corpus.open(directory)

    shard.write_bytes(whole)
    Corpus.open(directory)
    documents = directory / "documents.bin"
    documents.write_bytes(documents.read_bytes()[::-1])
    with pytest.raises(ValueError, match=r"documents.bin: altered"):
        Corpus.open(directory)


def test_a_damaged_or_foreign_description_is_told(tmp_path):
    directory = write(tmp_path / "c")
    path = directory / "corpus.json"
    info = json.loads(path.read_text())
    for change, message in [
        ({"format_version": 2}, "format version 2; this lmzoo reads 1"),
        ({"num_tokens": 15}, "do not agree"),
        ({"num_documents": 4}, "do not agree"),
        ({"dtype": "nonsense"}, "damaged"),
        ({"colour": "red"}, "damaged"),
        ({"shards": [{"file": "tokens-00000.bin"}]}, "damaged"),
    ]:
        path.write_text(json.dumps(info | change))
        with pytest.raises(ValueError, match=message):
            Corpus.open(directory)
    path.write_text(json.dumps(info)[:-20])
    with pytest.raises(ValueError, match="damaged"):
        Corpus.open(directory)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"not a corpus, it has no corpus.json"):
        Corpus.open(directory)


def test_another_tokenizer_is_told(tmp_path):
    directory = write(tmp_path / "c")
    Corpus.open(directory, FakeTokenizer("abc"))
    with pytest.raises(ValueError, match="made with tokenizer abc, and the one given is xyz"):
        Corpus.open(directory, FakeTokenizer("xyz"))


def test_overwrites_only_what_it_may(tmp_path):
    directory = write(tmp_path / "c")
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        write(directory)
    assert Corpus.open(directory).num_documents == 5
    write(directory, [[7]], overwrite=True)
    assert Corpus.open(directory).num_tokens == 1

    mine = tmp_path / "thesis"
    mine.mkdir()
    write(mine)  # an empty directory is free to use
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "chapter.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"has no corpus.json in it"):
        write(tmp_path / "precious", overwrite=True)
    assert names(tmp_path) == ["c", "precious", "thesis"]
    assert names(tmp_path / "precious") == ["chapter.txt"]


def test_a_failed_overwrite_keeps_the_old_corpus(tmp_path):
    directory = write(tmp_path / "c")
    with pytest.raises(ValueError, match="token id 500"):
        write(directory, [[1], [500]], overwrite=True)
    assert Corpus.open(directory).num_documents == 5
    assert names(tmp_path) == ["c"]


def _write_until_stopped(directory):
    with CorpusWriter.create(directory, vocab_size=100, tokenizer_fingerprint="abc", shard_tokens=2) as writer:
        writer.add([1, 2, 3], [1, 2], num_bytes=3)
        time.sleep(60)


def test_a_killed_writer_leaves_no_corpus_and_the_next_one_cleans_up(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=_write_until_stopped, args=(tmp_path / "c",))
    process.start()
    try:
        limit = time.monotonic() + 30
        while not list(tmp_path.glob(".c.partial/tokens-00001.bin")) and time.monotonic() < limit:
            time.sleep(0.02)
        assert names(tmp_path) == [".c.partial"]
        with pytest.raises(FileExistsError, match="another process is writing"):
            write(tmp_path / "c")
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert names(tmp_path) == [".c.partial"]
    with pytest.raises(FileNotFoundError):
        Corpus.open(tmp_path / "c")
    write(tmp_path / "c")
    assert names(tmp_path) == ["c"]
    assert names(tmp_path / "c") == ["corpus.json", "documents.bin", "tokens-00000.bin"]


def test_an_overwrite_killed_half_way_gives_the_old_corpus_back(tmp_path):
    write(tmp_path / "c").rename(tmp_path / ".c.replaced")
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        write(tmp_path / "c")
    assert Corpus.open(tmp_path / "c").num_documents == 5
    assert names(tmp_path) == ["c"]


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    def no_space(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("lmzoo.data.corpus.os.fsync", no_space)
    with pytest.raises(OSError, match=r"No space left on device while writing .*/c; nothing was left behind") as caught:
        write(tmp_path / "c")
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == []


def _write_with_a_limit(directory, result):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    try:
        write(directory, [[1] * 5000] * 50)
    except OSError as error:
        result.put((error.errno, str(error)))


def test_a_write_that_the_system_refuses_is_told_and_leaves_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")
    result = context.Queue()
    process = context.Process(target=_write_with_a_limit, args=(tmp_path / "c", result))
    process.start()
    number, message = result.get(timeout=60)
    process.join()
    assert number == errno.EFBIG
    assert "nothing was left behind" in message
    assert names(tmp_path) == []

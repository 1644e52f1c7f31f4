import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from lmzoo.data import prepare as prepare_module
from lmzoo.data.corpus import Corpus
from lmzoo.data.prepare import prepare
from lmzoo.data.tokenizers import Tokenizer

STORIES = [f"Story {number}: the cat sat on mat {number * number}, naïvely.\n" for number in range(200)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(iter(STORIES), kind="bpe", vocab_size=400)


@pytest.fixture
def stories(tmp_path):
    path = tmp_path / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": story}) + "\n" for story in STORIES))
    return path


def run(sources, tokenizer, directory, **settings):
    return prepare(sources, tokenizer, directory, progress=False, **settings)


def texts(corpus, tokenizer):
    documents = [corpus.document(number) for number in range(corpus.num_documents)]
    assert all(document[-1] == tokenizer.eos_token_id for document in documents)
    return [tokenizer.decode(document[:-1]) for document in documents]


def files(directory):
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("num_processes", [1, 2])
def test_documents_may_have_no_end(tmp_path, stories, tokenizer, num_processes):
    options = {"end_documents": False, "num_processes": num_processes}
    train, _ = run(stories, tokenizer, tmp_path / "out", **options)
    assert tokenizer.eos_token_id not in train.take(np.arange(train.num_tokens))
    assert tokenizer.decode(train.document(0)) in STORIES
    with pytest.raises(FileExistsError, match="end_documents not the same"):
        run(stories, tokenizer, tmp_path / "out")


def test_every_document_is_on_one_side_in_its_order(tmp_path, stories, tokenizer):
    train, validation = run(stories, tokenizer, tmp_path / "out", validation_fraction=0.2)
    sides = [texts(train, tokenizer), texts(validation, tokenizer)]
    assert sorted(sides[0] + sides[1]) == sorted(STORIES)
    for side in sides:  # in order, but for what had been held back before there were documents on both sides
        order = [STORIES.index(story) for story in side]
        assert order[20:] == sorted(order)[20:]
    assert 20 <= len(sides[1]) <= 60
    for corpus, side in zip((train, validation), sides, strict=True):
        assert corpus.num_bytes == sum(len(story.encode()) for story in side)
        assert corpus.vocab_size == tokenizer.vocab_size
    reopened = Tokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    assert Corpus.open(tmp_path / "out" / "train", reopened).num_tokens == train.num_tokens
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "stories.jsonl"]


def test_the_split_goes_by_the_text_and_the_seed(tmp_path, stories, tokenizer):
    def held_out(name, sources=stories, seed=0):
        _, validation = run(sources, tokenizer, tmp_path / name, validation_fraction=0.3, seed=seed)
        return set(texts(validation, tokenizer))

    backwards = tmp_path / "backwards.jsonl"
    backwards.write_text("".join(stories.read_text().splitlines(keepends=True)[::-1]))
    first = held_out("one")
    assert held_out("two", backwards) == first
    assert held_out("three", seed=1) != first
    twice = held_out("four", [stories, backwards])
    assert twice == first
    names = ["five", "six"]  # where a document must be moved, too, which one it is goes by its text
    for name, source in zip(names, (stories, backwards), strict=True):
        run(source, tokenizer, tmp_path / name, validation_fraction=1e-9)
    moved = [Corpus.open(tmp_path / name / "validation").document(0).tolist() for name in names]
    assert moved[0] == moved[1]


def test_no_validation(tmp_path, stories, tokenizer):
    train, validation = run(stories, tokenizer, tmp_path / "out", validation_fraction=0)
    assert (train.num_documents, validation) == (200, None)
    assert not (tmp_path / "out" / "validation").exists()
    assert run(stories, tokenizer, tmp_path / "out", validation_fraction=0).validation is None


@pytest.mark.parametrize("fraction", [1e-9, 0.5, 0.999999])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_each_side_gets_at_least_one_document(tmp_path, tokenizer, fraction, count):
    for seed in range(4):
        path = tmp_path / f"{seed}.txt"
        lines = [f"{seed} line {number}" for number in range(count)]
        path.write_text("\n".join(lines))
        out = tmp_path / f"out{seed}"
        train, validation = run(path, tokenizer, out, validation_fraction=fraction, seed=seed, separator="\n")
        assert min(train.num_documents, validation.num_documents) >= 1
        if fraction != 0.5:
            assert min(train.num_documents, validation.num_documents) == 1
        assert sorted(texts(train, tokenizer) + texts(validation, tokenizer)) == lines


def test_a_single_document_cannot_be_split(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("one document")
    with pytest.raises(ValueError, match=r"validation_fraction: 0.05, but a single document .* give a separator"):
        run(path, tokenizer, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt"]
    assert run(path, tokenizer, tmp_path / "out", validation_fraction=0).train.num_documents == 1


def test_the_number_of_processes_changes_nothing(tmp_path, stories, tokenizer, monkeypatch):
    monkeypatch.setattr(prepare_module, "_BATCH_CHARACTERS", 500)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    for number in (1, 2, 3):
        run(stories, tokenizer, tmp_path / str(number), num_processes=number, validation_fraction=0.2)
    first = files(tmp_path / "1")
    assert len(first) >= 9
    assert files(tmp_path / "2") == first
    assert files(tmp_path / "3") == first


def test_workers_need_no_guard_in_the_script_and_no_tensorflow(tmp_path, stories, tokenizer):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {os.getcwd()!r})\n"
        "from lmzoo.data import prepare as module\n"
        "from lmzoo.data.tokenizers import Tokenizer\n"
        "print('script')\n"
        "module._SERVE = module._SERVE.replace('serve()', "
        "\"serve(); print('tensorflow' in sys.modules or 'keras' in sys.modules, file=sys.stderr)\")\n"
        "module._BATCH_CHARACTERS = 500\n"
        "module._Worker.stop = lambda worker: worker._process.communicate()\n"
        f"tokenizer = Tokenizer.from_pretrained({str(tmp_path / 'tokenizer')!r})\n"
        f"module.prepare({str(stories)!r}, tokenizer, {str(tmp_path / 'out')!r}, num_processes=2, progress=False)\n"
        "print('tensorflow' in sys.modules)\n"
    )
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stderr.split() == ["False", "False"]
    assert result.stdout.split() == ["script", "False"]


def test_a_worker_that_ends_by_itself_is_told(tmp_path, stories, tokenizer, monkeypatch):
    monkeypatch.setattr(prepare_module, "_SERVE", "import sys; sys.exit(7)")
    with pytest.raises(RuntimeError, match=r"a process that encodes text ended by itself \(exit status 7\)"):
        run(stories, tokenizer, tmp_path / "out", num_processes=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stories.jsonl"]


def test_an_error_of_a_worker_or_of_a_source_comes_through(tmp_path, stories, tokenizer, monkeypatch):
    monkeypatch.setattr(prepare_module, "_BATCH_CHARACTERS", 100)
    with stories.open("a") as file:
        file.write("{}\n")
    for number in (1, 2):
        with pytest.raises(ValueError, match=r"stories.jsonl, line 201: no field 'text'"):
            run(stories, tokenizer, tmp_path / "out", num_processes=number)
    worker = prepare_module._Worker(tokenizer)
    try:
        with pytest.raises(TypeError):
            worker.encode([3])
        assert len(worker.encode(["fine", "again"])[1]) == 2
    finally:
        worker.stop()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stories.jsonl"]


def test_the_same_again_is_given_back_at_once(tmp_path, stories, tokenizer, monkeypatch):
    first = run(stories, tokenizer, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "_encode", None)  # nothing is encoded
        again = run(stories, tokenizer, tmp_path / "out")
        run(stories, tokenizer, tmp_path / "out", num_processes=3, overwrite=True)
    assert again.train.num_tokens == first.train.num_tokens
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


def test_something_else_is_replaced_only_on_request(tmp_path, stories, tokenizer):
    out = tmp_path / "out"
    run(stories, tokenizer, out)
    other = Tokenizer.train(iter(STORIES), kind="char")
    for settings, what in [({"seed": 5}, "seed"), ({"validation_fraction": 0.5}, "validation_fraction")]:
        with pytest.raises(FileExistsError, match=rf"prepared from something else \({what} not the same\); pass"):
            run(stories, tokenizer, out, **settings)
    with pytest.raises(FileExistsError, match=r"\(tokenizer not the same\)"):
        run(stories, other, out)
    assert Corpus.open(out / "train").tokenizer_fingerprint == tokenizer.fingerprint
    assert run(stories, other, out, overwrite=True).train.tokenizer_fingerprint == other.fingerprint
    stories.write_text(stories.read_text() * 2)
    with pytest.raises(FileExistsError, match=r"\(sources not the same\)"):
        run(stories, other, out)
    train, validation = run(stories, other, out, overwrite=True)
    assert train.num_documents + validation.num_documents == 400

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"mine: is there and has no prepare.json in it"):
        run(stories, other, mine, overwrite=True)


def test_a_damaged_corpus_is_told_and_can_be_prepared_again(tmp_path, stories, tokenizer):
    out = tmp_path / "out"
    run(stories, tokenizer, out)
    shard = out / "train" / "tokens-00000.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-2])
    with pytest.raises(ValueError, match=r"tokens-00000.bin: [\d,]+ bytes where [\d,]+ were written"):
        run(stories, tokenizer, out)
    shard.write_bytes(bytes(len(whole)))
    run(stories, tokenizer, out, overwrite=True)
    assert shard.read_bytes() == whole


def test_a_full_disk_leaves_nothing(tmp_path, stories, tokenizer, monkeypatch):
    def no_space(file, array):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("lmzoo.data.corpus._HashedFile.write", no_space)
    with pytest.raises(OSError, match=r"No space left on device while writing .*/out; nothing was left behind"):
        run(stories, tokenizer, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stories.jsonl"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation_fraction": 1.0}, "validation_fraction: 1.0"),
        ({"validation_fraction": -0.1}, "validation_fraction: -0.1"),
        ({"num_processes": 0}, "num_processes: 0"),
        ({"shard_tokens": 0}, "shard_tokens: 0"),
    ],
)
def test_bad_settings_are_told(tmp_path, stories, tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        run(stories, tokenizer, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_an_end_token_adds_none(tmp_path, stories):
    wordpiece = Tokenizer.train(iter(STORIES), kind="wordpiece", vocab_size=300)
    assert wordpiece.eos_token_id is None
    path = tmp_path / "a.txt"
    path.write_text("the cat\n\x07\nthe mat")  # nothing is left of a control character
    train, _ = run(path, wordpiece, tmp_path / "out", validation_fraction=0, separator="\n")
    assert train.num_documents == 2
    assert train.document(1).tolist() == wordpiece.encode("the mat")
    assert train.num_bytes == len("the cat") + len("the mat")


def test_the_bar_goes_to_standard_error(tmp_path, stories, tokenizer, capfd):
    prepare(stories, tokenizer, tmp_path / "out", validation_fraction=0)
    output = capfd.readouterr()
    assert output.out == ""
    assert "200 documents" in output.err


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_memory_does_not_grow_with_the_text(tmp_path, tokenizer, num_processes):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    text = tmp_path / "text.txt"
    program = (
        "import re, resource; from lmzoo.data.prepare import prepare; from lmzoo.data.tokenizers import Tokenizer; "
        f"prepare({str(text)!r}, Tokenizer.from_pretrained({str(tmp_path / 'tokenizer')!r}), "
        f"{str(tmp_path / 'out')!r}, overwrite=True, progress=False, num_processes={num_processes}); "
        # Not this process's ru_maxrss, which begins with what the one that started it held.
        r"own = int(re.search('VmHWM:\s+(\d+)', open('/proc/self/status').read())[1]); "
        "print(own + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    peaks = []
    for copies in (500, 2000):
        with text.open("w") as file:
            for number in range(copies):
                file.write(f"{number}\n\n" + "".join(STORIES))
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        peaks.append(int(result.stdout) / 1024)
    assert peaks[1] < peaks[0] + 40
    assert np.max(peaks) < 600

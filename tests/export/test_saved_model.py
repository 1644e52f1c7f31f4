"""Numbered versions that appear whole and are never touched again, whoever watches and whatever fails."""

import threading
from pathlib import Path

import pytest
import tensorflow as tf

from lmzoo.export import saved_versions, write_saved_model


class Scale(tf.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = tf.Variable(factor)

    @tf.function(input_signature=[tf.TensorSpec([None], tf.float32, "x")])
    def scale(self, x):
        return {"y": x * self.factor}


def write(directory, factor=2.0, **settings):
    module = Scale(factor)
    return write_saved_model(directory, module, {"serving_default": module.scale}, **settings)


def result(path):
    loaded = tf.saved_model.load(str(path))
    return loaded.signatures["serving_default"](tf.constant([1.0]))["y"].numpy().tolist()


def content(path):
    return {file.relative_to(path): file.read_bytes() for file in Path(path).rglob("*") if file.is_file()}


def test_versions_are_counted_from_one_and_what_is_no_version_is_left_alone(tmp_path):
    directory = tmp_path / "deep" / "model"
    assert saved_versions(directory) == []
    assert write(directory, 2.0) == directory / "1"
    for other in ("latest", "7.bak", ".9.tmp", "-3"):
        (directory / other).mkdir()
    (directory / "8").write_text("a file")
    assert write(directory, 3.0) == directory / "2"
    assert write(str(directory), 4.0, version=10) == directory / "10"
    assert write(directory, 5.0) == directory / "11"
    assert saved_versions(directory) == [1, 2, 10, 11]
    assert [result(directory / str(version)) for version in (1, 2, 10, 11)] == [[2.0], [3.0], [4.0], [5.0]]
    assert {path.name for path in directory.iterdir()} == {"1", "2", "10", "11", "latest", "7.bak", ".9.tmp", "-3", "8"}


def test_a_version_is_never_overwritten_and_numbers_only_go_up(tmp_path):
    before = content(write(tmp_path, 2.0, version=5))
    with pytest.raises(FileExistsError, match="5 exists, and a version is never overwritten"):
        write(tmp_path, 3.0, version=5)
    with pytest.raises(ValueError, match=r"version is 4, but .* holds version 5 already.* None for 6"):
        write(tmp_path, 3.0, version=4)
    assert saved_versions(tmp_path) == [5]
    assert content(tmp_path / "5") == before


@pytest.mark.parametrize("version", [0, -1, 1.0, "1", True])
def test_a_version_that_is_no_number_is_refused(tmp_path, version):
    with pytest.raises(ValueError, match="must be an integer of 1 or more"):
        write(tmp_path / "new", version=version)
    assert not (tmp_path / "new").exists()


def test_nothing_is_left_when_writing_fails(tmp_path, monkeypatch):
    write(tmp_path)

    def full_disk(module, path, **settings):
        Path(path).mkdir()
        (Path(path) / "saved_model.pb").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tf.saved_model, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]


@pytest.mark.parametrize("version", [None, 1])
def test_a_number_taken_in_the_meantime_is_left_to_who_took_it(tmp_path, monkeypatch, version):
    save = tf.saved_model.save

    def save_while_another_does(module, path, **settings):
        save(module, path, **settings)
        (tmp_path / "1").mkdir()
        (tmp_path / "1" / "saved_model.pb").write_bytes(b"another's")

    monkeypatch.setattr(tf.saved_model, "save", save_while_another_does)
    if version is None:
        assert write(tmp_path, 3.0) == tmp_path / "2"
        assert result(tmp_path / "2") == [3.0]
    else:
        with pytest.raises(FileExistsError, match="written by another process"):
            write(tmp_path, version=version)
    assert (tmp_path / "1" / "saved_model.pb").read_bytes() == b"another's"
    assert not list(tmp_path.glob(".*"))


def watch(directory, examine, write_all):
    """Examines each version as soon as a second thread sees it, while `write_all` runs; gives what it found."""
    seen, done = {}, threading.Event()

    def look():
        while True:
            last = done.is_set()
            for version in saved_versions(directory):
                if version not in seen:
                    seen[version] = examine(directory / str(version))
            if last:
                return

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        write_all()
    finally:
        done.set()
        watcher.join()
    return seen


def test_a_watcher_sees_whole_versions_only(tmp_path):
    seen = watch(tmp_path, content, lambda: [write(tmp_path, float(number)) for number in range(10)])
    assert sorted(seen) == list(range(1, 11))
    for version, files in seen.items():
        assert Path("saved_model.pb") in files
        assert files == content(tmp_path / str(version))


@pytest.mark.slow
def test_a_server_that_loads_each_version_at_once_never_meets_a_broken_one(tmp_path):
    seen = watch(tmp_path, result, lambda: [write(tmp_path, float(number)) for number in range(1, 101)])
    assert seen == {number: [float(number)] for number in range(1, 101)}

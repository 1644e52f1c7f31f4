"""Reading and writing the files of a checkpoint: any damage is one clear error, and a save is all or nothing."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import stat
import weakref
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from lmzoo import checkpoints
from lmzoo.checkpoints import CheckpointError, files

CONFIG = {"model_type": "toy", "width": 3}


def make_tensors(fill=1.0, count=4):
    return {f"layer.{number}": np.full((2, 3), fill + number, "float32") for number in range(count)}


def write(directory, tensors=None, config=None, **options):
    readers = {name: (lambda tensor=tensor: tensor) for name, tensor in (tensors or make_tensors()).items()}
    checkpoints.write_checkpoint(directory, config or CONFIG, readers, **options)


def read(directory):
    """Config and tensors, read as one."""
    with checkpoints.unchanged(directory):
        config = checkpoints.read_config(directory)
        tensors = {name: read() for name, read in checkpoints.read_tensors(directory).items()}
    return config, tensors


def assert_holds(directory, tensors, config=None):
    found_config, found = read(directory)
    assert found_config == (config or CONFIG)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        np.testing.assert_array_equal(found[name], tensor)


def names_in(directory):
    return sorted(path.name for path in Path(directory).iterdir())


@pytest.mark.parametrize("max_shard_bytes", [10**9, 60, 1])
def test_round_trip(tmp_path, max_shard_bytes):
    tensors = make_tensors() | {
        "scalar": np.float32(7),
        "empty": np.zeros((0, 4), "float32"),
        "half": np.arange(6).astype(ml_dtypes.bfloat16),
        "strided": np.arange(12, dtype="float32").reshape(3, 4).T,
    }
    write(tmp_path / "new" / "directory", tensors, max_shard_bytes=max_shard_bytes)
    assert_holds(tmp_path / "new" / "directory", tensors)


def test_shards_hold_as_much_as_they_may(tmp_path):
    write(tmp_path, make_tensors(count=5), max_shard_bytes=48)  # Two tensors of 24 bytes each.
    shards = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    assert names_in(tmp_path) == ["config.json", *shards, "model.safetensors.index.json"]
    assert [len(safetensors.numpy.load_file(tmp_path / shard)) for shard in shards] == [2, 2, 1]
    for shard in shards:  # Older readers look at this before anything else.
        assert safetensors.safe_open(tmp_path / shard, "numpy").metadata() == {"format": "pt"}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 5 * 24}
    assert index["weight_map"] == {f"layer.{number}": shards[number // 2] for number in range(5)}


def test_one_shard_is_in_memory_at_a_time():
    made, most = [], 0

    def read():
        nonlocal most
        tensor = np.ones(6, "float32")
        made.append(weakref.ref(tensor))
        most = max(most, sum(each() is not None for each in made))
        return tensor

    names = [list(shard) for shard in files._shards(dict.fromkeys("abcdefg", read), 48)]
    assert names == [["a", "b"], ["c", "d"], ["e", "f"], ["g"]]
    assert most == 3  # The two of a shard, and the next tensor, which shows that the shard is full.


def test_files_are_readable_by_those_whom_the_user_lets(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path, max_shard_bytes=48)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o640}


@pytest.mark.parametrize("before", [10**9, 48, 24])
@pytest.mark.parametrize("after", [10**9, 48])
def test_a_new_checkpoint_takes_the_place_of_the_older_one(tmp_path, before, after):
    write(tmp_path, make_tensors(1.0), max_shard_bytes=before)
    for name in ("tokenizer.json", "model-best.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_text("mine")
    write(tmp_path, make_tensors(5.0), {"model_type": "other"}, max_shard_bytes=after)
    assert_holds(tmp_path, make_tensors(5.0), {"model_type": "other"})
    write(tmp_path / "fresh", max_shard_bytes=after)
    others = {"tokenizer.json", "model-best.safetensors", "pytorch_model.bin", "fresh"}
    assert set(names_in(tmp_path)) == set(names_in(tmp_path / "fresh")) | others


# -- Bad input.


def test_missing_directory(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"nowhere is not a directory; a checkpoint is one that holds config\.json"
    ):
        read(tmp_path / "nowhere")


def test_missing_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json is missing\."):
        read(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "is not JSON"), (b"\xff\xfe", "is not JSON"), (b"[1]", "holds a JSON list, but must hold an object")],
)
def test_damaged_config(tmp_path, content, message):
    write(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config\.json {message}"):
        read(tmp_path)


def test_no_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        CheckpointError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json\.$"
    ):
        read(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_never_read(tmp_path, name):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(
        CheckpointError, match="pickled weights, which lmzoo never reads: save them again as safetensors"
    ):
        read(tmp_path)


@pytest.mark.parametrize("size", [0, 4, 40, -1])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 48])
def test_truncated_weights(tmp_path, size, max_shard_bytes):
    write(tmp_path, max_shard_bytes=max_shard_bytes)
    path = max(tmp_path.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=rf"{path.name} is damaged or not a safetensors file"):
        read(tmp_path)


def edit_index(directory, change):
    path = Path(directory) / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_missing_shard(tmp_path):
    write(tmp_path, max_shard_bytes=48)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is missing"):
        read(tmp_path)


def test_an_index_that_names_what_is_not_there(tmp_path):
    write(tmp_path, max_shard_bytes=48)
    edit_index(tmp_path, lambda places: places.update({"layer.0": places["layer.3"], "extra": places["layer.3"]}))
    with pytest.raises(
        CheckpointError, match=r"extra in model-00002-of-00002\S+, layer\.0 in model-00002-of-00002\S+\.$"
    ):
        read(tmp_path)


@pytest.mark.parametrize(
    "place", ["../secret.safetensors", "/etc/passwd", "sub/file.safetensors", "..", ".", "", 7, None]
)
def test_an_index_that_leads_elsewhere(tmp_path, place):
    write(tmp_path / "checkpoint", max_shard_bytes=48)
    safetensors.numpy.save_file({"layer.0": np.ones(3)}, tmp_path / "secret.safetensors")
    edit_index(tmp_path / "checkpoint", lambda places: places.update({"layer.0": place}))
    with pytest.raises(CheckpointError, match=r"places layer\.0 in .*, which must be the name of a file beside it"):
        read(tmp_path / "checkpoint")


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_an_index_without_a_map(tmp_path, index):
    write(tmp_path, max_shard_bytes=48)
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match="has no weight_map from tensor names to files"):
        read(tmp_path)


def test_a_single_file_comes_before_an_index(tmp_path):
    """As in transformers, so that both read the same where a directory holds both."""
    write(tmp_path, make_tensors(1.0), max_shard_bytes=48)
    safetensors.numpy.save_file(make_tensors(5.0), tmp_path / "model.safetensors")
    assert_holds(tmp_path, make_tensors(5.0))


def test_links_to_files_are_followed(tmp_path):
    """Download caches keep files elsewhere and link to them."""
    write(tmp_path / "store", max_shard_bytes=48)
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "store").iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    assert_holds(tmp_path / "snapshot", make_tensors())


# -- All or nothing.


@pytest.mark.parametrize(
    ("sizes", "config_size", "max_shard_bytes"),
    [
        ([20_000, 20_000], 10, 10**9),  # The weights do not fit.
        ([2_000, 20_000], 10, 10_000),  # The second shard does not.
        ([2_000, 2_000], 40_000, 10**9),  # The config does not.
    ],
)
def test_a_full_disk_leaves_the_older_checkpoint(tmp_path, sizes, config_size, max_shard_bytes):
    """The system itself refuses to let a file grow."""
    write(tmp_path, make_tensors(1.0), max_shard_bytes=48)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    tensors = {f"layer.{number}": np.ones(size // 4, "float32") for number, size in enumerate(sizes)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write(tmp_path, tensors, {"note": "x" * config_size}, max_shard_bytes=max_shard_bytes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert_holds(tmp_path, make_tensors(1.0))


def fail_at_call(monkeypatch, number, error, *functions):
    """Has the `number`-th call of any of these (owner, name) raise; returns the list of calls so far."""
    calls = []

    def wrap(real):
        def wrapped(*args, **kwargs):
            calls.append(args)
            if len(calls) == number:
                raise error
            return real(*args, **kwargs)

        return wrapped

    for owner, name in functions:
        monkeypatch.setattr(owner, name, wrap(getattr(owner, name)))
    return calls


@pytest.mark.parametrize(("max_shard_bytes", "num_files"), [(10**9, 2), (48, 4)])
def test_failing_at_any_file_leaves_the_older_checkpoint(tmp_path, monkeypatch, max_shard_bytes, num_files):
    """Shards, index and config are put on the disk one after the other; each may be the one that does not fit."""
    write(tmp_path, make_tensors(1.0))
    before = names_in(tmp_path)
    for number in range(1, num_files + 1):
        with monkeypatch.context() as patch:
            fail_at_call(patch, number, OSError(errno.ENOSPC, "No space left on device"), (os, "fsync"))
            with pytest.raises(OSError, match="No space left on device"):
                write(tmp_path, make_tensors(5.0), {"model_type": "other"}, max_shard_bytes=max_shard_bytes)
        assert names_in(tmp_path) == before
        assert_holds(tmp_path, make_tensors(1.0))


def test_a_tensor_that_cannot_be_read_leaves_nothing(tmp_path):
    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.write_checkpoint(tmp_path, CONFIG, {"a": lambda: np.ones(30), "b": fail}, max_shard_bytes=1)
    assert names_in(tmp_path) == []


class _Killed(BaseException):
    """Stands in for SIGKILL: nothing that should happen afterwards happens."""


@pytest.mark.parametrize("before", [10**9, 48])
@pytest.mark.parametrize("after", [10**9, 48])
def test_a_kill_between_any_two_renames_never_shows_a_mixture(tmp_path, monkeypatch, before, after):
    """After each step of the exchange, a reader gets the old checkpoint, the new one, or an error."""
    seen = []
    for number in range(1, 20):
        directory = tmp_path / str(number)
        write(directory, make_tensors(1.0), {"of": "old"}, max_shard_bytes=before)
        with monkeypatch.context() as patch, contextlib.suppress(_Killed):
            calls = fail_at_call(patch, number, _Killed(), (Path, "replace"), (Path, "unlink"))
            write(directory, make_tensors(5.0), {"of": "new"}, max_shard_bytes=after)
        try:
            config, tensors = read(directory)
        except CheckpointError as error:
            seen.append(str(error))
            continue
        seen.append(config["of"])
        for name, tensor in make_tensors(1.0 if config["of"] == "old" else 5.0).items():
            np.testing.assert_array_equal(tensors[name], tensor)
        if len(calls) < number:
            break
    first, *errors, last = seen
    assert (first, last) == ("old", "new")
    assert errors
    assert all("a save is under way or was cut off" in error for error in errors)
    write(tmp_path / "2", make_tensors(9.0))  # A new save mends it.
    assert_holds(tmp_path / "2", make_tensors(9.0))


def test_a_reader_notices_a_save_in_between(tmp_path):
    """Config and weights are read one after the other; the new config may be the same as the old one."""
    write(tmp_path, make_tensors(1.0))

    def read_slowly():
        with checkpoints.unchanged(tmp_path):
            checkpoints.read_config(tmp_path)
            write(tmp_path, make_tensors(5.0))
            checkpoints.read_tensors(tmp_path)

    with pytest.raises(CheckpointError, match="was replaced while it was being read: read it again"):
        read_slowly()


def test_open_files_stay_what_they_were(tmp_path):
    write(tmp_path, make_tensors(1.0), max_shard_bytes=48)
    opened = checkpoints.read_tensors(tmp_path)
    write(tmp_path, make_tensors(5.0), max_shard_bytes=48)
    for name, tensor in make_tensors(1.0).items():
        np.testing.assert_array_equal(opened[name](), tensor)


def test_an_error_inside_is_not_hidden(tmp_path):
    with pytest.raises(KeyError), checkpoints.unchanged(tmp_path):
        raise KeyError("mine")

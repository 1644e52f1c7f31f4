"""Worker processes as one command. The workers here are small scripts; none loads TensorFlow."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmzoo.engine.launch import launch

pytestmark = pytest.mark.distributed

START = "import json, os, signal, sys, time\nme = json.loads(os.environ['TF_CONFIG'])['task']['index']\n"


def start(script, *flags, workers=2):
    """Starts `lmzoo launch` of a Python script in a process of its own."""
    words = [sys.executable, "-m", "lmzoo", "launch", "--workers", str(workers), *flags]
    return subprocess.Popen(
        [*words, "--", sys.executable, "-c", START + script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(script, *flags, workers=2):
    """(exit status, lines of stdout, stderr) of `lmzoo launch` of a Python script."""
    process = start(script, *flags, workers=workers)
    try:
        out, error = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out.split(b"\n")[:-1], error.decode(errors="replace")


def alive(pid):
    """Whether a process runs; one that has ended but was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_until_dead(pids, seconds=10.0):
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [pid for pid in pids if alive(pid)]


def wait_for_files(directory, count, seconds=20.0):
    """Waits until there are so many files, each of which a worker writes when it is ready; returns their names."""
    deadline = time.monotonic() + seconds
    while len(names := sorted(path.name for path in directory.iterdir())) < count:
        assert time.monotonic() < deadline, names
        time.sleep(0.02)
    return names


def test_workers_find_one_another_and_the_launcher_loads_no_tensorflow():
    status, out, error = run("print(os.environ['TF_CONFIG'])", workers=3)
    assert status == 0, error
    told = sorted(out)
    configs = [json.loads(line.partition(b" ")[2]) for line in told]
    assert [line[:4] for line in told] == [b"[0] ", b"[1] ", b"[2] "]
    assert [config["task"] for config in configs] == [{"type": "worker", "index": index} for index in range(3)]
    cluster = configs[0]["cluster"]
    assert all(config["cluster"] == cluster for config in configs)
    addresses = cluster["worker"]
    assert len(set(addresses)) == 3
    assert all(address.startswith("127.0.0.1:") for address in addresses)
    assert error.splitlines()[0].startswith("lmzoo launch: starting 3 workers on ")
    assert all(address in error.splitlines()[0] for address in addresses)

    script = "import sys, lmzoo.__main__, lmzoo.engine.launch; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_output_comes_line_by_line_behind_the_number_of_its_worker():
    script = r"""
out, error = sys.stdout.buffer, sys.stderr.buffer
for step in range(200):
    out.write(b"%d " % me)
    out.flush()
    out.write(b"%d\n" % step)
    out.flush()
if me == 0:
    error.write(b"caf\xe9\xff\n")
else:
    error.write(b"\r1/2\r2/2\nno end")
"""
    status, out, error = run(script)
    assert status == 0
    for worker in range(2):
        mine = [line for line in out if line.startswith(b"[%d]" % worker)]
        assert mine == [b"[%d] %d %d" % (worker, worker, step) for step in range(200)]
    assert len(out) == 400
    assert "[1] 2/2\n" in error
    assert "[1] no end\n" in error


def test_bytes_pass_as_they_are_and_no_line_grows_without_bound(capfdbinary):
    script = r"""
out = sys.stdout.buffer
out.write(b"caf\xe9\xff\n\r1/2\r2/2\n\n")
out.write(b"x" * 3_000_000 + b"\nend")
"""
    assert launch([sys.executable, "-c", START + script], workers=1) == 0
    out = capfdbinary.readouterr().out
    assert out.startswith(b"[0] caf\xe9\xff\n[0] 1/2\r[0] 2/2\n[0] \n[0] xxx")
    assert out.endswith(b"\n[0] end\n")
    long = out.split(b"\n")[3:-2]
    assert sum(line.count(b"x") for line in long) == 3_000_000
    assert 2 <= len(long) <= 4
    assert max(map(len, long)) < 1_200_000


def test_a_bar_is_shown_while_it_moves(tmp_path):
    """A bar without an end of line is not held back until one comes, and other workers' lines do not write over it."""
    process = start("print('bar', end='\\r', flush=True); time.sleep(60)", workers=1)
    try:
        assert process.stdout.read(8) == b"[0] bar\r"
    finally:
        process.terminate()
        process.communicate(timeout=20)
    go = tmp_path / "go"
    script = f"""
if me == 0:
    print("bar", end="\\r", flush=True)
    open({str(go)!r}, "w").close()
    time.sleep(1.5)
else:
    while not os.path.exists({str(go)!r}):
        time.sleep(0.01)
    time.sleep(0.5)
    print("line")
"""
    assert run(script)[1] == [b"[0] bar\r", b"[1] line"]


def test_a_worker_that_fails_ends_the_others_and_gives_the_status():
    script = "sys.exit(7) if me == 1 else time.sleep(60)"
    status, _, error = run(script)
    assert status == 7
    assert "lmzoo launch: worker 1 ended with exit status 7; ending the others\n" in error
    assert "still running" not in error  # They were asked to end, and did.

    status, _, error = run("os.kill(os.getpid(), signal.SIGKILL) if me == 0 else time.sleep(60)")
    assert status == 128 + 9
    assert "worker 0 was killed by SIGKILL; ending the others" in error


def test_a_worker_that_ends_well_leaves_the_others_alone():
    status, out, error = run("time.sleep(1.0 * me); print('done')")
    assert status == 0, error
    assert sorted(out) == [b"[0] done", b"[1] done"]


def test_a_worker_that_does_not_end_is_killed_after_the_grace_period(tmp_path):
    script = f"""
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open({str(tmp_path)!r} + f"/{{os.getpid()}}", "w").close()
while len(os.listdir({str(tmp_path)!r})) < 2:
    time.sleep(0.01)
sys.exit(3) if me == 0 else time.sleep(60)
"""
    start_time = time.monotonic()
    status, _, error = run(script, "--grace-seconds", "0.5")
    assert status == 3
    assert "still running 0.5 seconds after being asked to end, so killed: worker 1" in error
    assert time.monotonic() - start_time < 20
    assert not wait_until_dead([int(name) for name in wait_for_files(tmp_path, 2)])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_goes_on_to_the_workers_which_may_end_well(tmp_path, number):
    script = f"""
def save(number, frame):
    print("saving on", number, flush=True)
    time.sleep(0.3)
    print("saved", flush=True)
    sys.exit(0)
signal.signal(signal.{number.name}, save)
open({str(tmp_path)!r} + f"/{{me}}", "w").close()
while True:
    time.sleep(0.05)
"""
    process = start(script, "--restarts", "3")
    try:
        wait_for_files(tmp_path, 2)
        process.send_signal(number)
        out, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0, error
    expected = [b"[%d] %b" % (me, text) for me in range(2) for text in (b"saved", b"saving on %d" % number)]
    assert sorted(out.splitlines()) == expected
    assert b"restart" not in error.splitlines()[-1]


def test_workers_that_fail_once_asked_to_end_are_not_started_again(tmp_path):
    process = start(f"open({str(tmp_path)!r} + f'/{{me}}', 'w').close(); time.sleep(60)", "--restarts", "3")
    try:
        wait_for_files(tmp_path, 2)
        process.terminate()
        _, error = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, error
    assert error.count(b"starting") == 1


def test_all_start_again_on_new_ports_as_often_as_allowed(tmp_path):
    script = f"""
attempt = len([name for name in os.listdir({str(tmp_path)!r}) if name.startswith(str(me))])
open({str(tmp_path)!r} + f"/{{me}}.{{attempt}}", "w").close()
print(attempt, json.loads(os.environ["TF_CONFIG"])["cluster"]["worker"][0], flush=True)
if me == 0 and attempt < 2:
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60 if attempt < 2 else 0)
"""
    status, out, error = run(script, "--restarts", "2")
    assert status == 0, error
    assert "starting all workers again, restart 1 of 2" in error
    assert "starting all workers again, restart 2 of 2" in error
    lines = sorted(line.split() for line in out)
    assert [(line[0], line[1]) for line in lines] == [
        (b"[%d]" % me, b"%d" % attempt) for me in range(2) for attempt in range(3)
    ]
    assert len({line[2] for line in lines}) == 3

    for path in tmp_path.iterdir():
        path.unlink()
    status, _, error = run(script, "--restarts", "1")
    assert status == 128 + 9
    assert error.count("starting all workers again") == 1


def test_no_worker_outlives_a_launcher_that_is_killed(tmp_path):
    """Nor does what a worker has started itself."""
    script = f"""
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
open({str(tmp_path)!r} + f"/{{child.pid}}", "w").close()
open({str(tmp_path)!r} + f"/{{os.getpid()}}", "w").close()
time.sleep(100)
"""
    process = start(script)
    try:
        pids = [int(name) for name in wait_for_files(tmp_path, 4)]
        assert all(map(alive, pids))
        process.kill()
        process.communicate(timeout=20)
        left = wait_until_dead(pids)
    finally:
        process.kill()
        for pid in wait_until_dead([int(path.name) for path in tmp_path.iterdir()], 0):
            os.kill(pid, signal.SIGKILL)
    assert not left


def test_what_a_worker_leaves_behind_ends_with_it(tmp_path):
    """And does not keep the launcher waiting for the end of its output."""
    script = f"""
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
open({str(tmp_path)!r} + f"/{{child.pid}}", "w").close()
print("last words", end="", flush=True)
"""
    status, out, _ = run(script)
    assert status == 0
    assert sorted(out) == [b"[0] last words", b"[1] last words"]
    assert not wait_until_dead([int(path.name) for path in tmp_path.iterdir()])


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")
def test_each_worker_is_held_to_cores_of_its_own():
    available = os.sched_getaffinity(0)
    if len(available) < 2:
        pytest.skip("needs two cores")
    status, out, error = run("time.sleep(0.2); print(*os.sched_getaffinity(0))", "--cores-each", "1")
    assert status == 0, error
    cores = {int(line.split()[1]) for line in out}
    assert len(cores) == 2
    assert cores <= available


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workers", "2"], "there is no command to run"),
        (["--workers", "2", "--"], "there is no command to run"),
        (["--workers", "0", "--", "true"], "workers must be 1 or more, but is 0"),
        (["--workers", "2", "--restarts", "-1", "--", "true"], "restarts must be 0 or more, but is -1"),
        (["--workers", "2", "--grace-seconds", "nan", "--", "true"], "grace_seconds must be 0 or more"),
        (["--workers", "2", "--cores-each", "9999", "--", "true"], "cores_each is 9999"),
        (["--workers", "2", "--", "no-such-command"], "'no-such-command' is not found"),
        (["--", "true"], "--workers"),
    ],
)
def test_bad_usage_is_told_and_gives_status_2(words, message):
    done = subprocess.run(
        [sys.executable, "-m", "lmzoo", "launch", *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_help_is_there():
    done = subprocess.run(
        [sys.executable, "-m", "lmzoo", "launch", "--help"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0
    assert "--restarts" in done.stdout

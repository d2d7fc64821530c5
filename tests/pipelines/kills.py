"""SIGKILL for parts of a running stage: its driver, Ray's processes, single workers. For tests and benchmarks."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from meteor.checkpoint.folder import complete_checkpoints

_STARTING_S, _ENDING_S = 240.0, 120.0


def command(stage: str, run_file: Path) -> list[str]:
    return [sys.executable, "-m", f"pipelines.{stage}", "--run", str(run_file)]


def descendants(pid: int) -> dict[int, str]:
    """Process id -> command line of everything below a process: Ray's session and its workers."""
    parents, lines = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # After the name, which is in brackets and may hold anything: state, parent.
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended between the two
        parents[int(folder.name)], lines[int(folder.name)] = parent, line
    found, waiting = {}, [pid]
    while waiting:
        parent = waiting.pop()
        children = [child for child, its_parent in parents.items() if its_parent == parent]
        found |= {child: lines[child] for child in children}
        waiting += children
    return found


def actors(started: subprocess.Popen, name: str) -> list[int]:
    """Ray's processes of that title."""
    return [pid for pid, line in descendants(started.pid).items() if line.startswith("ray::") and name in line]


def kill_driver(started: subprocess.Popen) -> None:
    os.kill(started.pid, signal.SIGKILL)
    started.wait()


def kill_session(started: subprocess.Popen) -> None:
    """Driver, raylet, control store and workers at one moment."""
    _kill([*descendants(started.pid), started.pid])
    started.wait()


def kill_worker(started: subprocess.Popen) -> None:
    _kill(actors(started, "RayTrainWorker")[-1:])


def kill_controller(started: subprocess.Popen) -> None:
    _kill(actors(started, "TrainController"))


def kill_node(started: subprocess.Popen) -> None:
    """The raylet: Ray takes the node for lost, and all that ran on it ends."""
    _kill([pid for pid, line in descendants(started.pid).items() if "/raylet/raylet " in line])


KILLS: dict[str, Callable[[subprocess.Popen], None]] = {
    "a worker": kill_worker,
    "the controller": kill_controller,
    "the driver": kill_driver,
    "the node": kill_node,
    "the whole cluster": kill_session,
}


@dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
        of: a key of `KILLS`.
        checkpoint: step of the newest complete checkpoint at that moment.
        command_went_on: whether the command survived, without being started again.
    """

    of: str
    checkpoint: int
    command_went_on: bool


def train_through_kills(
    start: Sequence[str], checkpoints: str, kinds: Sequence[str], *, seed: int, report: Callable[[Kill], None]
) -> None:
    """Start a training stage, kill something of it, start it again where it ended, and so on; in the end let it finish.

    Two kills of three come up to a second after a checkpoint, the others at any moment, starting included. A worker is always
    killed after a checkpoint.

    Args:
        start: the command.
        checkpoints: root URI of the stage's checkpoints.
        kinds: what is killed, one after the other.
        seed: of the moments.
        report: gets each kill.

    Raises:
        AssertionError: the stage finished before it could be killed, failed without having been killed, or hung.
    """
    rng, known, running = random.Random(seed), set[int](), None
    for kind in kinds:
        if running is None:
            running = subprocess.Popen(start)
        # Ray Train retries what dies in training, but ends the command if a worker dies while its group starts.
        _wait_for_the_moment(running, checkpoints, rng, is_training=kind == "a worker")
        known |= descendants(running.pid).keys()
        newest = _newest(checkpoints)
        KILLS[kind](running)
        went_on = kind == "a worker"
        if not went_on:
            running = _ended(running)
        report(Kill(kind, newest, went_on))
    assert (running or subprocess.Popen(start)).wait(timeout=600) == 0, "the stage failed after the last kill"


def _wait_for_the_moment(running: subprocess.Popen, checkpoints: str, rng: random.Random, *, is_training: bool) -> None:
    deadline, before = time.monotonic() + _STARTING_S, _newest(checkpoints)
    wants_checkpoint = rng.random() < 2 / 3 or is_training
    while not actors(running, "RayTrainWorker") or (wants_checkpoint and _newest(checkpoints) == before):
        assert running.poll() is None, f"the stage ended with {running.returncode} before it could be killed"
        assert time.monotonic() < deadline, "the stage does not get on"
        time.sleep(0.05)
    time.sleep(rng.uniform(0, 1 if wants_checkpoint else 10))


def _ended(running: subprocess.Popen) -> None:
    """Wait for the end of a command that has lost something it cannot do without."""
    left = list(descendants(running.pid))
    try:
        code = running.wait(timeout=_ENDING_S)
    except subprocess.TimeoutExpired as error:
        kill_session(running)
        raise AssertionError(f"the command hung for {_ENDING_S:.0f} s after the kill") from error
    assert code != 0, "the command said that all was well"
    _kill(left)


def _newest(checkpoints: str) -> int:
    done = complete_checkpoints(checkpoints)
    return int(done[-1].rpartition("_")[2]) if done else 0


def _kill(pids: Sequence[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue

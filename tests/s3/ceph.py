"""A real S3 server for tests: Ceph's object gateway over one monitor and one disk in memory, private and passing."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

INSTALL = "apt-get install -y --no-install-recommends ceph-mon ceph-osd radosgw"
ACCESS_KEY = "testing"
SECRET_KEY = "testing-secret"
# Of a second user, who may do nothing until a bucket's policy lets them.
WORKER, WORKER_ACCESS_KEY, WORKER_SECRET_KEY = "worker", "worker", "worker-secret"
_PROGRAMS = ("ceph", "ceph-mon", "ceph-osd", "monmaptool", "radosgw", "radosgw-admin")
_START_TIMEOUT_S = 120.0
_STOP_TIMEOUT_S = 10.0

_SETTINGS = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{mon_port},v1:127.0.0.1:{old_mon_port}]
mon initial members = a
auth cluster required = none
auth service required = none
auth client required = none
ms cluster mode = crc
ms service mode = crc
ms client mode = crc
ms mon cluster mode = crc
ms mon service mode = crc
ms mon client mode = crc
public addr = 127.0.0.1
cluster addr = 127.0.0.1
run dir = {folder}
admin socket = {folder}/$name.asok
log file = {folder}/$name.log
mon data = {folder}/mon
mon allow pool size one = true
mon data avail crit = 1
paxos propose interval = 0.05
osd data = {folder}/osd
osd objectstore = memstore
memstore device bytes = 8589934592
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
rgw data = {folder}/rgw
rgw frontends = beast endpoint={host}:{rgw_port} tcp_nodelay=1
rgw thread pool size = 64
rgw enable usage log = false
rgw dynamic resharding = false
"""


def missing_programs() -> list[str]:
    """Programs of Ceph that are not installed."""
    return [name for name in _PROGRAMS if shutil.which(name) is None]


@contextmanager
def ceph_gateway(host: str = "127.0.0.1") -> Iterator[str]:
    """Start Ceph, yield the endpoint of its gateway, and stop all that was started, after a failed start too.

    Args:
        host: address of this machine that the gateway is bound to; everything else is on loopback.

    Raises:
        RuntimeError: it did not come up; with the end of every log.
    """
    with tempfile.TemporaryDirectory(prefix="ceph-") as name, ExitStack() as stack:
        folder = Path(name)
        endpoint = f"http://{host}:{_write_settings(folder, host)}"
        try:
            _start(folder, endpoint, lambda *command: _spawn(stack, folder, command))
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            raise RuntimeError(f"Ceph did not start: {error}\n{ends_of_logs(folder)}") from error
        yield endpoint


def _write_settings(folder: Path, host: str) -> int:
    mon_port, old_mon_port, rgw_port = free_ports(3)
    for name in ("mon", "osd", "rgw"):
        (folder / name).mkdir()
    settings = _SETTINGS.format(
        folder=folder, fsid=uuid.uuid4(), mon_port=mon_port, old_mon_port=old_mon_port, rgw_port=rgw_port, host=host
    )
    (folder / "ceph.conf").write_text(settings)
    return rgw_port


def _start(folder: Path, endpoint: str, spawn: Callable[..., subprocess.Popen[bytes]]) -> None:
    settings = ("-c", str(folder / "ceph.conf"))
    monitor = next(line.split()[-1] for line in (folder / "ceph.conf").read_text().splitlines() if "mon host" in line)
    fsid = next(line.split()[-1] for line in (folder / "ceph.conf").read_text().splitlines() if "fsid" in line)
    _do(folder, "monmaptool", "--create", "--fsid", fsid, "--addv", "a", monitor, str(folder / "monmap"))
    _do(folder, "ceph-mon", *settings, "-i", "a", "--mkfs", "--monmap", str(folder / "monmap"))
    spawn("ceph-mon", *settings, "-i", "a", "-f")
    osd = str(uuid.uuid4())
    _do(folder, "ceph", *settings, "osd", "new", osd)
    _do(folder, "ceph-osd", *settings, "-i", "0", "--mkfs", "--osd-uuid", osd)
    spawn("ceph-osd", *settings, "-i", "0", "-f")
    for name, access_key, secret_key in (
        ("tests", ACCESS_KEY, SECRET_KEY),
        (WORKER, WORKER_ACCESS_KEY, WORKER_SECRET_KEY),
    ):
        user = ["--uid", name, "--display-name", name, "--access-key", access_key, "--secret-key", secret_key]
        _do(folder, "radosgw-admin", *settings, "user", "create", *user)
    gateway = spawn("radosgw", *settings, "-n", "client.rgw.a", "-f")
    _wait_until_it_answers(endpoint, gateway)


def _wait_until_it_answers(endpoint: str, gateway: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if gateway.poll() is not None:
            raise RuntimeError(f"the gateway ended with {gateway.returncode}")
        try:
            with urllib.request.urlopen(endpoint, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise RuntimeError(f"the gateway did not answer at {endpoint} within {_START_TIMEOUT_S:.0f} s")


def _do(folder: Path, *command: str) -> None:
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, timeout=_START_TIMEOUT_S, env=_environment()
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")


def _spawn(stack: ExitStack, folder: Path, command: tuple[str, ...]) -> subprocess.Popen[bytes]:
    with open(folder / f"{command[0]}.out", "wb") as output:
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, env=_environment())
    stack.callback(stop, process)
    return process


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _environment() -> dict[str, str]:
    # The `ceph` command runs on the system's Python, whatever environment the tests run in.
    return {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CEPH_", "VIRTUAL_ENV"))
    }


def free_ports(num_ports: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(num_ports)]
        for taken in sockets:
            taken.bind(("127.0.0.1", 0))
        return [taken.getsockname()[1] for taken in sockets]


def ends_of_logs(folder: Path) -> str:
    logs = sorted([*folder.glob("*.log"), *folder.glob("*.out")])
    return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in logs)

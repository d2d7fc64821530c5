"""A cluster's machines on one: each with an address, processes, /tmp and home of its own, and without this repository.

Network namespaces on one bridge, and for every command a mount and a process namespace: what one machine writes to its disk no
other one sees, and a machine that is killed goes with everything that runs on it.
"""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
_BIN = Path(sys.executable).parent
_FIRST = 11

# $1: the repository, $2: the environment's folder, $3: "hide" or "show" the repository, $4: a working directory, $5 its name,
# $6 its address: to which a machine's own name leads, as in a pod, lest torch's gloo offers other machines its loopback.
_PRIVATE_DISK = """
mount --make-rprivate /
mount -t tmpfs tmpfs /mnt
mkdir /mnt/environment /mnt/repository
mount --bind "$2" /mnt/environment
mount --bind "$1" /mnt/repository
mount -t tmpfs tmpfs /tmp
mkdir -p "$1" "$HOME"
if [ "$3" = hide ]; then mount -t tmpfs tmpfs "$1"; else mount --bind /mnt/repository "$1"; fi
mkdir -p "$2" "$4"
mount --bind /mnt/environment "$2"
umount /mnt/environment /mnt/repository
hostname "$5"
printf '127.0.0.1 localhost\n%s %s\n' "$6" "$5" >/mnt/hosts
mount --bind /mnt/hosts /etc/hosts
cd "$4"
shift 6
exec "$@"
"""


@dataclass
class Machine:
    """One machine.

    Attributes:
        name: also of its home and its working directory.
        address: on the network of its cluster.
        environment: of everything that is started on it.
    """

    name: str
    address: str
    namespace: str
    environment: Mapping[str, str]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *command: str, log: Path, in_repository: bool = False) -> subprocess.Popen[bytes]:
        """Start a command with a disk of its own.

        Args:
            command: and its arguments.
            log: file of this test for what it prints.
            in_repository: start in the repository, which is hidden otherwise: the machine of whoever submits.
        """
        home = f"/tmp/home-of-{self.name}"
        environment = {
            "PATH": f"{_BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": home,
            "LANG": "C.UTF-8",
            **self.environment,
        }
        folder = str(REPOSITORY) if in_repository else f"/tmp/work-of-{self.name}"
        facts = ["show" if in_repository else "hide", folder, self.name, self.address]
        apart = ["unshare", "--mount", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]
        disk = ["sh", "-euc", _PRIVATE_DISK, "sh", str(REPOSITORY), str(_BIN.parent)]
        with log.open("ab") as output:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace, *apart, *disk, *facts, *command],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=environment,
            )
        self.processes.append(process)
        return process

    def kill(self) -> None:
        """As when its power fails."""
        for process in self.processes:
            # `--kill-child`: the first process of its namespace goes with it, and takes all others along.
            process.kill()
            process.wait()


class Network:
    """Machines that reach each other, and this one at ``address``."""

    def __init__(self, stack: ExitStack) -> None:
        number = _add_bridge()
        self._stack, self._bridge, self._prefix = stack, f"meteor{number}", f"10.77.{number}"
        self.address = f"{self._prefix}.1"
        self.machines: list[Machine] = []
        stack.callback(_ip, "link", "delete", self._bridge)
        _ip("address", "add", f"{self.address}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")

    def machine(self, name: str, environment: Mapping[str, str]) -> Machine:
        """A new one, which is killed at the end."""
        number = len(self.machines)
        namespace, link = f"{self._bridge}-{name}", f"{self._bridge}-{number}"
        address = f"{self._prefix}.{_FIRST + number}"
        _ip("netns", "add", namespace)
        self._stack.callback(_ip, "netns", "delete", namespace)
        _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("link", "set", link, "master", self._bridge, "up")
        addresses = ["address", "add", f"{address}/24", "dev", "eth0"]
        for arguments in (addresses, ["link", "set", "eth0", "up"], ["link", "set", "lo", "up"]):
            _ip("-netns", namespace, *arguments)
        machine = Machine(name, address, namespace, environment)
        self._stack.callback(machine.kill)
        self.machines.append(machine)
        return machine


@contextmanager
def network() -> Iterator[Network]:
    """A network that is taken down at the end, with its machines."""
    with ExitStack() as stack:
        yield Network(stack)


def why_not() -> str | None:
    """What is missing for machines of one's own on this one; None where nothing is."""
    if os.geteuid() != 0:
        return "namespaces for the cluster's machines need root"
    try:
        subprocess.run(["unshare", "--mount", "--net", "--pid", "--fork", "true"], check=True, capture_output=True)
        subprocess.run(["ip", "netns", "list"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no namespaces here: {error}"
    return None


def _add_bridge() -> int:
    """The number of a new one, which no other test run on this machine has, or has left behind."""
    for attempt in range(250):
        number = (os.getpid() + attempt) % 250
        command = ["ip", "link", "add", f"meteor{number}", "type", "bridge"]
        if not subprocess.run(command, check=False, capture_output=True).returncode:
            return number
    raise RuntimeError("no bridge can be made: `ip link add ... type bridge` fails")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)} ended with {done.returncode}: {done.stderr}")

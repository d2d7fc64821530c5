"""What a cluster needs besides Ray and an object store: MLflow's server, on PostgreSQL."""

import glob
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ceph import ends_of_logs, free_ports, stop

_TIMEOUT_S = 120.0
USER, PASSWORD = "mlflow", "password-of-the-database"


def missing_programs() -> list[str]:
    """Programs of PostgreSQL that are not installed."""
    return [] if _programs() else ["PostgreSQL's initdb and postgres"]


def _programs() -> str | None:
    """Debian keeps them out of the path."""
    folders = sorted(glob.glob("/usr/lib/postgresql/*/bin"))
    return folders[-1] if folders else os.path.dirname(shutil.which("initdb") or "") or None


@contextmanager
def postgres() -> Iterator[str]:
    """A private PostgreSQL on loopback; yields the URI of an empty database, with its password.

    Raises:
        RuntimeError: it did not come up; with the end of its log.
    """
    [port] = free_ports(1)
    programs = _programs()
    with tempfile.TemporaryDirectory(prefix="postgres-") as name, ExitStack() as stack:
        folder = Path(name)
        (folder / "password").write_text(PASSWORD)
        # It refuses to run as root.
        as_user: list[str] = []
        if os.geteuid() == 0:
            user = pwd.getpwnam("postgres")
            for path in (folder, folder / "password"):
                os.chown(path, user.pw_uid, user.pw_gid)
            as_user = ["setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups"]
        data = str(folder / "data")
        init = [
            f"{programs}/initdb",
            "-D",
            data,
            "-U",
            USER,
            "--pwfile",
            str(folder / "password"),
            "--auth=scram-sha-256",
        ]
        subprocess.run([*as_user, *init, "--no-sync"], check=True, capture_output=True, cwd=folder)
        settings = ["-p", str(port), "-h", "127.0.0.1", "-k", name, "-c", "fsync=off", "-c", "max_connections=50"]
        with open(folder / "postgres.log", "wb") as log:
            server = subprocess.Popen(
                [*as_user, f"{programs}/postgres", "-D", data, *settings], stdout=log, stderr=log, cwd=folder
            )
        stack.callback(stop, server)
        environment = {**os.environ, "PGPASSWORD": PASSWORD}
        create = [f"{programs}/createdb", "-h", "127.0.0.1", "-p", str(port), "-U", USER, "mlflow"]
        deadline_s = time.monotonic() + _TIMEOUT_S
        while subprocess.run(create, capture_output=True, env=environment, check=False).returncode:
            if server.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"PostgreSQL did not start\n{ends_of_logs(folder)}")
            time.sleep(0.2)
        # Named, as SQLAlchemy 2.1 takes another driver by default.
        yield f"postgresql+psycopg2://{USER}:{PASSWORD}@127.0.0.1:{port}/mlflow"


class TrackingServer:
    """MLflow's server; it can be stopped, and started again at the same address.

    Args:
        host: address of this machine.
        database: its backend store.
        artifacts: s3:// folder.
        environment: how it reaches that.
        log: file for what it prints.
    """

    def __init__(self, host: str, database: str, artifacts: str, environment: Mapping[str, str], log: Path) -> None:
        [port] = free_ports(1)
        self.uri, self._log = f"http://{host}:{port}", log
        self._command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            host,
            "--port",
            str(port),
            "--workers",
            "1",
        ]
        self._command += ["--artifacts-destination", artifacts, "--allowed-hosts", f"{host}:{port}"]
        # Its own pages, which ask as another origin where the server is not on loopback.
        self._command += ["--cors-allowed-origins", self.uri]
        # Not on the command line, which everybody on the machine can read.
        self._environment = {
            **os.environ,
            **environment,
            "MLFLOW_BACKEND_STORE_URI": database,
            "MLFLOW_S3_ENDPOINT_URL": environment["AWS_ENDPOINT_URL"],
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Raises RuntimeError where it does not come up."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=self._environment, start_new_session=True
            )
        deadline_s = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < deadline_s and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise RuntimeError(f"MLflow did not start: {self._log.read_text()[-3000:]}")

    def stop(self) -> None:
        if self._process is not None:
            stop(self._process)
            self._process = None

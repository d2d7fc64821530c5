"""Addresses of Ray clusters: a wrong one is reported in a sentence, within seconds."""

import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from meteor.errors import ClusterError
from meteor.formatting import shorten

# A head that restarts listens again within seconds; Ray itself would try for minutes without a word.
_PATIENCE_S = 10.0
_PAUSE_S = 0.5
# A host that drops packets answers nothing at all.
_CONNECT_TIMEOUT_S = 10.0
_PORTS = {"http": 80, "https": 443}
_LONGEST_SHOWN = 300


def require_listener(address: str, *, patience_s: float = 0.0) -> None:
    """Return if a program listens at an address; names without host and port, such as ``auto``, are not looked at.

    Args:
        address: HOST:PORT, or a URL (``http://HOST:PORT``, ``ray://HOST:PORT``).
        patience_s: seconds during which a refused connection is tried again.

    Raises:
        ClusterError: nothing listens there, or the host is not known.
    """
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port or _PORTS.get(parts.scheme)
    except ValueError as error:
        raise ClusterError(f"{address!r} is no address of a cluster ({error}): give HOST:PORT") from error
    if not host or not port:
        return
    give_up_at = time.monotonic() + patience_s
    while True:
        try:
            socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S).close()
            return
        except OSError as error:
            if isinstance(error, socket.gaierror) or time.monotonic() + _PAUSE_S > give_up_at:
                raise ClusterError(f"nothing answers at {address}: {error.strerror or error}") from error
        time.sleep(_PAUSE_S)


@contextmanager
def joining(address: str | None) -> Iterator[None]:
    """Turn every error with which Ray fails to join a cluster, or to start on this machine, into `ClusterError`.

    Args:
        address: address of the cluster, from ``runtime.ray_address`` or RAY_ADDRESS; None to start Ray on this machine.
    """
    try:
        if address:
            _require_gcs_address(address)
            require_listener(address, patience_s=_PATIENCE_S)
        yield
    except ClusterError as error:
        raise ClusterError(f"{error}. {_cure(address)}") from error
    # Ray's own errors have no common class: ValueError, OSError, ConnectionError, RuntimeError, RayError.
    except Exception as error:
        if "AF_UNIX path length" in str(error):
            raise ClusterError(
                f"Ray cannot start: its sockets would lie below {tempfile.gettempdir()}, and a socket's path may have 107 "
                "characters. Set RAY_TMPDIR to a shorter folder, such as /tmp"
            ) from error
        where = f"join the cluster at {address}" if address else "start on this machine"
        said = shorten(" ".join(str(error).split()), _LONGEST_SHOWN).rstrip(".")
        raise ClusterError(f"Ray cannot {where}: {said}. {_cure(address)}") from error


def _require_gcs_address(address: str) -> None:
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"{address} is the address of a dashboard, to which jobs are submitted, and stages cannot join it"
        )


def _cure(address: str | None) -> str:
    if address is None:
        return f"Look for the reason in the newest folder below {os.path.join(tempfile.gettempdir(), 'ray')}"
    return (
        "Set runtime.ray_address or RAY_ADDRESS to HOST:6379 of the head, unset both to compute on this machine, or send the "
        "stage to the cluster with `python -m jobs.submit`"
    )

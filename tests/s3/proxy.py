"""A proxy between an S3 client and its server that delays, cuts and refuses as a schedule says."""

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

# What can happen to one request:
# delay: the answer comes later; cut_request, cut_response: the connection ends after a share of the bytes, reset_response:
# the same by a reset; refuse_500, refuse_503: an answer of the proxy, the server never sees the request; lose_answer: the
# server does the work and the connection ends without an answer; black_hole: nothing ever comes.
KINDS = (
    "delay",
    "cut_request",
    "cut_response",
    "reset_response",
    "refuse_500",
    "refuse_503",
    "lose_answer",
    "black_hole",
)
_ERRORS = {
    "refuse_500": (500, "InternalError"),
    "refuse_503": (503, "SlowDown"),
    "forget_upload": (404, "NoSuchUpload"),
}


@dataclass(frozen=True)
class Fault:
    """One fault of a request.

    Attributes:
        kind: one of `KINDS`, or ``forget_upload``: what AWS says to the second end of an upload in parts.
        share: of the bytes that get through before a cut, in [0, 1).
        delay_s: before the server is asked (``delay``).
    """

    kind: str
    share: float = 0.0
    delay_s: float = 0.05


Schedule = Callable[[str, str], Fault | None]


def random_faults(seed: int, rate: float, kinds: tuple[str, ...] = KINDS[:-1], *, max_in_row: int = 2) -> Schedule:
    """A schedule that hits each request with probability ``rate``, and no method of one object more often in a row than
    ``max_in_row``, so that a client that tries more often gets through.
    """
    numbers, in_row, lock = random.Random(seed), Counter[tuple[str, str]](), threading.Lock()

    def schedule(method: str, path: str) -> Fault | None:
        with lock:
            request = method, urlsplit(path).path
            hit = numbers.random() < rate and in_row[request] < max_in_row
            in_row[request] = in_row[request] + 1 if hit else 0
            return Fault(numbers.choice(kinds), numbers.random(), numbers.uniform(0, 0.1)) if hit else None

    return schedule


class Proxy:
    """A running proxy.

    Attributes:
        endpoint: where the client goes.
        schedule: method and path to the fault of that request; may be replaced at any time.
        injected: how often each kind of fault was injected.
        requests: every request as (method, path, range), in the order of arrival.
    """

    def __init__(self, endpoint: str, schedule: Schedule) -> None:
        self.server = urlsplit(endpoint).netloc
        self.schedule = schedule
        self.injected: Counter[str] = Counter()
        self.requests: list[tuple[str, str, str]] = []
        self.stopped = threading.Event()
        self.connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self.listener = _Listener(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self.endpoint = f"http://127.0.0.1:{self.listener.server_address[1]}"

    def fault_of(self, method: str, path: str, requested_range: str) -> Fault | None:
        with self._lock:
            self.requests.append((method, path, requested_range))
            fault = self.schedule(method, path)
            if fault:
                self.injected[fault.kind] += 1
            return fault


@contextmanager
def fault_proxy(endpoint: str, schedule: Schedule = lambda method, path: None) -> Iterator[Proxy]:
    """A proxy before ``endpoint``, stopped at the end with all its connections."""
    proxy = Proxy(endpoint, schedule)
    thread = threading.Thread(target=proxy.listener.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield proxy
    finally:
        proxy.stopped.set()
        proxy.listener.shutdown()
        thread.join()
        proxy.listener.server_close()
        for connection in list(proxy.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        # The client has gone, or the server: both are seen at the client's end.
        pass


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.proxy.connections.add(self.connection)
        self.upstream = http.client.HTTPConnection(self.proxy.server)

    def finish(self) -> None:
        self.proxy.connections.discard(self.connection)
        self.upstream.close()
        super().finish()

    def handle_request(self) -> None:
        fault = self.proxy.fault_of(self.command, self.path, self.headers.get("Range", ""))
        kind = fault.kind if fault else ""
        length = int(self.headers.get("Content-Length", 0))
        if fault and kind == "cut_request":
            self._cut_request(int(length * fault.share), length)
            return
        body = self.rfile.read(length)
        if kind == "black_hole":
            self.proxy.stopped.wait()
            self._hang_up()
        elif kind in _ERRORS:
            status, code = _ERRORS[kind]
            content = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
            self._answer(status, [("Content-Type", "application/xml"), ("Content-Length", str(len(content)))], content)
        else:
            if fault and kind == "delay":
                time.sleep(fault.delay_s)
            self._forward(body, fault)

    def __getattr__(self, name: str) -> Callable[[], None]:
        # The base class looks for do_GET, do_PUT and so on.
        if name.startswith("do_"):
            return self.handle_request
        raise AttributeError(name)

    def _cut_request(self, num_bytes: int, length: int) -> None:
        """Let the server see the beginning of the request, as a broken connection does."""
        self._send_head()
        self.upstream.send(self.rfile.read(num_bytes))
        self.upstream.close()
        self._hang_up(reset=length > num_bytes)

    def _forward(self, body: bytes, fault: Fault | None) -> None:
        self._send_head()
        if body:
            self.upstream.send(body)
        response = self.upstream.getresponse()
        content = response.read()
        if fault and fault.kind == "lose_answer":
            self._hang_up()
            return
        headers = [
            (name, value)
            for name, value in response.getheaders()
            if name.lower() not in {"transfer-encoding", "connection"}
        ]
        if self.command != "HEAD" and response.status != 204 and not response.getheader("Content-Length"):
            headers.append(("Content-Length", str(len(content))))
        if fault and fault.kind in {"cut_response", "reset_response"}:
            self._answer(response.status, headers, content[: int(len(content) * fault.share)])
            self._hang_up(reset=fault.kind == "reset_response")
        else:
            self._answer(response.status, headers, content)

    def _send_head(self) -> None:
        self.upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in {"expect", "connection"}:
                self.upstream.putheader(name, value)
        self.upstream.endheaders()

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _hang_up(self, *, reset: bool = False) -> None:
        self.close_connection = True
        if reset:
            # No lingering: closing sends a reset instead of an orderly end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.connection.close()
        else:
            self.connection.shutdown(socket.SHUT_RDWR)

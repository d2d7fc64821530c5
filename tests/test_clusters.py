"""A wrong address of a cluster is told in one sentence, before Ray tries for minutes."""

import socket

import pytest

from meteor import clusters
from meteor.clusters import joining, require_listener
from meteor.errors import ClusterError


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(clusters, "_PATIENCE_S", 0.2)
    monkeypatch.setattr(clusters, "_PAUSE_S", 0.01)


@pytest.fixture
def port():
    """A port at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        yield free.getsockname()[1]


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "http://127.0.0.1:{}", "ray://127.0.0.1:{}", "localhost:{}"])
def test_an_address_without_a_listener_is_named(port, form):
    address = form.format(port)
    with pytest.raises(ClusterError, match=f"nothing answers at {address}: Connection refused"):
        require_listener(address)


def test_a_listener_is_found_and_names_without_a_port_are_left_to_ray(port):
    with socket.create_server(("127.0.0.1", 0)) as server:
        require_listener(f"127.0.0.1:{server.getsockname()[1]}")
        require_listener(f"http://127.0.0.1:{server.getsockname()[1]}/path")
    for name in ("auto", "local", "ray://head"):
        require_listener(name)


def test_a_head_that_restarts_is_waited_for(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        connect, refusals = socket.create_connection, [ConnectionRefusedError(111, "Connection refused")] * 3

        def refuse(place, timeout):
            if refusals:
                raise refusals.pop()
            return connect(place, timeout)

        monkeypatch.setattr(clusters.socket, "create_connection", refuse)
        require_listener(f"127.0.0.1:{server.getsockname()[1]}", patience_s=60)
        assert refusals == []


@pytest.mark.parametrize("address", ["host:port", "http://[::1"])
def test_what_is_no_address_is_said(address):
    with pytest.raises(ClusterError, match="is no address of a cluster"):
        require_listener(address)


def test_the_address_of_a_dashboard_is_told_apart(port):
    with pytest.raises(ClusterError, match=r"address of a dashboard.*HOST:6379"), joining("http://127.0.0.1:8265"):
        pytest.fail("Ray was started")
    with pytest.raises(ClusterError, match=r"nothing answers.*unset both"), joining(f"127.0.0.1:{port}"):
        pytest.fail("Ray was started")


@pytest.mark.parametrize(
    ("address", "error", "words"),
    [
        (
            "auto",
            ConnectionError("Could not find any running Ray instance.\nMore."),
            "join the cluster at auto: Could not",
        ),
        (None, RuntimeError("Failed to start the GCS"), r"start on this machine: Failed.*newest folder below .*/ray"),
        (
            None,
            OSError("AF_UNIX path length cannot exceed 107 bytes: /very/long"),
            "Set RAY_TMPDIR to a shorter folder",
        ),
    ],
)
def test_errors_of_ray_become_one_line_with_the_cure(address, error, words):
    with pytest.raises(ClusterError, match=words) as caught, joining(address):
        raise error
    assert "\n" not in str(caught.value)

"""Checks on every node before hours of GPU time are spent: each reports its result, or the problem and its solution."""

import importlib.metadata
import os
import platform
import shutil
import socket
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from meteor import storage
from meteor.assembly import Inputs, sample_files
from meteor.config import RunSettings
from meteor.data.roots import resolve_image
from meteor.data.samples import load_samples
from meteor.errors import AlreadyExistsError, MeteorError, TrackingError
from meteor.formatting import format_bytes
from meteor.home import expand_home
from meteor.pretrained import local_model
from meteor.text.tokenizer import load_tokenizer
from meteor.tracking import Tracker, public_uri
from meteor.vision.checkpoint import read_vision_config

_PACKAGES = ("torch", "transformers", "ray", "deepspeed", "pyarrow", "mlflow", "boto3")
_NUM_IMAGES = 16
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


@dataclass(frozen=True)
class Finding:
    """Result of a check.

    Attributes:
        check: name of the check.
        ok: whether a run can start.
        text: result, or the problem and what to do.
    """

    check: str
    ok: bool
    text: str


def check_node(settings: RunSettings, num_nodes: int, marker: str, *, is_driver: bool) -> list[Finding]:
    """Run all checks on this node.

    Args:
        settings: settings of the run, with absolute paths.
        num_nodes: number of nodes of the cluster; a single node may use its loopback address and its own disk.
        marker: URI of a file that the driver wrote below the run's output.
        is_driver: whether stages start on this node; if so, samples and images are checked too.
    """
    checks: list[tuple[str, Callable[[], str]]] = [
        ("name", lambda: _name(num_nodes)),
        ("storage", lambda: _storage(settings.output, marker)),
        ("encoder", lambda: _encoder(settings)),
        ("language model", lambda: _llm(settings)),
        ("disk", _disk),
        ("MLflow", lambda: _mlflow(settings, num_nodes)),
    ]
    if is_driver:
        checks += [("data", lambda: _data(settings)), ("images", lambda: _images(settings))]
    return [_found(name, check) for name, check in checks]


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that must be equal on all nodes."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def differing(found: dict[str, dict[str, str]]) -> list[str]:
    """List the packages whose versions differ, with the nodes of each version."""
    lines = []
    for package in sorted({package for node in found.values() for package in node}):
        by_version: dict[str, list[str]] = {}
        for node, packages in found.items():
            by_version.setdefault(packages.get(package, "absent"), []).append(node)
        if len(by_version) > 1:
            lines.append(
                f"{package}: " + "; ".join(f"{version} on {', '.join(nodes)}" for version, nodes in by_version.items())
            )
    return lines


def gpus() -> list[str]:
    """List the names of this node's GPUs."""
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _found(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, check())
    except _Problem as error:
        return Finding(name, False, str(error))
    except (MeteorError, OSError, ValueError) as error:
        return Finding(name, False, _without_secrets(f"{type(error).__name__}: {error}"))


class _Problem(Exception):
    """Problem that a check found; the message says what to do."""


def _without_secrets(text: str) -> str:
    for name in _SECRETS:
        if value := os.environ.get(name):
            text = text.replace(value, "***")
    return text


def _name(num_nodes: int) -> str:
    name = socket.gethostname()
    address = socket.gethostbyname(name)
    if num_nodes > 1 and address.startswith("127."):
        raise _Problem(
            f"{name} resolves to {address}, which torch's gloo would announce to other nodes. Map the name to the node's own "
            "address in /etc/hosts, or set GLOO_SOCKET_IFNAME to its network interface"
        )
    return f"{name} is {address}"


def _storage(output: str, marker: str) -> str:
    """Check the output's store by the operations of runs and caches, and that the driver's file is visible."""
    if not storage.exists(marker):
        raise _Problem(
            f"a file that the driver's node wrote to output={output} is not visible here: give an s3:// prefix, or a folder "
            "that all nodes share"
        )
    uri = storage.join(output, "preflight", uuid.uuid4().hex)
    data = os.urandom(1 << 16)
    try:
        storage.write_bytes(uri, data)
        if storage.read_bytes(uri) != data or storage.read_range(uri, 100, 50) != data[100:150]:
            raise _Problem(f"{uri} returns other bytes than were written")
        created = f"{uri}-created"
        storage.create_bytes(created, b"1")
        try:
            storage.create_bytes(created, b"2")
        except AlreadyExistsError:
            pass
        else:
            raise _Problem(f"{created} could be created twice")
        finally:
            storage.delete(created)
        if uri not in [info.uri for info in storage.list_objects(storage.join(output, "preflight"))]:
            raise _Problem(f"{uri} is not listed after it was written")
    finally:
        storage.delete(uri)
    return f"{output} can be written, read, listed, and created once"


def _encoder(settings: RunSettings) -> str:
    config = read_vision_config(settings.vision.path)
    return f"{settings.vision.path}: width {config.hidden_size}, {config.num_hidden_layers} blocks"


def _llm(settings: RunSettings) -> str:
    tokenizer = load_tokenizer(settings.llm.path)
    place = local_model(settings.llm.path)
    weights = (
        [name for name in os.listdir(place) if name.endswith((".safetensors", ".bin"))]
        if os.path.isdir(place)
        else None
    )
    if weights == []:
        raise _Problem(f"{settings.llm.path} has a tokenizer, but no weights (.safetensors or .bin)")
    return f"{settings.llm.path}: {len(tokenizer):,} tokens" + (
        "" if weights is None else f", {len(weights)} weight files"
    )


def _disk() -> str:
    folder = expand_home(os.environ.get("METEOR_MODELS", "~"))
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return f"{format_bytes(shutil.disk_usage(folder).free)} free at {folder}"


def _mlflow(settings: RunSettings, num_nodes: int) -> str:
    uri = settings.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None:
        if num_nodes > 1:
            raise _Problem("no server: set MLFLOW_TRACKING_URI on all nodes, or tracking.uri in the run file")
        return "no server: runs are tracked in SQLite beside the results"
    try:
        Tracker(uri, settings.tracking.experiment)
    except TrackingError as error:
        raise _Problem(f"{error}. Runs would continue without the server, and send missing metrics later") from error
    return f"{public_uri(uri)}, experiment {settings.tracking.experiment}"


def _data(settings: RunSettings) -> str:
    files = [storage.stat(file.uri) for file in sample_files(settings) if file.stage is not None]
    size = format_bytes(sum(file.size_bytes for file in files))
    return f"{len(files)} sample files ({size}), {len(Inputs(settings).question_sets())} question sets"


def _images(settings: RunSettings) -> str:
    uris = []
    for file in sample_files(settings):
        if file.stage is not None:
            samples, _ = load_samples(file.uri)
            uris += [resolve_image(name, settings.data.roots) for name in _first(samples)]
    missing = [uri for uri in uris if not storage.exists(uri)]
    if missing:
        raise _Problem(
            f"{len(missing)} of {len(uris)} sampled images are missing, for example {missing[0]}: check data.roots"
        )
    return f"{len(uris)} sampled images, all found"


def _first(samples: Iterable) -> list[str]:
    """Return the images of a few samples, evenly spread."""
    shown = [sample.images[0] for sample in samples if sample.images]
    return shown[:: max(1, len(shown) // _NUM_IMAGES)][:_NUM_IMAGES]

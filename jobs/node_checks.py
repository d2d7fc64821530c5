"""What must be so on every node before hours of GPU time are spent: each check says what it found, or what to do."""

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
from meteor.pretrained import local_model
from meteor.text.tokens import load_tokenizer
from meteor.tracking import Tracker, public_uri
from meteor.vision.checkpoint import read_vision_config

_PACKAGES = ("torch", "transformers", "ray", "deepspeed", "pyarrow", "mlflow", "boto3")
_NUM_IMAGES = 16
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        check: its name.
        ok: whether a run can go on.
        text: what was found, or what is wrong and what to do.
    """

    check: str
    ok: bool
    text: str


def check_node(settings: RunSettings, num_nodes: int, marker: str, *, is_driver: bool) -> list[Finding]:
    """All checks on this node.

    Args:
        settings: of the run, with absolute paths.
        num_nodes: of the cluster: to one alone its own loopback and disk are enough.
        marker: a file that the driver wrote below the run's output.
        is_driver: on the node where stages start: samples and images are looked at as well.
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
    """Of what must be the same on all nodes."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def differing(found: dict[str, dict[str, str]]) -> list[str]:
    """What is not the same on all nodes, by node."""
    lines = []
    for package in sorted({package for node in found.values() for package in node}):
        by_version: dict[str, list[str]] = {}
        for node, packages in found.items():
            by_version.setdefault(packages.get(package, "absent"), []).append(node)
        if len(by_version) > 1:
            lines.append(
                f"{package}: " + "; ".join(f"{one} on {', '.join(nodes)}" for one, nodes in by_version.items())
            )
    return lines


def gpus() -> list[str]:
    """Of this node, by name."""
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
    """Something that is not as it must be."""


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
            f"{name} leads to {address}: torch's gloo would offer that to other nodes. Give the name the node's own address in "
            "/etc/hosts, or set GLOO_SOCKET_IFNAME to its network interface"
        )
    return f"{name} is {address}"


def _storage(output: str, marker: str) -> str:
    """Written, read, created once, listed, deleted: as runs and caches do; and what the driver wrote is seen here."""
    if not storage.exists(marker):
        raise _Problem(
            f"what the driver's node wrote to output={output} is not seen here: name an s3:// prefix, or a folder that all "
            "nodes share"
        )
    uri = storage.join(output, "preflight", uuid.uuid4().hex)
    data = os.urandom(1 << 16)
    try:
        storage.write_bytes(uri, data)
        if storage.read_bytes(uri) != data or storage.read_range(uri, 100, 50) != data[100:150]:
            raise _Problem(f"{uri} does not hold what was written to it")
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
        raise _Problem(f"{settings.llm.path} has a tokenizer, and no weights (.safetensors or .bin)")
    return f"{settings.llm.path}: {len(tokenizer):,} tokens" + (
        "" if weights is None else f", {len(weights)} weight files"
    )


def _disk() -> str:
    folder = os.path.expanduser(os.environ.get("METEOR_MODELS", "~"))
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return f"{format_bytes(shutil.disk_usage(folder).free)} free at {folder}"


def _mlflow(settings: RunSettings, num_nodes: int) -> str:
    uri = settings.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None:
        if num_nodes > 1:
            raise _Problem("no server: set MLFLOW_TRACKING_URI on all nodes, or tracking.uri in the run file")
        return "no server: runs go to SQLite beside the results"
    try:
        Tracker(uri, settings.tracking.experiment)
    except TrackingError as error:
        raise _Problem(f"{error}. Runs would go on without it, and send what it missed later") from error
    return f"{public_uri(uri)}, experiment {settings.tracking.experiment}"


def _data(settings: RunSettings) -> str:
    files = [storage.stat(file.uri) for file in sample_files(settings) if file.stage is not None]
    size = format_bytes(sum(file.size_bytes for file in files))
    return f"{len(files)} sample files ({size}), {len(Inputs().question_sets(settings))} question sets"


def _images(settings: RunSettings) -> str:
    uris = []
    for file in sample_files(settings):
        if file.stage is not None:
            samples, _ = load_samples(file.uri)
            uris += [resolve_image(name, settings.data.roots) for name in _first(samples)]
    missing = [uri for uri in uris if not storage.exists(uri)]
    if missing:
        raise _Problem(
            f"{len(missing)} of {len(uris)} looked for are missing, for example {missing[0]}: check data.roots"
        )
    return f"{len(uris)} looked for, all there"


def _first(samples: Iterable) -> list[str]:
    """Images of a few samples, evenly spread."""
    shown = [sample.images[0] for sample in samples if sample.images]
    return shown[:: max(1, len(shown) // _NUM_IMAGES)][:_NUM_IMAGES]

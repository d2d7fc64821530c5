"""One run of the feature cache on a real S3 server under faults: writers, killed or not, readers, and what came of it."""

import hashlib
import multiprocessing
import os
import random
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from types import SimpleNamespace

import boto3
import botocore.endpoint
import torch
from ceph import ACCESS_KEY, SECRET_KEY
from proxy import KINDS, fault_proxy, random_faults

from meteor.cache import CacheIdentity, FeatureCache, commit, create_cache, encode_row, get_codec, write_feature_file
from meteor.errors import MeteorError
from meteor.features import ImageFeatures
from meteor.storage import client, s3

BUCKET = "runs"
_WIDTH, _GRID = 32, (12, 12)
_NUM_PER_WRITER, _NUM_SHARED, _BLOCK = 8, 4, 3
_MAX_STARTS = 25
# Python starts this server once, with the libraries loaded, and forks every process of a run from it.
_PROCESSES = multiprocessing.get_context("forkserver")
# Not this module itself: the server does not know sys.path.
_PROCESSES.set_forkserver_preload(["meteor.cache", "boto3", "botocore.endpoint", "http.server"])


@dataclass(frozen=True)
class Outcome:
    """What one run came to.

    Attributes:
        num_faults: injected, kills included.
        num_written: images that the writers were given.
        num_lost: of those, absent or wrong at the end.
        num_duplicated: rows that the key index holds beside the first of each image.
        problems: what `FeatureCache.verify` and the readers found.
    """

    num_faults: int
    num_written: int
    num_lost: int
    num_duplicated: int
    problems: tuple[str, ...]


def run(
    endpoint: str, *, seed: int, kinds: Sequence[str] = KINDS[:-1], rate: float = 0.15, kill: bool = False
) -> Outcome:
    """Two writers with some images in common, each through a proxy of its own, and a reader through a third.

    Args:
        endpoint: of the S3 server.
        seed: of all that is random.
        kinds: the faults of the proxies.
        rate: how many of the requests they hit.
        kill: also end the writers by SIGKILL at random moments, and start them again.
    """
    root, numbers, kills = f"s3://{BUCKET}/{uuid.uuid4().hex}", random.Random(seed), Counter[str]()
    lead_to(endpoint)
    boto3.session.Session().client("s3").create_bucket(Bucket=BUCKET)
    shared = [f"shared-{i}" for i in range(_NUM_SHARED)]
    shares = [[*(f"{writer}-{i}" for i in range(_NUM_PER_WRITER)), *shared] for writer in "ab"]
    with ExitStack() as stack:
        proxies = [
            stack.enter_context(fault_proxy(endpoint, random_faults(seed * 3 + i, rate, tuple(kinds))))
            for i in range(3)
        ]
        done, failures = _PROCESSES.Event(), _PROCESSES.Queue()
        reader = _start(_read, proxies[2].endpoint, root, seed, done, failures)
        writers = [(_write, proxy.endpoint, root, share) for proxy, share in zip(proxies, shares, strict=False)]
        problems = _finish(writers, numbers, kill, kills)
        done.set()
        reader.join()
        problems += [failures.get() for _ in range(failures.get())] if reader.exitcode == 0 else ["the reader died"]
        num_faults = sum(sum(proxy.injected.values()) for proxy in proxies) + kills["kill"]
    lost, duplicated, found = _count(root, sorted({name for share in shares for name in share}))
    return Outcome(num_faults, len(set().union(*shares)), lost, duplicated, (*problems, *found))


def lead_to(endpoint: str) -> None:
    """Lead this process's clients to an endpoint, with short waits: what is tested is how often, not how long."""
    os.environ.update(
        AWS_ENDPOINT_URL=endpoint,
        AWS_REGION="us-east-1",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_ACCESS_KEY_ID=ACCESS_KEY,
        AWS_SECRET_ACCESS_KEY=SECRET_KEY,
        AWS_CONFIG_FILE="/dev/null",
        AWS_SHARED_CREDENTIALS_FILE="/dev/null",
    )


def shorten_waits() -> None:
    """Time out and pause briefly in this process."""
    client.READ_TIMEOUT_S = 1.0
    s3._FIRST_PAUSE_S = 0.01
    botocore.endpoint.time = SimpleNamespace(sleep=lambda seconds: time.sleep(min(seconds, 0.02)))


def _finish(writers: list[tuple], numbers: random.Random, kill: bool, kills: Counter[str]) -> list[str]:
    """Run the writers until each has ended well; with ``kill``, end each a few times before."""
    running = {i: _start(*writer) for i, writer in enumerate(writers)}
    starts, kills_left = (
        Counter(dict.fromkeys(running, 1)),
        dict.fromkeys(running, numbers.randint(2, 4) if kill else 0),
    )
    while running:
        for i, process in list(running.items()):
            process.join(numbers.uniform(0.2, 0.9) if kills_left[i] else None)
            if process.is_alive():
                process.kill()
                process.join()
                kills["kill"] += 1
                kills_left[i] -= 1
            elif process.exitcode == 0:
                del running[i]
                continue
            if starts[i] >= _MAX_STARTS:
                return [f"writer {i} did not end in {_MAX_STARTS} starts"]
            starts[i] += 1
            running[i] = _start(*writers[i])
    return []


def _start(function, *arguments) -> BaseProcess:
    process = _PROCESSES.Process(target=function, args=arguments)
    process.start()
    return process


def _write(endpoint: str, root: str, names: list[str]) -> None:
    lead_to(endpoint)
    shorten_waits()
    torch.set_num_threads(1)
    try:
        cache_uri = create_cache(root, _identity(), "float16")
        # Takes up what an earlier start finished.
        served = set(FeatureCache.open(cache_uri).keys()) if commit(cache_uri) else set()
        missing = [name for name in names if _key(name) not in served]
        for start in range(0, len(missing), _BLOCK):
            images = map(make_image, missing[start : start + _BLOCK])
            write_feature_file(cache_uri, [encode_row(image, get_codec("float16")) for image in images])
            commit(cache_uri)
    except MeteorError as error:
        sys.exit(f"writer: {error}")


def _read(endpoint: str, root: str, seed: int, done: Event, failures: multiprocessing.Queue) -> None:
    lead_to(endpoint)
    shorten_waits()
    torch.set_num_threads(1)
    found = list(_failures_of_reading(root, random.Random(seed), done))
    failures.put(len(found))
    for failure in found:
        failures.put(failure)


def _failures_of_reading(root: str, numbers: random.Random, done: Event) -> Iterator[str]:
    seen: set[str] = set()
    names = {_key(f"{writer}-{i}"): f"{writer}-{i}" for writer in ("a", "b", "shared") for i in range(_NUM_PER_WRITER)}
    cache_uri = create_cache(root, _identity(), "float16")
    while not done.is_set():
        time.sleep(numbers.uniform(0, 0.2))
        try:
            cache = FeatureCache.open(cache_uri)
            keys = cache.keys()
            image = numbers.choice(keys)
            if not _equal(cache.get(image), make_image(names[image])):
                yield f"reader: {image} is wrong"
        except MeteorError as error:
            if seen or "no committed version" not in str(error):
                yield f"reader: {error}"
            continue
        if len(set(keys)) != len(keys) or not seen <= set(keys):
            yield f"reader: version {cache.version} is not complete"
        seen = set(keys)


def _count(root: str, names: list[str]) -> tuple[int, int, list[str]]:
    """Rows lost, rows duplicated, and what `verify` says, read without faults."""
    cache_uri = create_cache(root, _identity(), "float16")
    commit(cache_uri)
    cache = FeatureCache.open(cache_uri)
    keys, wanted = cache.keys(), {_key(name): name for name in names}
    well = [key for key in set(keys) & set(wanted) if _equal(cache.get(key), make_image(wanted[key]))]
    return len(wanted) - len(well), len(keys) - len(set(keys)), cache.verify()


def _equal(found: ImageFeatures, made: ImageFeatures) -> bool:
    return all(torch.equal(a.half(), b.half()) for a, b in zip(found.features, made.features, strict=True))


def _key(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def make_image(name: str) -> ImageFeatures:
    """An image whose numbers follow from its name."""
    numbers = torch.Generator().manual_seed(int(_key(name)[:8], 16))
    num_patches = _GRID[0] * _GRID[1]
    return ImageFeatures(
        image_key=_key(name),
        width=336,
        height=336,
        grid=None,
        patch_grids=(_GRID,),
        attention_layers=(-2,),
        features=[torch.randn(num_patches, _WIDTH, generator=numbers)],
        cls_attention=[torch.rand(1, num_patches, generator=numbers)],
        cls=torch.randn(1, _WIDTH, generator=numbers),
    )


def _identity() -> CacheIdentity:
    return CacheIdentity(
        encoder_digest="e" * 64,
        encoder_dtype="float32",
        select_layer=-2,
        preprocessing={"mean": [0.5] * 3, "std": [0.5] * 3, "rescale": "1/255"},
        slicing={"max_slices": 6, "resolution": 336, "patch_size": 14},
        versions={"slicing": 1, "resizing": 1, "encoding": 1},
    )

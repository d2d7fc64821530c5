"""Reading of features from local disk, against raw files and other formats: `python benchmarks/cache_reading.py`.

Every format holds equal images (random numbers of the paper's shapes). Each round reads all images with every reader in
turn, so that a slow moment of the machine affects all readers. A ratio is the median over the rounds of raw files' time
(equal order, equal number of threads) divided by the reader's time. The files are in the page cache, unless --cold is given.

random      get() and prefetch() of the feature cache, raw files, MDS and .pt files can read any image. WebDataset cannot:
            its column shows shuffled shards with a shuffle buffer, which its users get instead.
sequential  Images are read in the order in which they were written.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from reading_peers import Peer, open_peers

from meteor.cache import CacheIdentity, FeatureCache, calibrate, commit, create_cache, encode_row, write_feature_file
from meteor.cache.row import PAYLOAD_COLUMNS
from meteor.features import ImageFeatures

NUM_THREADS = 8
IMAGES_PER_FILE = 32
SIDE = 24
GRIDS = (None, (2, 2), (2, 2), (2, 3), (2, 3))


@dataclass(frozen=True)
class Reader:
    """Reader that reads all images of the given keys in order; its time is compared with that of ``baseline``."""

    name: str
    num_threads: int
    checksum: str
    baseline: str
    read: Callable[[Sequence[str]], None]
    read_sequentially: Callable[[Sequence[str]], None] | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--folder", help="folder for temporary files (default: the system's)")
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before each reading")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name, ExitStack() as peers:
        folder = Path(name)
        written = {peer.name: peer for peer in open_peers(folder / "peers", IMAGES_PER_FILE)}
        checksums = write(str(folder / "cache"), arguments, [RawFiles(folder / "raw"), *written.values()])
        cache = FeatureCache.open(find_cache(folder / "cache"))
        describe(cache, checksums)
        readers = list(local_readers(cache, folder / "raw", checksums, list(written.values())))
        drop = partial(drop_from_page_cache, folder) if arguments.cold else lambda: None
        rounds = measure(readers, list(checksums), arguments.rounds, before_each=drop)
        print_table(readers, rounds, len(checksums))
        peers.close()


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=200, help="number of images")
    parser.add_argument("--width", type=int, default=1024, help="values per patch; a sub-image has 576 patches")
    parser.add_argument("--codec", default="float16", help="codec of the feature cache")
    parser.add_argument("--rounds", type=int, default=5, help="number of measured rounds, after a warm-up round")


def make_image(i: int, width: int) -> ImageFeatures:
    """Make image number ``i``: of five images, one has no slices, two have four and two have six, of 576 patches each."""
    numbers = torch.Generator().manual_seed(i)
    grid = GRIDS[i % len(GRIDS)]
    num_sub_images = 1 + (grid[0] * grid[1] if grid else 0)
    num_patches = SIDE * SIDE
    return ImageFeatures(
        image_key=f"{random.Random(i).getrandbits(256):064x}",
        width=336,
        height=336,
        grid=grid,
        patch_grids=((SIDE, SIDE),) * num_sub_images,
        attention_layers=(-2,),
        features=[torch.randn(num_patches, width, generator=numbers).half() for _ in range(num_sub_images)],
        cls_attention=[torch.rand(1, num_patches, generator=numbers) for _ in range(num_sub_images)],
        cls=torch.randn(num_sub_images, width, generator=numbers),
    )


def write(root_uri: str, arguments: argparse.Namespace, peers: Sequence[Peer]) -> dict[str, int]:
    """Write the images into a cache below the root and into every peer's files; return each payload's crc32 by key."""
    identity = CacheIdentity(
        encoder_digest="0" * 64,
        encoder_dtype="float16",
        select_layer=-2,
        preprocessing={"mean": [0.5] * 3, "std": [0.5] * 3, "rescale": "1/255"},
        slicing={"max_slices": 6, "resolution": 336, "patch_size": 14},
    )
    uri = create_cache(root_uri, identity, arguments.codec)
    codec = calibrate(uri, (make_image(i, arguments.width) for i in range(min(arguments.images, 16))))
    checksums = {}
    for start in range(0, arguments.images, IMAGES_PER_FILE):
        rows = []
        for i in range(start, min(start + IMAGES_PER_FILE, arguments.images)):
            image = make_image(i, arguments.width)
            rows.append(encode_row(image, codec))
            payload = b"".join(rows[-1][name][0].as_py() for name in PAYLOAD_COLUMNS)
            checksums[image.image_key] = zlib.crc32(payload)
            for peer in peers:
                peer.write(image, payload)
        write_feature_file(uri, rows)
    commit(uri)
    for peer in peers:
        peer.finish()
    return checksums


class RawFiles(Peer):
    """Raw files, one per image, with nothing but the payload."""

    name, checksum = "raw files", "crc32"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True)

    def write(self, image: ImageFeatures, payload: bytes) -> None:
        (self._folder / image.image_key).write_bytes(payload)


def local_readers(cache: FeatureCache, raw: Path, checksums: dict[str, int], peers: Sequence[Peer]) -> Iterator[Reader]:
    def read_raw(key: str) -> None:
        with open(raw / key, "rb", buffering=0) as file:
            check(key, file.read(), checksums)

    single, many = "raw files, 1 thread", f"raw files, {NUM_THREADS} threads"
    yield Reader(single, 1, "crc32", single, partial(one_by_one, read_raw))
    yield Reader(many, NUM_THREADS, "crc32", many, partial(in_threads, NUM_THREADS, read_raw))
    yield Reader("ours, get()", 1, "crc32", single, partial(one_by_one, cache.get))
    yield Reader("ours, prefetch()", NUM_THREADS, "crc32", many, partial(prefetch, cache, NUM_THREADS))
    for peer in peers:
        read, read_sequentially = peer.readers(partial(check, checksums=checksums))
        yield Reader(peer.name, 1, peer.checksum, single, read, read_sequentially)


def check(key: str, payload: Any, checksums: dict[str, int]) -> None:
    if zlib.crc32(payload) != checksums[key]:
        raise SystemExit(f"{key}: other bytes were read than written; the comparison is invalid")


def one_by_one(read: Callable[[str], Any], keys: Sequence[str]) -> None:
    for key in keys:
        read(key)


def in_threads(num_threads: int, read: Callable[[str], Any], keys: Sequence[str]) -> None:
    with ThreadPoolExecutor(num_threads) as pool:
        # The lambda returns None instead of the image, because a list of all images would not fit into memory.
        for pending in [pool.submit(lambda key: read(key) and None, key) for key in keys]:
            pending.result()


def prefetch(cache: FeatureCache, num_threads: int, keys: Sequence[str]) -> None:
    num_read = sum(1 for _ in cache.prefetch(keys, num_threads=num_threads))
    assert num_read == len(keys)


def measure(
    readers: Sequence[Reader], keys: Sequence[str], num_rounds: int, *, before_each: Callable[[], None] = lambda: None
) -> list[dict[tuple[str, str], float]]:
    """Measure seconds by (reader, order), for each round after the warm-up."""
    rounds = []
    for i in range(1 + num_rounds):
        shuffled = random.Random(i).sample(keys, len(keys))
        seconds = {}
        for reader in readers:
            ways = {"random": (reader.read, shuffled), "sequential": (reader.read_sequentially or reader.read, keys)}
            for order, (read, ordered) in ways.items():
                before_each()
                started = time.perf_counter()
                read(ordered)
                seconds[reader.name, order] = time.perf_counter() - started
        rounds.append(seconds)
    return rounds[1:]


def print_table(readers: Sequence[Reader], rounds: Sequence[dict[tuple[str, str], float]], num_images: int) -> None:
    print("| reader | threads | checksum | random: images/s | of baseline | sequential: images/s | of baseline |")
    print("|---|---|---|---|---|---|---|")
    for reader in readers:
        cells = [reader.name, str(reader.num_threads), reader.checksum]
        for order in ("random", "sequential"):
            ratio = statistics.median(
                seconds[reader.baseline, order] / seconds[reader.name, order] for seconds in rounds
            )
            rate = num_images / statistics.median(seconds[reader.name, order] for seconds in rounds)
            cells += [f"{rate:.0f}", f"{ratio:.2f}" + ("" if reader.baseline != reader.name else " (baseline)")]
        print(f"| {' | '.join(cells)} |")


def describe(cache: FeatureCache, checksums: dict[str, int]) -> None:
    print(
        f"{len(checksums)} images, {cache.num_sub_images / len(cache):.1f} sub-images each, codec {cache.codec}, "
        f"{cache.num_bytes / 1e6:.0f} MB ({cache.num_bytes / len(cache) / 1e6:.2f} MB per image), "
        f"{os.cpu_count()} CPU cores\n"
    )


def find_cache(root: Path) -> str:
    [identity] = root.glob("*/*/identity.json")
    return str(identity.parent)


def drop_from_page_cache(folder: Path) -> None:
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()

"""Reading of features from S3, against plain parallel GETs: `python benchmarks/cache_reading_s3.py --server ceph`.

The cache is written to the store. Then every reader requests equal byte ranges, in random and in written order, with an equal
number of threads and a crc32 over the received bytes. `cache_reading.py` describes rounds and ratios.

--server environment   uses the store that the AWS_* variables name, below --root.
--server ceph          starts a Ceph gateway on this machine for the run, with its objects in memory.
"""

import argparse
import importlib.util
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import botocore.config
import torch
import urllib3
from cache_reading import (
    Reader,
    add_options,
    describe,
    in_threads,
    measure,
    one_by_one,
    prefetch,
    print_table,
    write,
)

from meteor import storage
from meteor.cache import FeatureCache
from meteor.cache.disk_tier import DiskTier
from meteor.cache.manifest import read_keys
from meteor.cache.row import PAYLOAD_COLUMNS, payload_crc32

_CEPH = Path(__file__).parent.parent / "tests" / "s3" / "ceph.py"
# URI, start and size of a byte range, and start and size of the payload's three parts within the range.
Range = tuple[str, int, int, list[tuple[int, int]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--server", choices=["environment", "ceph"], default="environment", help="store to read from")
    parser.add_argument("--root", default="s3://benchmark", help="bucket, created if absent, and prefix")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 8], help="numbers of threads to measure with")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with _server(arguments.server), tempfile.TemporaryDirectory() as folder:
        root = storage.join(arguments.root, f"reading-{uuid.uuid4().hex}")
        client = make_client(max(arguments.threads))
        make_bucket(client, urlsplit(root).netloc)
        try:
            checksums = write(root, arguments, [])
            [identity] = [info.uri for info in storage.list_objects(root) if info.uri.endswith("/identity.json")]
            cache = FeatureCache.open(identity.rpartition("/")[0])
            tiered = FeatureCache.open(cache.uri, disk_tier=DiskTier(folder, 1 << 40))
            describe(cache, checksums)
            readers = [
                reader for num in arguments.threads for reader in s3_readers(cache, tiered, client, checksums, num)
            ]
            print_table(readers, measure(readers, list(checksums), arguments.rounds), len(checksums))
        finally:
            for info in storage.list_objects(root):
                storage.delete(info.uri)


def s3_readers(
    cache: FeatureCache, tiered: FeatureCache, client: Any, checksums: dict[str, int], num_threads: int
) -> Iterator[Reader]:
    ranges = read_ranges(cache)
    pool = urllib3.PoolManager(maxsize=num_threads, retries=False)
    bucket = urlsplit(cache.uri).netloc
    urls = {
        uri: client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": urlsplit(uri).path[1:]})
        for uri in {uri for uri, *_ in ranges.values()}
    }

    def get_plain(key: str) -> None:
        uri, start, size, parts = ranges[key]
        headers = {"Range": f"bytes={start}-{start + size - 1}"}
        check_parts(key, pool.request("GET", urls[uri], headers=headers).data, parts, checksums)

    def get_boto3(key: str) -> None:
        uri, start, size, parts = ranges[key]
        requested = f"bytes={start}-{start + size - 1}"
        answer = client.get_object(Bucket=bucket, Key=urlsplit(uri).path[1:], Range=requested)
        check_parts(key, answer["Body"].read(), parts, checksums)

    all_of = one_by_one if num_threads == 1 else partial(in_threads, num_threads)
    plain = f"urllib3, {num_threads} threads"
    yield Reader(plain, num_threads, "crc32", plain, partial(all_of, get_plain))
    yield Reader(f"boto3 get_object, {num_threads} threads", num_threads, "crc32", plain, partial(all_of, get_boto3))
    yield Reader(f"ours, get(), {num_threads} threads", num_threads, "crc32", plain, partial(all_of, cache.get))
    read_ahead = partial(prefetch, cache, num_threads)
    yield Reader(f"ours, prefetch(), {num_threads} threads", num_threads, "crc32", plain, read_ahead)
    # The warm-up round, which does not count, fills the disk tier.
    tier = partial(prefetch, tiered, num_threads)
    yield Reader(f"ours, prefetch(), {num_threads} threads, disk tier", num_threads, "crc32", plain, tier)


def check_parts(key: str, data: bytes, parts: list[tuple[int, int]], checksums: dict[str, int]) -> None:
    view = memoryview(data)
    if payload_crc32(*(view[start : start + size] for start, size in parts)) != checksums[key]:
        raise SystemExit(f"{key}: other bytes were read than written; the comparison is invalid")


def read_ranges(cache: FeatureCache) -> dict[str, Range]:
    """Return the byte range that `FeatureCache.get` requests for each image key."""
    ranges = {}
    for row in read_keys(cache.uri, cache.manifest).to_pylist():
        start = row["features_offset"]
        parts = [(row[f"{name}_offset"] - start, row[f"{name}_size"]) for name in PAYLOAD_COLUMNS]
        size = sum(parts[-1])
        ranges[row["image_key"]] = (storage.join(cache.uri, row["file"]), start, size, parts)
    return ranges


def make_client(num_threads: int) -> Any:
    config = botocore.config.Config(
        max_pool_connections=num_threads,
        signature_version="s3v4",
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    return boto3.session.Session().client("s3", region_name=os.environ.get("AWS_REGION"), config=config)


def make_bucket(client: Any, bucket: str) -> None:
    if bucket not in {description["Name"] for description in client.list_buckets()["Buckets"]}:
        client.create_bucket(Bucket=bucket)


@contextmanager
def _server(name: str) -> Iterator[None]:
    if name == "environment":
        yield
        return
    spec = importlib.util.spec_from_file_location("ceph", _CEPH)
    assert spec is not None
    assert spec.loader is not None
    ceph = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ceph)
    if ceph.missing_programs():
        raise SystemExit(f"Ceph is not installed: {ceph.INSTALL}")
    with ceph.ceph_gateway() as endpoint:
        settings = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": ceph.ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": ceph.SECRET_KEY,
        }
        for variable in [variable for variable in os.environ if variable.startswith("AWS_")]:
            del os.environ[variable]
        os.environ.update(settings)
        yield


if __name__ == "__main__":
    main()

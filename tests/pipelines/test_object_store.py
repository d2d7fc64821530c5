"""Images, samples and the cache on a real S3 server: cached from there, trained from there through the disk tier."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from meteor import storage
from meteor.cache import FeatureCache
from meteor.runs.verify import verify


@pytest.mark.s3
@pytest.mark.timeout(600)
def test_images_are_cached_and_trained_from_an_object_store(make_settings, small, tmp_path, ceph_root):
    for file in (small / "data").rglob("*"):
        if file.is_file():
            storage.upload_file(str(file), storage.join(ceph_root, "data", str(file.relative_to(small / "data"))))
    # A file that is no image, and half an emoji: neither may stop a stage.
    records = storage.read_json(f"{ceph_root}/data/pretrain.json")
    storage.write_bytes(f"{ceph_root}/data/images/broken.png", b"not an image")
    talk = records[0]["conversations"]
    records += [{"id": "b", "image": "broken.png", "conversations": talk}, {"id": "\ud83d", "conversations": talk}]
    storage.write_bytes(f"{ceph_root}/data/pretrain.json", json.dumps(records).encode())
    settings = make_settings(
        output=f"{ceph_root}/runs",
        data={
            "max_bad_share": 0.5,
            "roots": {"": f"{ceph_root}/data/images"},
            "pretrain": f"{ceph_root}/data/pretrain.json",
            "finetune": None,
            "evaluate": {},
        },
        cache={"uri": f"{ceph_root}/cache", "codec": "int8", "disk_tier": str(tmp_path / "tier"), "disk_tier_gb": 1},
    )
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(settings.model_dump(mode="json")))

    def stage(name: str) -> str:
        command = [sys.executable, "-m", f"pipelines.{name}", "--run", str(run_file)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert "finished in" in stage("cache_features")
    assert "nothing to do" in stage("cache_features")
    (uri,) = {
        info.uri.partition("/data/")[0]
        for info in storage.list_objects(f"{ceph_root}/cache")
        if "/int8/data/" in info.uri
    }
    cache = FeatureCache.open(uri)
    assert cache.verify() == []
    assert "finished in" in stage("pretrain")
    kept = [file for file in Path(tmp_path / "tier").rglob("*-*") if file.is_file()]
    assert len(kept) == len(cache)
    damage_each_file_in_turn(f"{ceph_root}/runs")


def damage_each_file_in_turn(uri: str) -> None:
    """Every damaged file of a run is found by `verify`."""
    files = [info.uri for info in storage.list_objects(uri) if "/ray_train/" not in info.uri and info.size_bytes]
    # A rank's list of fragments is not read any more once the checkpoint's own list is there.
    files = [file for file in files if not re.search(r"/rank_\d+\.json$", file)]
    assert {file.rpartition("/")[2] for file in files} >= {"run.json", "summary.json", "samples.parquet"}
    assert not [problem for found in verify(uri) for problem in found.problems]
    for file in files:
        data = storage.read_bytes(file)
        middle = len(data) // 2
        storage.write_bytes(file, data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :])
        assert [problem for found in verify(uri) for problem in found.problems], file
        storage.write_bytes(file, data)

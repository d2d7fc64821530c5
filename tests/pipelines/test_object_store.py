"""Images, samples and the cache on a real S3 server: cached from there, trained from there through the disk tier."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from meteor import storage
from meteor.cache import FeatureCache


@pytest.mark.s3
@pytest.mark.timeout(600)
def test_images_are_cached_and_trained_from_an_object_store(make_settings, small, tmp_path, ceph_root):
    for file in (small / "data").rglob("*"):
        if file.is_file():
            storage.upload_file(str(file), storage.join(ceph_root, "data", str(file.relative_to(small / "data"))))
    settings = make_settings(
        data={
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

"""Images inside Parquet files and archives go through cache_features like image files, on local disk and on S3."""

import hashlib
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from data_forms import IMAGE, PAIRS, hub_image, make_scenes, parquet_bytes, png, tar_bytes, write_form

from meteor import storage
from meteor.assembly import Inputs
from meteor.assembly.sample_tables import plan_samples
from meteor.assembly.training_stage import prepare
from meteor.cache import FeatureCache
from meteor.planning.run_check import check_run
from pipelines import cache_features

pytestmark = [pytest.mark.usefixtures("ray_once"), pytest.mark.filterwarnings("ignore")]


def plan_of(settings):
    inputs = Inputs(settings)
    return plan_samples(inputs, prepare(inputs, "pretrain"))


def rows_of(plan, folder):
    assert not plan.excluded
    plan.table.write(str(folder / "table.parquet"))
    return pq.read_table(folder / "table.parquet").to_pylist()


@pytest.fixture
def make_run(make_settings, tmp_path):
    """Settings of a run that trains stage 1 on files in a folder, with its cache there."""

    def make(folder, name, *files):
        roots = {"": storage.join(folder, "images")}
        data = {"roots": roots, "pretrain": dict.fromkeys(files, 1.0), "finetune": None, "evaluate": {}}
        return make_settings(
            output=str(tmp_path / name),
            data={**data, "min_bad_images": 100},
            cache={"uri": storage.join(folder, "cache")},
            pretrain={"template": "vicuna_v1"},
        )

    return make


def write_forms(folder, scenes):
    """Write scenes as Parquet and as archives, and then as LLaVA's JSON."""
    inside = [write_form(form, folder, scenes, num_shards=2) for form in ("cauldron.parquet", "shards.tar")]
    return inside, write_form("llava.json", folder, scenes)


@pytest.mark.slow
def test_images_inside_files_are_cached_by_content(make_run, tmp_path):
    scenes, folder = make_scenes(9), str(tmp_path / "data")
    forms, plain = write_forms(folder, scenes)
    inside, outside = make_run(folder, "inside", *forms), make_run(folder, "outside", plain)
    first = cache_features.run(Inputs(inside))
    distinct = {image for _, images, _ in scenes for image in images}
    assert (first.counts["images_encoded"], first.counts["quarantined"]) == (len(distinct), 0)
    assert FeatureCache.open(first.results["cache"]).verify() == []
    assert cache_features.run(Inputs(inside)).reused
    second = cache_features.run(Inputs(outside))
    assert (second.counts["images_encoded"], second.counts["images_cached"]) == (0, len(distinct))
    assert len(plan_of(inside).table) == 2 * len(scenes)
    for form in forms:
        assert rows_of(plan_of(make_run(folder, "one", form)), tmp_path) == rows_of(plan_of(outside), tmp_path)


def write_bad(folder, good):
    """Write a Parquet file and an archive with a good image each and bad ones; return the reasons."""
    texts = pa.array([[{"user": "what?", "assistant": "that."}]] * 4, PAIRS)
    images = [[hub_image(good)], [hub_image(b"")], [hub_image(b"text")], [hub_image(None, "absent.png")]]
    table = pa.table({"images": pa.array(images, pa.list_(IMAGE)), "texts": texts})
    storage.write_bytes(storage.join(folder, "bad.parquet"), parquet_bytes(table))
    members = [("a.png", png(1)[:-600]), ("a.txt", b"cut"), ("b.png", good), ("b.txt", b"good")]
    whole = tar_bytes(members)
    # Without the blocks of zeros that end an archive.
    storage.write_bytes(storage.join(folder, "bad.tar"), whole[: len(whole.rstrip(b"\0")) // 512 * 512 + 512])
    return {"empty": 1, "not_an_image": 1, "missing": 1, "truncated": 1}


def test_bad_images_inside_files_are_quarantined_and_the_check_says_so(make_run, small, chain, encode, tmp_path):
    folder = str(tmp_path / "data")
    # An image that the cache has already: an encoder takes seconds to start.
    good = sorted((small / "data/images/train").iterdir())[0].read_bytes()
    reasons = write_bad(folder, good)
    files = [storage.join(folder, name) for name in ("bad.parquet", "bad.tar")]
    settings = make_run(folder, "spoilt", *files)
    encoded = encode(settings, index=False)
    assert (encoded.counts["images_encoded"], encoded.extra["reasons"]) == (0, reasons)
    plan = plan_of(settings)
    assert {row.reason for row in plan.excluded} == {*reasons, "bad_record"}
    assert len(plan.table) == 2
    report = check_run(Inputs(settings), full=True)
    assert {image.reason for one in report.sets for source in one.sources for image in source.bad} == set(reasons)
    assert "cut short" in report.to_text()
    assert "inside its files" in report.to_text()


@pytest.mark.s3
@pytest.mark.timeout(600)
def test_images_inside_files_of_an_object_store_are_cached_by_content(make_run, tmp_path, ceph_root):
    scenes = make_scenes(9)
    forms, plain = write_forms(ceph_root, scenes)
    inside, outside = make_run(ceph_root, "inside", *forms), make_run(ceph_root, "outside", plain)

    def encode(settings):
        # A process of its own, whose workers get this test's credentials.
        run_file = tmp_path / "run.yaml"
        run_file.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
        command = [sys.executable, "-m", "pipelines.cache_features", "--run", str(run_file)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    assert "finished in" in encode(inside)
    assert "nothing to do" in encode(inside)
    distinct = {image for _, images, _ in scenes for image in images}
    assert sorted(Inputs(inside).cache().keys()) == sorted(hashlib.sha256(image).hexdigest() for image in distinct)
    assert Inputs(inside).cache().verify() == []
    assert "finished in" in encode(outside)
    for form in forms:
        assert rows_of(plan_of(make_run(ceph_root, "one", form)), tmp_path) == rows_of(plan_of(outside), tmp_path)

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import yaml
from PIL import Image

from meteor.assembly import Inputs, cache_identity, load_encoder
from meteor.cache import FeatureCache, create_cache
from meteor.errors import QuarantineLimitError
from pipelines import cache_features
from pipelines.command import stage_main

pytestmark = [pytest.mark.usefixtures("ray_once"), pytest.mark.filterwarnings("ignore")]


def write_samples(path, names):
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    path.write_text(json.dumps([{"id": str(i), "image": name, "conversations": turns} for i, name in enumerate(names)]))


@pytest.fixture
def images(tmp_path):
    """Three good images, one of them under two names, and four bad ones."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i, size in enumerate([(60, 60), (200, 90), (90, 200)]):
        Image.new("RGB", size, (50 * i, 100, 200)).save(folder / f"{i}.png")
    shutil.copy(folder / "0.png", folder / "again.png")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("no image")
    (folder / "cut.png").write_bytes((folder / "1.png").read_bytes()[:60])
    Image.new("RGB", (2000, 10)).save(folder / "long.png")
    return folder


def make_run(make_settings, tmp_path, images, names, **data):
    samples = tmp_path / "samples.json"
    write_samples(samples, names)
    return make_settings(
        data={"roots": {"": str(images)}, "pretrain": str(samples), "finetune": None, "evaluate": {}, **data}
    )


def test_each_distinct_image_is_encoded_once_and_a_second_run_reads_nothing(make_settings, tmp_path, images):
    settings = make_run(make_settings, tmp_path, images, ["0.png", "1.png", "again.png"])
    first = cache_features.run(Inputs(settings))
    assert (first.counts["images"], first.counts["distinct_images"], first.counts["images_encoded"]) == (3, 2, 2)
    cache = FeatureCache.open(first.results["cache"])
    assert len(cache) == 2
    assert cache.verify() == []
    second = cache_features.run(Inputs(settings))
    assert second.reused
    assert second.counts == first.counts


@pytest.fixture
def make_larger(make_settings, tmp_path, small, images):
    """A run over two images of the small run and those named."""
    folder = small / "data/images/train"
    known = [f"small/{path.name}" for path in sorted(folder.iterdir())[:2]]

    def make(*names):
        roots = {"small/": str(folder), "": str(images)}
        return make_run(make_settings, tmp_path, images, [*known, *names], roots=roots)

    return make


def test_a_larger_data_set_encodes_only_what_is_new(make_settings, make_larger, encode):
    before = encode(make_settings()).counts["images_cached"]
    more = cache_features.run(Inputs(make_larger("0.png", "again.png")))
    counts = ("images", "images_read", "images_encoded", "images_cached")
    assert [more.counts[name] for name in counts] == [4, 2, 1, before + 1]


def test_too_many_bad_images_fail_the_job_after_the_good_ones_are_published(make_settings, tmp_path, images):
    bad = {
        "empty.jpg": "empty",
        "text.jpg": "not_an_image",
        "cut.png": "truncated",
        "long.png": "aspect_ratio",
        "absent.png": "missing",
        "../escape.png": "outside_roots",
    }
    make = partial(make_run, make_settings, tmp_path, images, ["0.png", "1.png", *bad])
    with pytest.raises(QuarantineLimitError, match=r"6 of 8 images are bad \(1 \w+, 1 \w+"):
        cache_features.run(Inputs(make(min_bad_images=2)))
    (folder,) = (tmp_path / "out/cache").glob("*/float16")
    cache = FeatureCache.open(str(folder))
    assert len(cache) == 2
    assert {row.name: row.reason for row in cache.quarantine()} == bad
    # With a higher limit the job finishes, and encodes nothing again.
    summary = cache_features.run(Inputs(make()))
    assert (summary.counts["quarantined"], summary.counts["images_encoded"]) == (6, 0)
    assert summary.extra["reasons"] == dict.fromkeys(bad.values(), 1)
    assert FeatureCache.open(summary.results["cache"]).version == cache.version


def test_a_repaired_image_is_encoded_by_the_next_run(make_larger, encode, images):
    settings = make_larger("cut.png")
    damaged = encode(settings).counts
    assert (damaged["quarantined"], damaged["images_encoded"]) == (1, 0)
    shutil.copy(images / "2.png", images / "cut.png")
    repaired = cache_features.run(Inputs(settings)).counts
    assert (repaired["quarantined"], repaired["images_encoded"]) == (0, 1)
    assert repaired["images_cached"] == damaged["images_cached"] + 1


def test_an_error_inside_an_actor_is_told_in_one_line(make_settings, tmp_path, images, capsys):
    settings = make_run(make_settings, tmp_path, images, ["0.png"])
    identity = cache_identity(settings, load_encoder(settings))
    uri = create_cache(settings.cache_root, identity, settings.cache.codec)
    (Path(uri) / "data").write_text("a file where a folder should be")
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    assert stage_main("cache_features", "", cache_features.run, cache_features.plan, ["--run", str(run_file)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"StorageError: {uri}/data/")
    assert "a file stands where its folder" in last

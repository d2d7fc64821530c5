"""`meteor cache` as its users meet it: exit codes, JSON, and what the words say."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from meteor.assembly import cache_identity, index_uri, load_encoder, pixel_settings
from meteor.cache import (
    CacheIdentity,
    DatasetIndex,
    FeatureCache,
    IndexRow,
    QuarantineRow,
    commit,
    create_cache,
    encode_row,
    get_codec,
    record_quarantine,
    write_feature_file,
)
from meteor.config import load_run, resolve_paths
from meteor.vision.live import LiveFeatures

HELD, OTHER = "a" * 64, "b" * 64


@pytest.fixture
def root(tmp_path):
    return tmp_path / "caches"


@pytest.fixture
def make_cache(make_features, root):
    def make(codec="float16", **changes):
        fields = {
            "encoder_digest": "e" * 64,
            "encoder_dtype": "float32",
            "select_layer": -2,
            "preprocessing": {"mean": [0.5] * 3, "std": [0.5] * 3, "rescale": "1/255"},
            "slicing": {"max_slices": 6, "resolution": 56, "patch_size": 14},
        }
        uri = create_cache(str(root), CacheIdentity(**{**fields, **changes}), codec)
        images = [make_features(HELD, sliced=True), make_features(OTHER)]
        write_feature_file(uri, [encode_row(image, get_codec(codec)) for image in images])
        record_quarantine(
            uri, [QuarantineRow("c" * 64, "odd.jpg", "truncated", "the file ends early", "/in/odd.jpg", 9)]
        )
        commit(uri)
        return uri

    return make


@pytest.fixture
def cache(make_cache):
    return make_cache()


def damage(cache):
    """Change one byte of the first image's features."""
    (file,) = (Path(cache) / "data").iterdir()
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 1
    file.write_bytes(data)
    return file


def test_show_tells_what_it_holds(call, cache):
    code, shown, _ = call("cache", "show", cache, "--json")
    content = json.loads(shown)
    assert code == 0
    assert (content["uri"], content["version"], content["codec"]) == (cache, 1, "float16")
    assert (content["images"], content["sub_images"], content["quarantined"]) == (2, 4, 1)
    assert content["key"] == Path(cache).parent.name
    assert content["identity"]["encoder_digest"] == "e" * 64
    # Half-precision features of 16 channels, one attention row and the class tokens in single precision.
    num_patches = 6 + 6 + 6 + 8
    assert content["payload_bytes"] == num_patches * 16 * 2 + num_patches * 4 + 4 * 16 * 4
    assert 0 < content["codec_error"]["max_relative_error"] < 2**-10
    plain = call("cache", "show", cache)[1]
    assert dict(line.split(maxsplit=1) for line in plain.splitlines())["images"] == "2"


def test_show_lists_the_runs_that_read_it(call, cache):
    FeatureCache.open(cache).pin("run1", {"stage": "pretrain"})
    (run,) = json.loads(call("cache", "show", cache, "--json")[1])["runs"]
    assert (run["run_digest"], run["manifest_version"], run["stage"]) == ("run1", 1, "pretrain")


def test_quarantine_lists_images_with_reason_file_and_bytes(call, cache):
    code, shown, _ = call("cache", "quarantine", cache)
    assert (code, shown.split(maxsplit=2)) == (0, ["truncated", "odd.jpg", "the file ends early\n"])
    (row,) = json.loads(call("cache", "quarantine", cache, "--json")[1])
    assert row == {
        "image_key": "c" * 64,
        "name": "odd.jpg",
        "reason": "truncated",
        "message": "the file ends early",
        "uri": "/in/odd.jpg",
        "size_bytes": 9,
    }


def test_verify_gives_code_1_where_a_byte_changed_and_repair_lets_go_of_that_image(call, cache):
    assert call("cache", "verify", cache) == (0, "2 images intact\n", "")
    file = damage(cache)
    code, shown, _ = call("cache", "verify", cache, "--json")
    assert code == 1
    report = json.loads(shown)
    assert report["images"] == 2
    assert report["problems"]
    assert all(file.name in problem for problem in report["problems"])
    assert "--repair" in call("cache", "verify", cache)[1]
    repaired = json.loads(call("cache", "verify", cache, "--repair", "--json")[1])
    assert (repaired["version"], len(repaired["dropped"])) == (2, 1)
    assert any(file.name in problem for problem in repaired["problems"])
    assert call("cache", "verify", cache)[:2] == (0, "1 images intact\n")


def test_repair_makes_a_damaged_key_index_again(call, cache):
    (index,) = (Path(cache) / "keys").iterdir()
    index.write_bytes(index.read_bytes()[:-20])
    code, _, errors = call("cache", "verify", cache)
    assert code == 2
    assert "--repair" in errors
    assert call("cache", "verify", cache, "--repair")[0] == 0
    assert call("cache", "verify", cache)[:2] == (0, "2 images intact\n")


def test_ls_lists_every_cache_below_a_root(call, make_cache, root):
    assert call("cache", "ls", root)[1] == f"no caches below {root}\n"
    uris = {make_cache(), make_cache("float32"), make_cache(select_layer=-1)}
    listed = json.loads(call("cache", "ls", root, "--json")[1])
    assert {one["uri"] for one in listed} == uris
    assert {(one["num_images"], one["num_sub_images"], one["num_quarantined"]) for one in listed} == {(2, 4, 1)}
    assert {one["identity"]["select_layer"] for one in listed} == {-2, -1}
    text = call("cache", "ls", root)[1]
    assert text.count("version 1, 2 images, 4 sub-images") == 3


def test_diff_names_the_field_of_the_key_and_the_images(call, make_cache, make_features):
    one, other = make_cache(), make_cache(select_layer=-1)
    assert call("cache", "diff", one, one)[0] == 0
    code, shown, _ = call("cache", "diff", one, other)
    assert code == 1
    assert "select_layer: -2 != -1" in shown
    write_feature_file(other, [encode_row(make_features("d" * 64), get_codec("float16"))])
    commit(other)
    found = json.loads(call("cache", "diff", one, other, "--json")[1])
    assert (found["equal"], found["only_in_b"]) == (False, ["d" * 64])
    assert json.loads(call("cache", "diff", one, one, "--json")[1])["equal"] is True


def test_gc_changes_nothing_unless_told(call, cache, make_features):
    orphan = Path(cache) / "data" / f"{'0' * 32}.parquet"
    shutil.copy(next((Path(cache) / "data").iterdir()), orphan)
    code, shown, _ = call("cache", "gc", cache, "--older-than", "0")
    assert code == 0
    assert "its writer never finished it" in shown
    assert "nothing was changed" in shown
    assert orphan.exists()
    assert "data: its writer" not in call("cache", "gc", cache)[1]  # younger than a day
    report = json.loads(call("cache", "gc", cache, "--older-than", "0", "--delete", "--json")[1])
    assert report["done"]["num_deleted"] == 1
    assert report["done"]["deleted_bytes"] == report["plan"]["deleted_bytes"] > 0
    assert not orphan.exists()
    assert call("cache", "verify", cache)[0] == 0


def test_gc_warns_when_it_spares_nothing_and_refuses_what_is_no_age(call, cache):
    assert "make sure that no job uses this cache" in call("cache", "gc", cache, "--older-than", "0")[2]
    assert call("cache", "gc", cache)[2] == ""
    for hours in ("-1", "nan", "soon"):
        with pytest.raises(SystemExit):
            call("cache", "gc", cache, "--older-than", hours)


def test_gc_keeps_a_pinned_version_until_it_is_unpinned(call, cache, make_features):
    FeatureCache.open(cache).pin("run1", {})
    write_feature_file(cache, [encode_row(make_features("d" * 64), get_codec("float16"))])
    commit(cache)
    call("cache", "gc", cache, "--older-than", "0", "--delete")
    assert len(FeatureCache.open(cache, version=1)) == 2
    call("cache", "gc", cache, "--older-than", "0", "--delete", "--unpin", "run1")
    assert not list((Path(cache) / "manifests").glob("*1.json"))
    code, _, errors = call("cache", "gc", cache, "--unpin", "run1")
    assert code == 2
    assert "no pin" in errors


def test_transcode_makes_another_codec_beside(call, cache):
    code, shown, _ = call("cache", "transcode", cache, "--codec", "int8", "--json")
    assert code == 0
    content = json.loads(shown)
    assert content["uri"] == str(Path(cache).parent / "int8")
    assert content["images"] == 2
    assert content["payload_bytes"] < FeatureCache.open(cache).num_bytes
    assert 0 < content["codec_error"]["max_relative_error"] < 0.05


@pytest.fixture
def run(write_run, make_image, png, clip_folder, llm_folder, tokenizer_folder, tmp_path):
    """A run file of three samples over two images, one of them missing a file."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, size in [("0.png", (60, 60)), ("1.png", (200, 90))]:
        (folder / name).write_bytes(png(make_image(*size)))
    llm = tmp_path / "llm"
    shutil.copytree(llm_folder, llm)
    for file in Path(tokenizer_folder).iterdir():
        shutil.copy(file, llm)
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "that"}]
    names = ["0.png", "1.png", "1.png", "gone.png"]
    samples = [{"id": str(i), "image": name, "conversations": turns} for i, name in enumerate(names)]
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    return write_run(
        {
            "output": str(tmp_path / "out"),
            "data": {"roots": {"": str(folder)}, "finetune": str(tmp_path / "samples.json")},
            "slicing": {"resolution": 56, "max_slices": 2},
            "vision": {"path": clip_folder, "dtype": "float32"},
            "llm": {"path": str(llm)},
        }
    )


def fill(run):
    """What cache_features leaves, without Ray: the cache and the dataset index."""
    settings = resolve_paths(load_run(run, []))
    encoder = load_encoder(settings)
    files = sorted(Path(settings.data.roots[""]).glob("*.png"))
    keys = {hashlib.sha256(file.read_bytes()).hexdigest(): str(file) for file in files}
    live = LiveFeatures(encoder, keys, pixel_settings(settings))
    images = [live.get(key) for key in keys]
    uri = create_cache(settings.cache_root, cache_identity(settings, encoder), "float16")
    write_feature_file(uri, [encode_row(image, get_codec("float16")) for image in images])
    commit(uri)
    DatasetIndex.publish(
        index_uri(settings),
        [
            IndexRow(
                Path(keys[image.image_key]).name,
                keys[image.image_key],
                1,
                "e",
                image.image_key,
                image.width,
                image.height,
                "ok",
            )
            for image in images
        ],
    )
    return uri


def test_plan_counts_images_from_headers_before_anything_is_cached(call, run):
    code, shown, _ = call("cache", "plan", "--run", run, "--rate", "10", "--json")
    assert code == 0
    plan = json.loads(shown)
    assert (plan["num_images"], plan["num_distinct"], plan["num_unusable"], plan["num_cached"]) == (3, 2, 1, 0)
    assert plan["num_unindexed"] == 3
    assert plan["encoder_seconds"] == plan["num_sub_images"] / 10
    (stage,) = plan["stages"]
    # The sliced image is shown twice.
    assert stage["num_samples"] == 3
    assert stage["num_sub_images"] > plan["num_sub_images"]
    assert 0 < stage["encoder_share"] < 1


def test_plan_says_exactly_what_the_cache_will_take(call, run):
    plan = json.loads(call("cache", "plan", "--run", run, "--json")[1])
    cache = FeatureCache.open(fill(run))
    assert plan["num_sub_images"] == cache.num_sub_images
    assert plan["size_bytes"]["float16"] == cache.num_bytes
    after = json.loads(call("cache", "plan", "--run", run, "--json")[1])
    assert (after["num_cached"], after["num_unindexed"]) == (2, 1)
    assert "USD per month" in call("cache", "plan", "--run", run)[1]


def test_audit_passes_what_was_encoded_and_fails_what_was_not(call, run):
    uri = fill(run)
    code, shown, _ = call("cache", "audit", "--run", run)
    assert code == 0
    assert "audit of 2 images: passed" in shown
    cache = FeatureCache.open(uri)
    # Another encoder's numbers under the same key, as a wrong build would leave them.
    images = [cache.get(key) for key in cache.keys()]  # noqa: SIM118
    shutil.rmtree(uri)
    again = create_cache(str(Path(uri).parents[1]), cache.identity, "float16")
    for image in images:
        for part in image.features:
            part.mul_(1.5)
    write_feature_file(again, [encode_row(image, get_codec("float16")) for image in images])
    commit(again)
    code, shown, _ = call("cache", "audit", "--run", run, "--json")
    assert code == 1
    report = json.loads(shown)
    assert report["num_failed"] == 2
    assert report["worst"]["relative_error"] == pytest.approx(0.5, rel=1e-2)


def test_a_place_without_a_cache_gives_code_2(call, tmp_path):
    for action in ("show", "quarantine", "verify", "gc"):
        code, shown, errors = call("cache", action, tmp_path / "nowhere")
        assert (code, shown) == (2, "")
        assert "cache_features" in errors or "no feature cache" in errors

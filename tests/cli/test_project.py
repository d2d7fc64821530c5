"""`meteor project` as its users meet it: files, exit codes, JSON, and what the words say."""

import json

import pytest
import torch
from safetensors.torch import load_file

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
from meteor.model.trained_projector import projector_metadata
from meteor.projector.file import write_projector_file

KEYS = ["a" * 64, "b" * 64, "d" * 64]
BAD = "c" * 64


@pytest.fixture
def model(make_model):
    return make_model({"name": "meteor", "k": 3}).eval()


@pytest.fixture
def cache(model, make_features, tmp_path):
    root = tmp_path / "caches"
    uri = create_cache(str(root), CacheIdentity.from_dict(model.config.cache_identity), "float16")
    images = [make_features(key, sliced=i == 1, seed=i) for i, key in enumerate(KEYS)]
    write_feature_file(uri, [encode_row(image, get_codec("float16")) for image in images])
    record_quarantine(uri, [QuarantineRow(BAD, "x/odd.jpg", "truncated", "the file ends early")])
    commit(uri)
    rows = [IndexRow(f"x/{key[0]}.jpg", f"/in/x/{key[0]}.jpg", 1, "e", key, 100, 80, "ok") for key in KEYS]
    rows.append(IndexRow("x/odd.jpg", "/in/x/odd.jpg", 1, "e", BAD, 0, 0, "bad", "truncated"))
    rows.append(IndexRow("x/copy.jpg", "/in/x/copy.jpg", 1, "e", KEYS[0], 100, 80, "ok"))
    DatasetIndex.publish(str(root / "index"), rows)
    return uri


@pytest.fixture
def file(model, tmp_path):
    uri = str(tmp_path / "projector.safetensors")
    write_projector_file(uri, model.projector.state_dict(), projector_metadata(model.config))
    return uri


@pytest.fixture
def project(call, cache, file, tmp_path):
    """The command over the cache, with the projector's file, into the folder "out" unless told otherwise."""

    def run(*argv, **changes):
        options = {"cache": cache, "checkpoint": file, "out": tmp_path / "out", **changes}
        return call("project", *(word for name, value in options.items() for word in (f"--{name}", value)), *argv)

    return run


def test_every_image_gets_its_tokens_and_a_second_run_finds_them(project, model, cache, tmp_path):
    code, shown, errors = project()
    assert (code, errors) == (0, "")
    lines = shown.splitlines()
    size_bytes = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert lines[0].startswith(f"projected    3 images, 5 sub-images, 15 tokens, {size_bytes / 1000:.3g} kB in ")
    assert lines[1:] == [
        f"quarantined  1 image, not in the cache: {BAD} (truncated)",
        f"folder       {tmp_path / 'out'}",
    ]
    for key in KEYS:
        image, tensors = FeatureCache.open(cache).get(key), load_file(tmp_path / "out" / f"{key}.safetensors")
        assert tensors["tokens"].dtype == torch.float32
        parts = tensors["tokens"].split(tensors["num_tokens"].tolist())
        assert len(parts) == image.num_sub_images
        for i, part in enumerate(parts):
            grid = torch.tensor(image.patch_grids[i : i + 1])
            with torch.no_grad():
                truth = model.projector(image.features[i][None], image.cls_attention[i][:1], grid)
            torch.testing.assert_close(part, truth.tokens[0], rtol=1e-5, atol=1e-6)
    code, shown, _ = project()
    assert code == 0
    assert shown.startswith("projected    0 images, 0 sub-images, 0 tokens, 0 B in ")
    assert "done before  3 images\n" in shown


def test_json_has_the_same_counts(project, tmp_path):
    content = json.loads(project("--json")[1])
    assert content.pop("seconds") > 0
    assert content.pop("num_bytes") == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert content == {
        "folder": str(tmp_path / "out"),
        "num_images": 4,
        "num_before": 0,
        "num_written": 3,
        "num_sub_images": 5,
        "num_tokens": 15,
        "quarantined": {BAD: "truncated"},
    }


def test_a_model_directory_gives_the_same_tokens_and_goes_on_in_the_same_folder(project, model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    project()
    assert project(checkpoint=tmp_path / "model", out=tmp_path / "other")[0] == 0
    for key in KEYS:
        one, other = (load_file(tmp_path / folder / f"{key}.safetensors") for folder in ("out", "other"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert json.loads(project("--json", checkpoint=tmp_path / "model")[1])["num_before"] == 3


def test_named_images_lie_under_their_names(project, tmp_path):
    code, _, errors = project("x/b.jpg", "/in/x/a.jpg", "dddddd")
    assert (code, errors) == (0, "")
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.safetensors")}
    assert files == {"x/b.jpg.safetensors", "x/a.jpg.safetensors", f"{KEYS[2]}.safetensors"}
    assert json.loads(project("x/b.jpg", "--json")[1])["num_before"] == 1


def test_a_named_image_that_is_quarantined_gives_code_1_and_its_reason(project):
    code, shown, _ = project("x/b.jpg", "x/odd.jpg")
    assert code == 1
    assert "projected    1 image, 3 sub-images" in shown
    assert f"quarantined  1 image, not in the cache: {BAD} (truncated)" in shown


def test_types_are_stored_as_asked_and_do_not_mix(project, tmp_path):
    assert project("--dtype", "bfloat16", "--batch-size", "2")[0] == 0
    assert load_file(tmp_path / "out" / f"{KEYS[0]}.safetensors")["tokens"].dtype == torch.bfloat16
    code, shown, errors = project()
    assert (code, shown) == (2, "")
    assert "holds images of another projector, cache or type: dtype 'bfloat16', not 'float32'" in errors
    assert "--overwrite" in errors
    assert json.loads(project("--overwrite", "--json")[1])["num_written"] == 3
    assert load_file(tmp_path / "out" / f"{KEYS[0]}.safetensors")["tokens"].dtype == torch.float32


def test_another_projector_is_refused(project, make_model, tmp_path):
    project()
    other = make_model({"name": "meteor", "k": 3}, seed=1)
    uri = str(tmp_path / "other.safetensors")
    write_projector_file(uri, other.projector.state_dict(), projector_metadata(other.config))
    code, _, errors = project(checkpoint=uri)
    assert code == 2
    assert "projector_digest" in errors


def test_a_cache_of_another_encoder_is_refused_naming_the_field(project, model, make_features, tmp_path):
    identity = CacheIdentity.from_dict({**model.config.cache_identity, "encoder_digest": "9" * 64})
    uri = create_cache(str(tmp_path / "caches"), identity, "float16")
    write_feature_file(uri, [encode_row(make_features(KEYS[0]), get_codec("float16"))])
    commit(uri)
    code, shown, errors = project(cache=uri)
    assert (code, shown) == (2, "")
    assert errors.startswith("CacheMismatchError: the cache does not fit: encoder_digest: 999")
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_is_said_and_nothing_is_written(project, model, tmp_path):
    identity = CacheIdentity.from_dict(model.config.cache_identity)
    empty = create_cache(str(tmp_path / "empty"), identity, "float16")
    uncommitted = project(cache=empty)
    record_quarantine(empty, [QuarantineRow(BAD, "x/odd.jpg", "truncated", "the file ends early")])
    commit(empty)
    (tmp_path / "text").write_text("no tensors at all, but text that goes on for a while")
    for (code, shown, errors), words in [
        (uncommitted, "has no committed version yet; run cache_features"),
        (project(cache=empty), "holds no images; run cache_features"),
        (project(cache=tmp_path / "nowhere"), "nowhere"),
        (project(checkpoint=tmp_path / "text"), "text is no safetensors file"),
        (project(checkpoint=tmp_path / "nowhere"), "there is no projector at"),
        (project("x/nothing.jpg"), "'x/nothing.jpg' is no image key and no name in the dataset index"),
        (project("--batch-size", "0"), "the batch size is 0"),
    ]:
        assert (code, shown) == (2, "")
        assert words in errors
    assert not (tmp_path / "out").exists()


def test_cuda_where_there_is_none_is_refused(project, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, errors = project("--device", "cuda")
    assert code == 2
    assert errors.startswith("SettingsError: --device cuda: torch finds no CUDA device")


@pytest.mark.gpu
def test_on_a_gpu_the_tokens_are_bfloat16_and_those_of_the_cpu(project, tmp_path):
    assert project("--device", "cuda")[0] == 0
    assert project("--dtype", "bfloat16", out=tmp_path / "cpu")[0] == 0
    assert project("--device", "cuda", "--dtype", "float32", out=tmp_path / "float32")[0] == 0
    assert project(out=tmp_path / "cpu_float32")[0] == 0
    for one, other, tolerance in [("out", "cpu", 3e-2), ("float32", "cpu_float32", 1e-3)]:
        for key in KEYS:
            tensors, truth = (load_file(tmp_path / folder / f"{key}.safetensors") for folder in (one, other))
            assert tensors["tokens"].dtype == truth["tokens"].dtype
            assert torch.equal(tensors["num_tokens"], truth["num_tokens"])
            torch.testing.assert_close(tensors["visual_scores"], truth["visual_scores"], rtol=1e-4, atol=1e-6)
            if torch.equal(tensors["indices"], truth["indices"]):
                torch.testing.assert_close(tensors["tokens"], truth["tokens"], rtol=tolerance, atol=tolerance)


def test_help_says_what_a_file_holds(call, capsys):
    with pytest.raises(SystemExit) as stopped:
        call("project", "--help")
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    words = ["--cache", "--checkpoint", "--out", "--device", "--batch-size", "--dtype", "--json", "--overwrite"]
    words += ["tokens", "num_tokens", "indices", "visual_scores", "native_scores", "patch_grids", "project.json"]
    assert [word for word in words if word not in shown] == []


def test_one_image_under_two_names_is_told(project, caplog, tmp_path):
    assert project("x/a.jpg", "x/copy.jpg")[0] == 0
    assert "x/copy.jpg is the same image as x/a.jpg: there is one file for both" in caplog.text
    assert [path.name for path in (tmp_path / "out/x").iterdir()] == ["a.jpg.safetensors"]

"""A cache projected into files: whole, resumed, and never mixed with another projector's or cache's."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from meteor import storage
from meteor.errors import CacheError, CacheMismatchError, SettingsError, StorageError
from meteor.evaluation import project_folder
from meteor.evaluation.project import project_cache

KEYS = [letter * 64 for letter in "abdef"]  # of `make_cache`


def divided(path):
    """Sub-images of a file as its documentation says."""
    tensors = load_file(path)
    num_tokens = tensors["num_tokens"].tolist()
    num_patches = tensors["patch_grids"].prod(dim=1).tolist()
    return {
        "tokens": tensors["tokens"].split(num_tokens),
        "indices": tensors["indices"].split(num_tokens),
        "visual_scores": tensors["visual_scores"].split(num_patches),
        "native_scores": tensors["native_scores"].split(num_patches),
    }


def alone(projector, image, i):
    """The projector's output for one sub-image."""
    with torch.no_grad():
        return projector(
            image.features[i][None], image.cls_attention[i][:1], torch.tensor(image.patch_grids[i : i + 1])
        )


@pytest.fixture
def count_sub_images(trained):
    """A projector, and a list of the sizes of its batches."""
    _, projector = trained()
    sizes = []
    projector.module.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    return projector, sizes


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_each_image_has_a_file_of_what_its_sub_images_give_alone(make_cache, trained, tmp_path, place, request):
    folder = str(tmp_path / "out") if place == "disk" else request.getfixturevalue("s3_root") + "/out"
    cache, (model, projector) = make_cache(), trained()
    done = project_cache(cache, projector, folder, batch_size=4)
    files = [info.uri for info in storage.list_objects(folder)]
    assert files == [*(storage.join(folder, f"{key}.safetensors") for key in KEYS), f"{folder}/project.json"]
    assert (done.num_images, done.num_before, done.num_written) == (6, 0, 5)
    assert (done.num_sub_images, done.num_tokens) == (9, 27)
    assert done.num_bytes == sum(info.size_bytes for info in storage.list_objects(folder)[:-1])
    assert done.quarantined == {"c" * 64: "truncated"}
    for key in KEYS:
        local = tmp_path / "copy.safetensors"
        storage.download_file(storage.join(folder, f"{key}.safetensors"), str(local))
        image, parts = cache.get(key), divided(local)
        for i in range(image.num_sub_images):
            truth = alone(model.projector, image, i)
            for name, values in parts.items():
                torch.testing.assert_close(values[i], getattr(truth, name)[0].to(values[i].dtype), rtol=1e-5, atol=1e-6)


def test_metadata_and_types_say_what_a_file_is(make_cache, trained, tmp_path):
    cache, (_, projector) = make_cache(), trained(dtype=torch.bfloat16)
    project_cache(cache, projector, str(tmp_path / "out"))
    with safe_open(tmp_path / "out" / f"{'b' * 64}.safetensors", "pt") as file:
        metadata = file.metadata()
        types = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118
    assert json.loads(metadata.pop("projector")) == projector.module.settings
    assert metadata == {
        "image_key": "b" * 64,
        "width": "100",
        "height": "80",
        "grid": "2,1",
        "cache_key": cache.identity.key,
        "codec": "float16",
        "version": "1",
        "projector_digest": projector.digest,
        "select_layer": "-2",
    }
    assert types == {
        "tokens": torch.bfloat16,
        "num_tokens": torch.int32,
        "patch_grids": torch.int32,
        "indices": torch.int32,
        "visual_scores": torch.float32,
        "native_scores": torch.float32,
    }


def test_what_a_projector_does_not_have_is_not_in_the_file(make_cache, trained, tmp_path):
    project_cache(make_cache(), trained({"name": "mlp"})[1], str(tmp_path / "out"))
    tensors = load_file(tmp_path / "out" / f"{'b' * 64}.safetensors")
    assert set(tensors) == {"tokens", "num_tokens", "patch_grids", "indices"}
    assert tensors["num_tokens"].tolist() == [6, 6, 6]
    assert tensors["indices"].tolist() == [*range(6)] * 3
    project_cache(make_cache(), trained({"name": "resampler"})[1], str(tmp_path / "resampled"))
    tensors = load_file(tmp_path / "resampled" / f"{'b' * 64}.safetensors")
    assert set(tensors) == {"tokens", "num_tokens", "patch_grids"}


def test_a_run_that_fails_in_the_middle_goes_on_where_it_was(make_cache, count_sub_images, tmp_path, monkeypatch):
    cache, folder = make_cache(), tmp_path / "out"
    projector, sizes = count_sub_images
    write, written = storage.write_bytes, []

    def fails_at_the_third(uri, data):
        if len(written) == 2:
            raise StorageError("the disk is full")
        written.append(uri)
        write(uri, data)

    with monkeypatch.context() as patch:
        patch.setattr(project_folder.storage, "write_bytes", fails_at_the_third)
        with pytest.raises(StorageError, match="the disk is full"):
            project_cache(cache, projector, str(folder), batch_size=1, num_threads=1)
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert len(kept) == 2
    sizes.clear()
    done = project_cache(cache, projector, str(folder), batch_size=1)
    assert (done.num_images, done.num_before, done.num_written) == (6, 2, 3)
    missing = [key for key in KEYS if str(folder / f"{key}.safetensors") not in written]
    assert sum(sizes) == done.num_sub_images == sum(cache.get(key).num_sub_images for key in missing)
    assert len(list(folder.glob("*.safetensors"))) == 5
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    sizes.clear()
    assert project_cache(cache, projector, str(folder)).num_written == 0
    assert sizes == []


def test_only_the_files_that_are_gone_are_made_again(make_cache, count_sub_images, tmp_path):
    cache, folder = make_cache(), tmp_path / "out"
    projector, sizes = count_sub_images
    project_cache(cache, projector, str(folder))
    before = (folder / f"{'b' * 64}.safetensors").read_bytes()
    (folder / f"{'b' * 64}.safetensors").unlink()
    sizes.clear()
    done = project_cache(cache, projector, str(folder))
    assert (done.num_before, done.num_written, sizes) == (4, 1, [3])
    assert "done before  4 images" in done.to_text()
    again = load_file(folder / f"{'b' * 64}.safetensors")
    (tmp_path / "before").write_bytes(before)
    for name, value in load_file(tmp_path / "before").items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-6)


def test_images_that_the_cache_got_later_are_added(make_cache, trained, tmp_path):
    _, projector = trained()
    project_cache(make_cache(keys=["a" * 64]), projector, str(tmp_path / "out"))
    done = project_cache(make_cache(keys=["b" * 64]), projector, str(tmp_path / "out"))
    assert (done.num_before, done.num_written) == (1, 1)


def test_another_projector_cache_or_type_is_refused_unless_it_starts_over(make_cache, trained, tmp_path):
    cache, folder = make_cache(), str(tmp_path / "out")
    _, projector = trained()
    project_cache(cache, projector, folder)
    record = storage.read_json(f"{folder}/project.json")
    for one, other, field in [
        (cache, trained(seed=1)[1], "projector_digest"),
        (cache, trained({"name": "meteor", "k": 2})[1], "projector_digest"),
        (cache, trained(dtype=torch.bfloat16)[1], "dtype 'float32', not 'bfloat16'"),
        (make_cache("float32"), projector, "codec 'float16', not 'float32'"),
    ]:
        with pytest.raises(SettingsError, match=f"holds images of another projector, cache or type: {field}"):
            project_cache(one, other, folder)
    assert storage.read_json(f"{folder}/project.json") == record
    (tmp_path / "out/notes.txt").write_text("mine")
    (tmp_path / "out/x").mkdir()
    (tmp_path / "out/x/old.safetensors").write_text("of the run before")
    other = trained({"name": "meteor", "k": 2})[1]
    done = project_cache(cache, other, folder, keys=["a" * 64], overwrite=True)
    assert (done.num_before, done.num_written) == (0, 1)
    names = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert names == {"project.json", "notes.txt", f"{'a' * 64}.safetensors"}
    assert len(load_file(f"{folder}/{'a' * 64}.safetensors")["tokens"]) == 2
    assert storage.read_json(f"{folder}/project.json")["projector_digest"] == other.digest


def test_files_that_nobody_vouches_for_are_not_taken_for_results(make_cache, trained, tmp_path):
    cache, (_, projector), folder = make_cache(), trained(), tmp_path / "out"
    folder.mkdir()
    file, stranger = folder / f"{'a' * 64}.safetensors", folder / "model.safetensors"
    file.write_text("features, say")
    stranger.write_text("weights")
    with pytest.raises(SettingsError, match=r"has no project\.json, but has files with names"):
        project_cache(cache, projector, str(folder))
    assert not (folder / "project.json").exists()
    project_cache(cache, projector, str(folder), overwrite=True)
    assert len(load_file(file)["tokens"]) == 3
    assert stranger.read_text() == "weights"


def test_of_two_processes_that_begin_together_the_second_sees_the_firsts_record(
    make_cache, trained, tmp_path, monkeypatch
):
    cache, (_, projector), folder = make_cache(), trained(), str(tmp_path / "out")
    other = trained(seed=1)[1]
    create = storage.create_bytes

    def create_late(uri, data):
        monkeypatch.setattr(project_folder.storage, "create_bytes", create)
        project_cache(cache, other, folder)
        create(uri, data)

    monkeypatch.setattr(project_folder.storage, "create_bytes", create_late)
    with pytest.raises(SettingsError, match="another projector"):
        project_cache(cache, projector, folder)


def test_a_cache_that_the_projector_was_not_trained_on_is_refused_before_anything_is_written(
    make_cache, trained, tmp_path
):
    with pytest.raises(CacheMismatchError, match="select_layer: -1 != -2"):
        project_cache(make_cache(select_layer=-1), trained()[1], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_named_images_are_written_by_their_names(make_cache, trained, tmp_path):
    cache, (_, projector), folder = make_cache(), trained(), tmp_path / "out"
    names = {"b" * 64: "s3://bucket/x/./b.jpg", "a" * 64: "/in/a.jpg"}
    for num_before in (0, 3):
        done = project_cache(cache, projector, str(folder), keys=["d" * 64, "b" * 64, "a" * 64], names=names)
        assert done.num_before == num_before
    files = {str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")}
    assert files == {"s3/bucket/x/b.jpg.safetensors", "in/a.jpg.safetensors", f"{'d' * 64}.safetensors"}


def test_what_cannot_be_written_stops_before_anything_is(make_cache, trained, tmp_path):
    cache, (_, projector), folder = make_cache(), trained(), str(tmp_path / "out")
    with pytest.raises(CacheError, match=f"1 of 2 images are not in version 1.*{'0' * 64}"):
        project_cache(cache, projector, folder, keys=["a" * 64, "0" * 64])
    with pytest.raises(CacheError, match=r"several images would be written to same;"):
        project_cache(
            cache, projector, folder, keys=["a" * 64, "b" * 64], names=dict.fromkeys(["a" * 64, "b" * 64], "same")
        )
    with pytest.raises(CacheError, match="lead out of the folder"):
        project_cache(cache, projector, folder, keys=["a" * 64], names={"a" * 64: "x/../../a"})
    with pytest.raises(SettingsError, match="the batch size is 0"):
        project_cache(cache, projector, folder, batch_size=0)
    assert not (tmp_path / "out").exists()


def test_quarantined_images_that_are_asked_for_are_told_not_lost(make_cache, trained, tmp_path):
    done = project_cache(make_cache(), trained()[1], str(tmp_path / "out"), keys=["a" * 64, "c" * 64])
    assert (done.num_images, done.num_written, done.quarantined) == (2, 1, {"c" * 64: "truncated"})
    assert f"quarantined  1 image, not in the cache: {'c' * 64} (truncated)" in done.to_text()


def test_progress_counts_what_was_to_be_done(make_cache, trained, tmp_path):
    cache, (_, projector) = make_cache(), trained()
    project_cache(cache, projector, str(tmp_path / "out"), keys=["a" * 64, "b" * 64])
    seen = []
    project_cache(cache, projector, str(tmp_path / "out"), on_progress=lambda *counts: seen.append(counts))
    assert seen == [(1, 3), (2, 3), (3, 3)]

"""Names of files in sample ids, and the roots of images inside files."""

import shutil

import pytest
from data_forms import make_scenes, write_form

from meteor.assembly import Inputs
from meteor.assembly.places import short_names
from meteor.config import RunSettings, resolve_paths
from meteor.errors import SettingsError


def test_patterns_keep_the_folders_that_tell_them_apart():
    assert short_names(["/d/a.json", "s3://b/c.jsonl"]) == ["a.json", "c.jsonl"]
    assert short_names(["/d/x/t-*.tar", "/d/y/t-*.tar", "/d/z"]) == ["x/t-*.tar", "y/t-*.tar", "z"]
    assert short_names(["/a/x/t-*.tar", "/b/x/t-*.tar", "/b/y/t-*.tar"]) == ["a/x/t-*.tar", "b/x/t-*.tar", "y/t-*.tar"]
    assert short_names(["/d/x/a.json", "/d/y/a.json"]) == ["a.json", "a.json"]
    assert short_names([]) == []


def make_run(tmp_path, pretrain, finetune):
    data = {"roots": {"": str(tmp_path)}, "pretrain": pretrain, "finetune": finetune}
    return Inputs(RunSettings.model_validate({"name": "a", "output": str(tmp_path / "out"), "data": data}))


def test_images_inside_files_have_a_root_of_their_own(tmp_path):
    shards = write_form("cauldron.parquet", str(tmp_path / "p"), make_scenes(4), num_shards=2)
    plain = write_form("llava.json", str(tmp_path / "j"), make_scenes(4))
    inputs = make_run(tmp_path, shards, plain)
    prefix = f"@{inputs.sample_set('pretrain', shards).digest[:16]}/"
    assert inputs.image_roots() == {"": str(tmp_path), prefix: str(tmp_path / "p")}


def test_copies_of_one_data_set_in_two_places_are_refused(tmp_path):
    first = write_form("shards.tar", str(tmp_path / "a"), make_scenes(4))
    (tmp_path / "b").mkdir()
    second = str(shutil.copy(first, tmp_path / "b/other.tar"))
    assert len(make_run(tmp_path, first, first).image_roots()) == 2
    with pytest.raises(SettingsError, match="are copies of one data set: name one of them everywhere"):
        make_run(tmp_path, first, second).image_roots()


def test_a_link_is_read_by_its_own_name(tmp_path):
    """The hub's cache keeps files as links to others without an ending."""
    (tmp_path / "data").mkdir()
    shutil.move(write_form("cauldron.parquet", str(tmp_path), make_scenes(4)), tmp_path / "0a1b2c")
    link = tmp_path / "data/train.parquet"
    link.symlink_to(tmp_path / "0a1b2c")
    for named in (link, tmp_path / "data"):
        run = resolve_paths(make_run(tmp_path, str(named), None).settings)
        assert len(Inputs(run).sample_set("pretrain", run.data.pretrain)) == 4

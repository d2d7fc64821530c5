"""What a run reads is fixed before it starts: its mixture of files, the index and the cache that it is pinned to."""

import json
import shutil

import pytest

from meteor.assembly import Inputs, make_recipe, training_stage
from meteor.assembly.sample_tables import plan_held_out, plan_samples
from meteor.cache import FeatureCache
from meteor.cache.pins import pins
from meteor.data.order import Part
from meteor.errors import CacheError, SettingsError
from meteor.runs.folder import Summary
from meteor.runs.pins import hold_pin
from meteor.train.plan import StepPlan
from pipelines import cache_features, pretrain
from pipelines.ray_parts import training

pytestmark = [pytest.mark.usefixtures("ray_once"), pytest.mark.filterwarnings("ignore")]


def prepare(settings, stage):
    """A stage as a new command prepares it."""
    return training_stage.prepare(Inputs(settings), stage)


@pytest.fixture
def mixture(make_settings, small, tmp_path):
    """Settings of a stage 1 with these weights of two halves of its samples, in files with these names."""
    records = json.loads((small / "data/pretrain.json").read_text())

    def make(names=("a.json", "b.json"), weights=(1, 0.5), folder="one", **changes):
        (tmp_path / folder).mkdir(exist_ok=True)
        half = len(records) // 2
        sources = {}
        for name, weight, part in zip(names, weights, (records[:half], records[half:]), strict=True):
            (tmp_path / folder / name).write_text(json.dumps(part))
            sources[str(tmp_path / folder / name)] = weight
        return make_settings(data={"pretrain": sources, **changes})

    return make


def global_batches(settings):
    """Sample ids by global batch, as a run of these settings lists them."""
    prepared = prepare(settings, "pretrain")
    plan = plan_samples(Inputs(settings), prepared)
    steps = StepPlan(plan.table, make_recipe(settings.pretrain, None, "packed"), prepared.versions.index_digest)
    return [[plan.table.sample_ids[i] for i in step.positions] for step in steps.steps()]


def test_a_mixture_is_the_same_run_wherever_its_files_are_and_in_any_order(mixture, encode):
    settings = mixture()
    encode(settings)
    first = prepare(settings, "pretrain")
    moved = mixture(folder="other")
    turned = moved.model_copy(
        update={"data": moved.data.model_copy(update={"pretrain": dict(reversed(moved.data.pretrain.items()))})}
    )
    assert prepare(turned, "pretrain").identity == first.identity
    assert global_batches(turned) == global_batches(settings)
    assert prepare(mixture(weights=(1, 0.25)), "pretrain").identity.digest != first.identity.digest


def test_samples_of_a_mixture_are_named_by_their_file_and_come_as_often_as_it_weighs(mixture, encode):
    settings = mixture(weights=(2, 0.5))
    encode(settings)
    plan = plan_samples(Inputs(settings), prepare(settings, "pretrain"))
    assert sorted(plan.table.parts, key=lambda part: part.weight) == [Part(6, 0.5), Part(6, 2.0)]
    ids = [name for batch in global_batches(settings) for name in batch]
    by_file = {file: [name for name in ids if name.startswith(f"{file}/")] for file in ("a.json", "b.json")}
    assert [len(names) for names in by_file.values()] == [12, 3]
    assert len(set(by_file["a.json"])) == 6
    text = pretrain.plan(Inputs(settings))
    assert "each epoch         15: " in text
    assert "2 x a.json" in text
    assert "0.5 x b.json" in text


def test_two_files_that_cannot_be_told_apart_are_refused(mixture, make_settings, small, tmp_path):
    (tmp_path / "x").mkdir()
    for name in ("x/pretrain.json", "copy.json"):
        shutil.copy(small / "data/pretrain.json", tmp_path / name)
    named = str(small / "data/pretrain.json")
    with pytest.raises(SettingsError, match=r"two files with the name 'pretrain\.json'"):
        prepare(make_settings(data={"pretrain": {named: 1, str(tmp_path / "x/pretrain.json"): 1}}), "pretrain")
    with pytest.raises(SettingsError, match="have the same content"):
        prepare(make_settings(data={"pretrain": {named: 1, str(tmp_path / "copy.json"): 1}}), "pretrain")
    with pytest.raises(SettingsError, match=r"data\.pretrain is not set"):
        prepare(make_settings(data={"pretrain": {}}), "pretrain")


def test_held_out_samples_change_no_run_and_are_counted_where_they_are_trained_on(
    make_settings, encode, small, tmp_path, caplog
):
    records = json.loads((small / "data/pretrain.json").read_text())
    (tmp_path / "held_out.json").write_text(json.dumps(records[:3]))
    plain, settings = make_settings(), make_settings(data={"held_out": {"pretrain": str(tmp_path / "held_out.json")}})
    encode(settings)
    prepared = prepare(settings, "pretrain")
    assert prepared.identity == prepare(plain, "pretrain").identity
    assert plan_held_out(Inputs(plain), prepared) is None
    with caplog.at_level("WARNING"):
        assert len(plan_held_out(Inputs(settings), prepared).table) == 3
    assert "3 of 3 held-out samples are training samples too" in caplog.text


def test_held_out_images_that_a_pinned_run_does_not_know_are_refused_with_the_reason(make_settings, encode, small):
    settings = make_settings(data={"finetune": None, "evaluate": {}})
    encode(settings, index=False)
    prepared = prepare(settings, "pretrain")
    late = make_settings(data={"finetune": None, "held_out": {"pretrain": str(small / "data/evaluate.json")}})
    with pytest.raises(CacheError, match="was pinned to at its first start"):
        plan_held_out(Inputs(late), prepared)


def test_an_unfinished_run_keeps_what_it_pinned_and_a_finished_one_follows_changed_images(
    make_settings, encode, small, tmp_path
):
    shutil.copytree(small / "data/images", tmp_path / "images")
    settings = make_settings(data={"roots": {"": str(tmp_path / "images")}})
    encode(settings, index=False)
    first = prepare(settings, "pretrain")
    hold_pin(settings, first.identity, first.cache.uri)
    names = sorted(first.sets[0].image_names)
    shutil.copy(tmp_path / "images" / names[-1], tmp_path / "images" / names[0])
    cache_features.run(Inputs(settings))
    assert prepare(settings, "pretrain").identity == first.identity
    first.folder.finish(Summary("pretrain", {}, 0.0, {}))
    changed = prepare(settings, "pretrain")
    assert changed.identity.digest != first.identity.digest
    assert changed.versions.index_version == first.versions.index_version + 1


def test_more_images_and_newly_quarantined_ones_change_no_batch_of_a_run_that_has_begun(
    make_settings, encode, small, tmp_path
):
    shutil.copytree(small / "data/images", tmp_path / "images")
    roots = {"": str(tmp_path / "images")}
    settings = make_settings(data={"roots": roots, "finetune": None, "evaluate": {}})
    encode(settings, index=False)
    begun = prepare(settings, "pretrain")
    cache = hold_pin(settings, begun.identity, begun.cache.uri)
    expected = global_batches(settings)
    # The cache is extended by another stage's images, and one image has been damaged in the meantime.
    bad = sorted(begun.sets[0].image_names)[0]
    (tmp_path / "images" / bad).write_bytes(b"no image")
    cache_features.run(Inputs(make_settings(data={"roots": roots})))
    assert FeatureCache.open(cache.uri).version > cache.version
    assert global_batches(settings) == expected

    # Another run begins now: it leaves the sample out, and says so.
    other = make_settings(data={"roots": roots, "finetune": None, "evaluate": {}}, pretrain={"seed": 1})
    plan = plan_samples(Inputs(other), prepare(other, "pretrain"))
    assert len(plan.excluded) == 1
    assert {*plan.table.sample_ids, plan.excluded[0].sample_id} == set().union(*expected)


def test_a_start_that_is_refused_binds_no_later_start(make_settings, encode, tmp_path, monkeypatch):
    settings = make_settings(data={"finetune": None, "evaluate": {}})
    encode(settings)
    monkeypatch.setattr(training, "_run_workers", lambda *arguments: pytest.fail("workers were started"))
    late = make_settings(
        data={"finetune": None, "evaluate": {}, "held_out": {"pretrain": str(tmp_path / "held_out.json")}}
    )
    before = pins(Inputs(settings).cache_uri())
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]
    (tmp_path / "held_out.json").write_text(json.dumps([{"id": "a", "image": "late.png", "conversations": turns}]))
    # The error says to run cache_features, which helps only a start that may read the new index.
    with pytest.raises(CacheError, match="run cache_features"):
        pretrain.run(Inputs(late))
    assert not (tmp_path / "out/pins").exists()
    assert pins(Inputs(settings).cache_uri()) == before

"""A small study on Ray: encoded once, shared once, pinned, resumed, failed in part, reported from MLflow."""

import json
import logging
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from meteor.assembly import Inputs
from meteor.assembly.study import StudyPins, hold_pins
from meteor.config import expand_study, load_run
from meteor.errors import SettingsError, TrainingError
from meteor.planning.study import plan_study
from meteor.projector import build_projector
from meteor.runs.folder import Summary
from meteor.runs.mlflow_log import study_run, tracking_uri
from meteor.runs.tasks import make_tasks
from meteor.tracking import Tracker
from pipelines import ablate, cache_features, evaluate, finetune, report
from pipelines.studies import caches
from pipelines.studies.results import choose_variants, find_records, study_tables

pytestmark = [pytest.mark.usefixtures("ray_once"), pytest.mark.filterwarnings("ignore")]

STAGE = {"global_batch_size": 8, "micro_batch_size": 4, "max_length": 512, "zero_stage": 0}
# `plain` and `quick` differ in stage 2 alone, `pooled` in both.
VARIANTS = {
    "plain": {},
    "quick": {"finetune.lr": 1e-3},
    "pooled": {"projector.name": "avg_pool", "projector.settings.grid": 2},
}


@pytest.fixture
def make_study(make_settings):
    def make(**study):
        settings = make_settings(name="study", study={"measure_questions": 2, "parallel": 2, **study})
        return settings, expand_study(settings)

    return make


def plan_tasks(variants):
    return make_tasks([Inputs(variant.settings) for variant in variants])


def plan_text(settings, variants):
    return plan_study(Inputs(settings), [variant.settings for variant in variants]).to_text()


def used_by(tasks):
    return {(task.stage, task.used_by) for task in tasks.values()}


def test_variants_share_what_they_agree_on(make_study):
    _, variants = make_study(variants=VARIANTS)
    tasks = plan_tasks(variants)
    assert used_by(tasks) == {
        ("cache_features", ("plain", "quick", "pooled")),
        ("pretrain", ("plain", "quick")),
        ("pretrain", ("pooled",)),
        *((stage, (name,)) for stage in ("finetune", "evaluate") for name in VARIANTS),
    }
    shared = next(task for task in tasks.values() if len(task.used_by) == 2)
    assert shared.settings.tracking.used_by == ("plain", "quick")
    assert shared.settings.name.startswith("shared-")
    chain = [task for task in tasks.values() if "quick" in task.used_by]
    assert [task.stage for task in chain] == ["cache_features", "pretrain", "finetune", "evaluate"]
    assert [task.needs for task in chain] == [(), *((task.key,) for task in chain[:-1])]


def test_answers_alone_may_differ_and_seeds_share_nothing(make_study):
    _, variants = make_study(variants={"a": {}, "b": {"evaluate.max_new_tokens": 3}}, seeds=[0, 1])
    counts = {
        stage: sum(task.stage == stage for task in plan_tasks(variants).values()) for stage in ("finetune", "evaluate")
    }
    assert counts == {"finetune": 2, "evaluate": 4}


def test_answering_an_elastic_model_with_several_k_trains_once(make_study):
    elastic = {"projector.name": "visual_topk", "projector.settings": {"k": [2, 4]}}
    _, variants = make_study(variants={"at_4": elastic, "at_2": {**elastic, "evaluate.k": 2}})
    tasks = plan_tasks(variants)
    assert used_by(tasks) == {
        *((stage, ("at_4", "at_2")) for stage in ("cache_features", "pretrain", "finetune")),
        ("evaluate", ("at_4",)),
        ("evaluate", ("at_2",)),
    }


def test_a_number_of_tokens_that_no_variant_can_make_is_refused_by_the_plan(make_study):
    wrong = {
        "evaluate.k: k=3: projector 'mlp' has no k": {"projector": {"name": "mlp"}, "evaluate.k": 3},
        "'c_abstractor' is trained with a single number": {
            "projector": {"name": "c_abstractor", "settings": {"grid": [1, 2]}}
        },
    }
    for message, changes in wrong.items():
        settings, variants = make_study(variants={"wrong": changes})
        with pytest.raises(SettingsError, match=message):
            plan_text(settings, variants)


def test_every_cache_is_named_once_and_the_codec_that_others_are_made_from_comes_first(make_study, monkeypatch):
    _, variants = make_study(variants={"a": {"cache.codec": "int8"}, "b": {}, "c": {"finetune.lr": 1e-3}})
    filled = []
    done = Summary("cache_features", {"images_encoded": 0, "distinct_images": 0}, 0.0, {"cache": ""})
    monkeypatch.setattr(caches.cache_features, "run", lambda inputs: filled.append(inputs.settings) or done)
    caches.fill_caches(Inputs(variants[0].settings), plan_tasks(variants).values())
    assert [(run.cache.codec, run.tracking.used_by) for run in filled] == [("float16", ("b", "c")), ("int8", ())]


def test_the_plan_tells_what_is_shared_and_what_is_done(make_study, encode):
    settings, variants = make_study(variants=VARIANTS)
    text = plan_text(settings, variants)
    assert "20 images, 20 to encode; read by 3 runs" in text
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert rows["pretrain"][1:4] == ["2", "1", "0"]
    encode(variants[0].settings)
    text = plan_text(settings, variants)
    assert "nothing to encode" in text
    assert "not known before a stage has finished" in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines()[-3:]}
    assert rows["quick"] == ["finished", "with", "plain", "to", "do", "to", "do"]
    assert rows["pooled"] == ["finished", *["to", "do"] * 3]


def test_names_of_tables_and_variants_choose(make_study):
    settings, _ = make_study(variants=VARIANTS, tables={"Speed": {"variants": ["quick", "p*"], "control": "plain"}})
    assert choose_variants(settings, []) == list(VARIANTS)
    assert choose_variants(settings, ["pool*"]) == ["pooled"]
    assert choose_variants(settings, ["Speed"]) == ["plain", "quick", "pooled"]
    [table] = study_tables(settings)
    assert (table.variants, table.control) == (("quick", "plain", "pooled"), "plain")
    with pytest.raises(
        SettingsError, match="--only names 'fast', which fits none of the variants: plain, quick, pooled"
    ):
        choose_variants(settings, ["fast"])
    with pytest.raises(SettingsError, match="nobody"):
        study_tables(make_study(variants=VARIANTS, tables={"t": {"control": "nobody"}})[0])


@pytest.mark.parametrize(
    ("runtime", "expected"),
    [
        ({"gpus_per_worker": 1}, 2),
        ({"gpus_per_worker": 0.5}, 4),
        ({"gpus_per_worker": 0.1, "cpus_per_worker": 3}, 5),
        ({"num_workers": 2, "gpus_per_worker": 1}, 1),
        ({"num_workers": 64, "cpus_per_worker": 1}, 1),
    ],
)
def test_as_many_variants_run_as_there_are_cpus_and_gpus_for(make_settings, monkeypatch, runtime, expected):
    monkeypatch.setattr(ablate.ray, "cluster_resources", lambda: {"CPU": 16.0, "GPU": 2.0})
    settings = make_settings(runtime=runtime, study={"variants": {"a": {}, "b": {}}})
    assert ablate.num_fitting_runs([variant.settings for variant in expand_study(settings)]) == expected


def test_a_study_keeps_its_versions_while_index_and_cache_grow(make_study, encode, small):
    settings, variants = make_study(variants={"a": {}})
    run = variants[0].settings
    some = json.loads((small / "data/finetune.json").read_text())
    only = Path(run.output) / "some.json"
    only.parent.mkdir(parents=True, exist_ok=True)
    only.write_text(json.dumps([one for one in some if "image" in one][:6]))
    few = run.model_copy(
        update={"data": run.data.model_copy(update={"pretrain": None, "finetune": str(only), "evaluate": {}})}
    )
    encode(few, index=False)
    first = hold_pins(Inputs(settings), [type(variants[0])("a", None, {}, few)])
    cache_features.run(Inputs(run))  # other images come
    assert hold_pins(Inputs(settings), [type(variants[0])("a", None, {}, few)]) == first
    assert first.apply(variants[0], Inputs(settings)).settings.cache.index_version == first.index_version
    newer = hold_pins(Inputs(settings), variants)  # a variant that needs them
    assert newer.index_version > first.index_version
    assert isinstance(newer, StudyPins)


def test_every_variant_of_the_ready_made_studies_can_be_built():
    for name in ("ablations", "demo_ablations"):
        run = load_run(name)
        study_tables(run)
        for variant in expand_study(run):
            projector = variant.settings.projector
            build_projector(projector.name, vision_width=16, llm_width=16, **projector.settings)


@pytest.mark.slow
@pytest.mark.timeout(900)  # eleven stages, each with processes to start
def test_a_study_runs_once_is_reported_and_found_again(make_study, caplog, capsys):
    settings, variants = make_study(
        variants={
            **VARIANTS,
            "sampled": {"finetune.text_sampler": {"layer": 0, "keep": 0.5}},
            "int8": {"cache.codec": "int8"},
        },
        tables={"All": {"control": "plain", "paper": 4}},
    )
    caplog.set_level(logging.INFO)
    first = ablate.run(Inputs(settings), variants)
    assert first.counts["stages failed"] == 0
    # Stage 1: plain with quick and sampled, pooled, int8. Stages 2 and 3: each its own.
    assert first.counts["stages"] == 3 + 5 + 5
    encoded = [record.getMessage() for record in caplog.records if "images encoded now" in record.getMessage()]
    assert ["20 of 20" in line for line in encoded] == [True, False]
    assert "without the encoder" in caplog.text

    # The same samples, in the same batches.
    tables = [pq.read_table(f"{finetune.run(Inputs(one.settings)).results['run']}/samples.parquet") for one in variants]
    assert all(table["sample_id"].equals(tables[0]["sample_id"]) for table in tables)

    page = Path(first.results["html"]).read_text()
    for expected in ("sampled", "137.84 M", "differences.csv", "Answering was measured one question at a time"):
        assert expected in page
    assert (Path(first.results["html"]).parent / "runs.csv").read_text().count("\n") == 6

    tracker = Tracker(tracking_uri(settings), settings.tracking.experiment)
    children = tracker.children(study_run(tracker, settings))
    kinds = {child.name: child.tags["meteor.kind"] for child in children}
    assert {name for name, kind in kinds.items() if kind == "variant"} == {one.name for one in variants}
    shared = next(child for child in children if child.tags.get("meteor.stage") == "pretrain")
    assert shared.tags["used_by"] == "plain, quick, sampled"
    records = find_records(settings)
    assert [record.name for record in records] == [one.name for one in variants]
    assert records[0].folders["pretrain"] == records[1].folders["pretrain"]
    assert records[0].numbers["answers/tokens_per_s"] > 0

    caplog.clear()
    again = ablate.run(Inputs(settings), variants)
    assert again.counts["stages finished before"] == again.counts["stages"]
    # Where MLflow knows nothing the study's own folder tells the same.
    away = settings.model_copy(update={"tracking": settings.tracking.model_copy(update={"experiment": "another"})})
    assert [record.folders for record in find_records(away)] == [record.folders for record in records]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_variant_that_fails_stops_no_other_and_alone_is_tried_again(make_study, capsys):
    broken = {"pretrain.lr": 1e30, "pretrain.warmup_ratio": 0.0}
    settings, variants = make_study(variants={"broken": broken, "plain": {}}, measure_questions=0)
    once = [
        type(one)(
            one.name,
            one.seed,
            one.changes,
            one.settings.model_copy(update={"runtime": one.settings.runtime.model_copy(update={"max_failures": 0})}),
        )
        for one in variants
    ]
    with pytest.raises(TrainingError, match=r"broken, pretrain: TrainingError(.|\n)*not tried.*broken, finetune"):
        ablate.run(Inputs(settings), once)
    assert evaluate.run(Inputs(once[1].settings)).reused
    page = Path(report.run(Inputs(settings)).results["html"]).read_text()
    assert "broken: stage pretrain has not finished" in page
    tracker = Tracker(tracking_uri(settings), settings.tracking.experiment)
    [run] = tracker._client.search_runs([tracker.experiment_id], filter_string="tags.`meteor.kind` = 'study'")
    assert run.info.status == "FAILED"

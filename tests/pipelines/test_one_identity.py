"""All who ask what a stage is get one answer: the stage itself, plan, study, jobs, report and MLflow. Files are read once."""

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import meteor.assembly.inputs as inputs_module
from jobs.spec import Job, Resources
from meteor.assembly import Inputs, cache_identity, index_uri, load_encoder, pixel_settings
from meteor.assembly.training_stage import find_model, prepare
from meteor.cache import DatasetIndex, IndexRow, commit, create_cache, encode_row, get_codec, write_feature_file
from meteor.config import RunSettings, expand_study, resolve_paths
from meteor.planning.study import plan_study
from meteor.projector.file import write_projector_file
from meteor.runs.folder import StageFolder, Summary
from meteor.runs.identity import NamesAlone, identify, identify_all, left_out_stages, stages_of
from meteor.runs.mlflow_log import StageLog
from meteor.runs.tasks import make_tasks
from meteor.vision.live import LiveFeatures
from pipelines.studies.results import find_folders

TURNS = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "that"}]
# Changes of a variant, by dotted name. The first of each list is the run's own value.
CHANGES = {
    "data.evaluate": [
        {"a": "{0}/samples.json"},
        {"a": "{0}/copy.json"},
        {"a": "{0}/samples.json", "b": "{0}/copy.json"},
        {},
    ],
    "projector.settings.k": [4, 2],
    "pretrain.lr": [1e-3, 2e-3],
    "finetune.lr": [2e-5, 1e-5],
    "finetune.micro_batch_size": [4, 1],
    "evaluate.max_new_tokens": [2, 3],
    "evaluate.batch_size": [16, 2],
    "data.max_pixels": [178_956_970, 1_000_000],
    "cache.codec": ["float16", "float32"],
    "runtime.num_workers": [1, 2],
    "finetune.pretrained": [None, "{0}/projector.safetensors"],
}


@pytest.fixture(scope="module")
def folder(make_image, png, make_model, clip_folder, llm_folder, tokenizer_folder, tmp_path_factory):
    """Samples, images and models of a run, with its index and its caches."""
    folder = tmp_path_factory.mktemp("identity")
    (folder / "images").mkdir()
    for name, size in [("0.png", (60, 60)), ("1.png", (200, 90))]:
        (folder / "images" / name).write_bytes(png(make_image(*size)))
    shutil.copytree(llm_folder, folder / "llm")
    for file in Path(tokenizer_folder).iterdir():
        shutil.copy(file, folder / "llm")
    for name, number in [("samples", 4), ("copy", 3)]:
        samples = [{"id": str(i), "image": f"{i % 2}.png", "conversations": TURNS} for i in range(number)]
        (folder / f"{name}.json").write_text(json.dumps(samples))
    write_projector_file(str(folder / "projector.safetensors"), make_model().projector.state_dict(), {})
    for codec in CHANGES["cache.codec"]:
        fill(make_run(folder, clip_folder, cache={"codec": codec}))
    return folder


def make_run(folder, clip, **changes):
    content = {
        "name": "r",
        "output": str(folder / "out"),
        "data": {
            "roots": {"": str(folder / "images")},
            "pretrain": str(folder / "samples.json"),
            "finetune": str(folder / "samples.json"),
            "evaluate": {"a": str(folder / "samples.json")},
        },
        "slicing": {"resolution": 56, "max_slices": 2},
        "vision": {"path": clip, "dtype": "float32"},
        "llm": {"path": str(folder / "llm"), "dtype": "float32"},
        "projector": {"name": "meteor", "settings": {"k": 4, "state_size": 2}},
        "evaluate": {"max_new_tokens": 2},
    }
    return resolve_paths(RunSettings.model_validate({**content, **changes}))


def fill(run):
    """What cache_features leaves, without Ray."""
    encoder = load_encoder(run)
    files = sorted(Path(run.data.roots[""]).glob("*.png"))
    keys = {hashlib.sha256(file.read_bytes()).hexdigest(): str(file) for file in files}
    live = LiveFeatures(encoder, keys, pixel_settings(run))
    images = [live.get(key) for key in keys]
    uri = create_cache(run.cache_root, cache_identity(run, encoder), run.cache.codec)
    write_feature_file(uri, [encode_row(image, get_codec(run.cache.codec)) for image in images])
    commit(uri)
    rows = [
        IndexRow(
            Path(keys[one.image_key]).name, keys[one.image_key], 1, "e", one.image_key, one.width, one.height, "ok"
        )
        for one in images
    ]
    DatasetIndex.publish(index_uri(run), rows)


def blocks(answers: dict[str, object]) -> set[frozenset[str]]:
    """Which runs give the same answer."""
    return {frozenset(name for name, other in answers.items() if other == answer) for answer in answers.values()}


def values(name: str, folder: Path) -> st.SearchStrategy:
    return st.sampled_from([json.loads(json.dumps(value).replace("{0}", str(folder))) for value in CHANGES[name]])


@hypothesis_settings(
    max_examples=15,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_stage_plan_study_jobs_report_and_mlflow_agree_on_what_is_the_same(data, folder, clip_folder, tmp_path_factory):
    drawn = data.draw(
        st.lists(st.dictionaries(st.sampled_from(sorted(CHANGES)), st.none(), max_size=3), min_size=2, max_size=4)
    )
    variants = {f"v{i}": {name: data.draw(values(name, folder)) for name in changes} for i, changes in enumerate(drawn)}
    output = str(tmp_path_factory.mktemp("out"))
    study = make_run(
        folder, clip_folder, output=output, cache={"uri": str(folder / "out/cache")}, study={"variants": variants}
    )
    runs = {variant.name: variant.settings for variant in expand_study(study)}
    inputs = Inputs(study)
    tasks = make_tasks([inputs.of(run) for run in runs.values()])
    plan = plan_study(inputs, list(runs.values()))
    for stage in ("cache_features", "pretrain", "finetune", "evaluate"):
        asking = {name: run for name, run in runs.items() if stage in stages_of(run)}
        folders = {name: identify(inputs.of(run), stage).name for name, run in asking.items()}
        same = blocks(folders)
        # The study's tasks, and the plan's count.
        assert {frozenset(task.used_by) for task in tasks.values() if task.stage == stage} == same
        assert sum(work.num_stages for work in plan.work if work.stage == stage) == len(same)
        assert {name for name, states in plan.states.items() if stage in states} == asking.keys()
        # Jobs, by names alone: the files do not change here, and no two are equal.
        job_digests = {name: Job(stage, name, (), run, Resources()).digest for name, run in asking.items()}
        assert blocks(job_digests) == same
        # The stage itself, which finds the stages before it finished; the report; MLflow's tag.
        again = Inputs(study)
        for name, run in asking.items():
            if stage in ("pretrain", "finetune"):
                found = prepare(again.of(run), stage).folder
            else:
                found = StageFolder(run.output, identify(again.of(run), stage))
            assert found.uri.rpartition("/")[2] == folders[name]
            found.start(run)
            extra = {"totals": {"visual_tokens": 1, "text_tokens": 1}, "training_seconds": 1.0}
            found.finish(Summary(stage, {}, 0.0, {"projector": "p", "model": "m"}, extra=extra))
            StageLog.new(run, found, params={}, tags={})
            if stage != "cache_features":
                assert find_folders(again.of(run))[stage] == found.uri
            if stage == "finetune":
                assert find_model(again.of(run)) == ("m", found.digest)
    assert {work.num_finished - work.num_stages for work in plan_study(inputs, list(runs.values())).work} == {0}


def test_variants_that_differ_in_what_is_asked_alone_train_once(folder, clip_folder):
    asked = {
        "one": {"data.evaluate": {"a": str(folder / "samples.json")}},
        "two": {"data.evaluate": {"a": str(folder / "copy.json")}},
    }
    study = make_run(folder, clip_folder, study={"variants": asked})
    plan = plan_study(Inputs(study), [variant.settings for variant in expand_study(study)])
    assert {work.stage: work.num_stages for work in plan.work} == {
        "cache_features": 2,  # of different samples, though one fills the cache for both
        "pretrain": 1,
        "finetune": 1,
        "evaluate": 2,
    }


def test_a_study_reads_every_index_and_hashes_every_model_once(folder, clip_folder, monkeypatch):
    calls: Counter[str] = Counter()

    def count(target, name):
        real = getattr(target, name)

        def counted(*arguments, **options):
            calls[name] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(target, name, counted)

    for name in ("llm_fingerprint", "load_encoder", "load_set", "load_question_set"):
        count(inputs_module, name)
    count(DatasetIndex, "open")
    count(DatasetIndex, "digest")
    variants = {f"k{k}_{lr}": {"projector.settings.k": k, "finetune.lr": lr} for k in (1, 2, 3) for lr in (1e-5, 2e-5)}
    study = make_run(folder, clip_folder, study={"variants": variants})
    plan_study(Inputs(study), [variant.settings for variant in expand_study(study)])
    # One digest of the index for the samples of both stages, and one for the questions.
    assert calls == {
        "llm_fingerprint": 1,
        "load_encoder": 1,
        "load_set": 1,
        "load_question_set": 1,
        "open": 1,
        "digest": 2,
    }


def test_names_alone_need_no_file():
    run = make_run(Path("/nowhere"), "s3://bucket/clip")
    identities = identify_all(NamesAlone(run))
    assert list(identities) == ["cache_features", "pretrain", "finetune", "evaluate"]
    assert all(isinstance(identity.digest, str) for identity in identities.values())


def test_a_projector_or_model_that_is_named_replaces_the_stages_before_it():
    assert stages_of(make_run(Path("/x"), "c", finetune={"pretrained": "/x/p"})) == (
        "cache_features",
        "finetune",
        "evaluate",
    )
    assert stages_of(make_run(Path("/x"), "c", evaluate={"model": "/x/m"})) == ("cache_features", "evaluate")
    bare = make_run(Path("/x"), "c", data={})
    assert stages_of(bare) == ("cache_features",)
    assert left_out_stages(bare)["pretrain"] == "data.pretrain names no samples"

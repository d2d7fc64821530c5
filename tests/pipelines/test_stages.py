"""All stages after the cache, on Ray, with models of random weights: that they fit, find finished work, resume, and refuse."""

import json
import shutil
import socket
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from meteor.assembly import Inputs
from meteor.assembly.sample_tables import plan_samples
from meteor.assembly.training_stage import prepare
from meteor.checkpoint.folder import complete_checkpoints
from meteor.checkpoint.format import Checkpoint
from meteor.errors import CacheError, CheckpointError, QuarantineLimitError, SettingsError, TrainingError
from meteor.evaluation.answer import Answerer
from meteor.report.tables import NOT_RECORDED, cache_table
from meteor.runs.mlflow_log import tracking_uri
from meteor.runs.reading import read_stage
from meteor.text.tokenizer import load_tokenizer
from meteor.tracking import Tracker
from meteor.train.build import read_llm_config
from pipelines import all as all_stages
from pipelines import cache_features, evaluate, finetune, pretrain, report
from pipelines.ray_parts import training

pytestmark = [pytest.mark.usefixtures("ray_once"), pytest.mark.filterwarnings("ignore")]


def test_all_stages_run_once_and_then_find_their_work(chain):
    settings = chain.settings
    first = [chain.encoded, chain.pretrained, chain.finetuned, chain.evaluated]
    assert not any(summary.reused for summary in first)
    _, stage_1, stage_2, answers = first
    assert stage_1.counts["steps"] == 2
    rows = read_stage(stage_2.results["run"]).metrics
    assert [row["step"] for row in rows] == list(range(1, stage_2.counts["steps"] + 1))
    assert all(row["loss"] > 0 for row in rows)

    model = Answerer(stage_2.results["model"], device="cpu", dtype=torch.float32).model
    last = Checkpoint(complete_checkpoints(f"{stage_2.results['run']}/checkpoints")[-1])
    for name, parameter in model.named_parameters():
        if not name.startswith("vision_tower."):
            trained = last.read("weights", name)
            # The finished model has more rows in its embedding, for <image>.
            assert torch.equal(parameter[: len(trained)], trained), name
            assert parameter.shape == trained.shape or name.endswith(("embed_tokens.weight", "lm_head.weight"))

    table = pq.read_table(answers.results["predictions"]).to_pylist()
    assert len(table) == 8
    scores = json.loads(Path(answers.results["run"], "scores.json").read_text())
    assert scores["scenes"]["score"] == sum(row["score"] for row in table) / 8

    written = report.run(Inputs(settings))
    page = Path(written.results["html"]).read_text()
    assert "data:image/png;base64" in page
    # Stages leave every number that the tables ask for but one: only a study measures how fast answers come.
    assert page.count(NOT_RECORDED) == 1
    facts = dict(cache_table(report.cache_facts(Inputs(settings))).rows)
    assert (facts["distinct images"], facts["codec"]) == (str(first[0].counts["distinct_images"]), "float16")

    tracker = Tracker(tracking_uri(settings), settings.tracking.experiment)
    runs = tracker._client.search_runs([tracker.experiment_id])
    stages = {run.data.tags["meteor.stage"]: run for run in runs if run.data.tags["meteor.kind"] == "stage"}
    assert set(stages) == {"cache_features", "pretrain", "finetune", "evaluate"}
    parents = {run.data.tags["mlflow.parentRunId"] for run in stages.values()}
    assert parents == {run.info.run_id for run in runs if run.data.tags["meteor.kind"] == "pipeline"}
    history = tracker._client.get_metric_history(stages["finetune"].info.run_id, "loss")
    assert [metric.step for metric in history] == [row["step"] for row in rows]

    assert all(stage.run(Inputs(settings)).reused for stage in (cache_features, pretrain, finetune, evaluate))


def test_a_run_without_question_sets_says_so_first_and_is_reported(chain, capsys):
    data = chain.settings.data.model_copy(update={"evaluate": {}})
    inputs = Inputs(chain.settings.model_copy(update={"data": data}))
    assert "evaluate does not run: data.evaluate names no question set" in all_stages.plan(inputs)
    summary = all_stages.run(inputs)
    first, *_ = capsys.readouterr().out.splitlines()
    assert first == f"[{chain.settings.name}] evaluate does not run: data.evaluate names no question set"
    assert "No variant was evaluated" in Path(summary.results["html"]).read_text()


@pytest.mark.slow
def test_live_features_train_like_cached_ones(make_settings):
    cached = make_settings(cache={"codec": "float32"})
    cache_features.run(Inputs(cached))
    live = make_settings(cache={"codec": "float32"}, pretrain={"features": "live"})
    first, second = pretrain.run(Inputs(cached)), pretrain.run(Inputs(live))
    assert first.results["run"] != second.results["run"]
    assert second.counts["loss_last"] == pytest.approx(first.counts["loss_last"], rel=1e-4)


@pytest.mark.slow
def test_the_number_of_workers_changes_neither_run_nor_loss(make_settings, encode, tmp_path):
    one = make_settings()
    encode(one)
    first = pretrain.run(Inputs(one))
    two = make_settings(
        output=str(tmp_path / "second"),
        cache={"uri": str(tmp_path / "out/cache")},
        runtime={"num_workers": 2, "cpus_per_worker": 0.5},
    )
    second = pretrain.run(Inputs(two))
    assert Path(second.results["run"]).name == Path(first.results["run"]).name
    assert second.counts["loss_last"] == pytest.approx(first.counts["loss_last"], rel=1e-4)


@pytest.mark.slow
def test_a_stage_of_adapters_leaves_a_whole_model_and_the_adapters_by_themselves(make_settings, encode):
    settings = make_settings(
        finetune={
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "max_length": 512,
            "zero_stage": 2,
            "fraction": 0.5,
            "lora": {"rank": 2, "alpha": 4, "dropout": 0.1},
        }
    )
    encode(settings)
    pretrain.run(Inputs(settings))
    summary = finetune.run(Inputs(settings))
    model = Answerer(summary.results["model"], device="cpu", dtype=torch.float32).model
    weights = load_file(Path(summary.results["model"], "adapter", "adapter_model.safetensors"))
    name = "model.layers.0.mlp.up_proj"
    a, b = (weights[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
    base = AutoModelForCausalLM.from_pretrained(settings.llm.path)
    expected = base.get_parameter(f"{name}.weight") + 2 * b @ a
    torch.testing.assert_close(model.language_model.get_parameter(f"{name}.weight"), expected)
    assert b.abs().max() > 0
    assert evaluate.run(Inputs(settings)).counts


@pytest.mark.slow
def test_the_checkpoint_of_the_lowest_held_out_loss_is_kept_and_named(make_settings, encode, small):
    file = small / "data/evaluate.json"
    stage = {"epochs": 6, "checkpoint_every_steps": 2, "keep_checkpoints": 1}
    settings = make_settings(data={"held_out": {"pretrain": str(file)}}, pretrain={**stage, "zero_stage": 0})
    encode(settings)
    assert "held out           37, 1 excluded" in pretrain.plan(Inputs(settings))
    summary = pretrain.run(Inputs(settings))
    losses = {
        row["step"]: row["held_out_loss"]
        for row in read_stage(summary.results["run"]).metrics
        if "held_out_loss" in row
    }
    assert sorted(losses) == [2, 4, 6, 8, 10, 12]
    best = min(losses, key=losses.get)
    assert summary.counts["best_checkpoint_step"] == best
    assert summary.counts["best_held_out_loss"] == losses[best]
    kept = complete_checkpoints(f"{summary.results['run']}/checkpoints")
    assert [int(uri[-8:]) for uri in kept] == sorted({best, 12})


@pytest.mark.slow
def test_training_without_a_tracking_server_finishes_and_is_logged_when_it_is_started_again(
    make_settings, encode, tracking_database, monkeypatch
):
    settings = make_settings()
    encode(settings)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        away = {**settings.tracking.model_dump(), "uri": f"http://127.0.0.1:{probe.getsockname()[1]}"}
    first = pretrain.run(Inputs(make_settings(tracking=away)))
    assert not first.reused
    assert pretrain.run(Inputs(settings)).reused
    tracker = Tracker(tracking_database, settings.tracking.experiment)
    runs = tracker._client.search_runs([tracker.experiment_id], filter_string="tags.`meteor.stage` = 'pretrain'")
    assert [run.info.status for run in runs] == ["FINISHED"]
    rows = read_stage(first.results["run"]).metrics
    for name in ("loss", "memory_gb", "loader_wait_share"):
        history = tracker._client.get_metric_history(runs[0].info.run_id, name)
        assert [(one.step, one.value) for one in history] == [(row["step"], row[name]) for row in rows]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_stage_and_its_samples_are_written_out(make_settings, encode):
    settings = make_settings(pretrain={"lr": 1e30, "warmup_ratio": 0.0}, runtime={"max_failures": 0})
    encode(settings)
    with pytest.raises(TrainingError, match=r"failures/step_\d+\.json"):
        pretrain.run(Inputs(settings))
    run = prepare(Inputs(settings), "pretrain").folder
    (file,) = Path(run.uri, "failures").iterdir()
    failure = json.loads(file.read_text())
    table = pq.read_table(f"{run.uri}/samples.parquet").to_pylist()
    # The first update ruined the weights; the epoch's second and last step has what is left of 12 samples.
    assert (failure["step"], len(failure["samples"])) == (2, 4)
    assert all(table[one["row"]]["sample_id"] == one["id"] for one in failure["samples"])
    assert file.name == "step_00000002.json"


def test_stages_say_what_must_run_before_them(make_settings, encode):
    settings = make_settings()
    with pytest.raises(CacheError, match="run cache_features"):
        pretrain.run(Inputs(settings))
    encode(settings)
    with pytest.raises(SettingsError, match="run pretrain"):
        finetune.run(Inputs(settings))
    with pytest.raises(SettingsError, match="run pretrain"):
        evaluate.run(Inputs(settings))


def test_a_stage_1_checkpoint_of_another_projector_is_refused_before_workers_start(
    make_settings, chain, encode, monkeypatch
):
    other = make_settings(
        projector={"settings": {"k": 6, "state_size": 2}},
        finetune={"pretrained": chain.pretrained.results["projector"]},
    )
    encode(other)
    monkeypatch.setattr(training, "_run_workers", lambda *arguments: pytest.fail("workers were started"))
    with pytest.raises(CheckpointError, match="does not fit this run: projector"):
        finetune.run(Inputs(other))


def test_samples_of_text_alone_need_no_feature(make_settings, tmp_path, monkeypatch):
    turns = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]
    (tmp_path / "text.json").write_text(json.dumps([{"id": str(i), "conversations": turns} for i in range(4)]))
    data = {"pretrain": None, "finetune": str(tmp_path / "text.json"), "evaluate": {}}
    # Another encoder's cache, which is empty.
    settings = make_settings(data=data, slicing={"max_slices": 1}, finetune={"pretrained": "named", "fraction": 1.0})
    summary = cache_features.run(Inputs(settings))
    assert (summary.counts["distinct_images"], summary.counts["images_cached"]) == (0, 0)
    assert cache_features.run(Inputs(settings)).reused
    monkeypatch.setattr(Inputs, "projector", lambda inputs: "a projector")
    prepared = prepare(Inputs(settings), "finetune")
    assert len(plan_samples(Inputs(settings), prepared).table) == 4
    (tmp_path / "text.json").write_text(json.dumps([{"id": str(i), "conversatons": turns} for i in range(12)]))
    assert cache_features.run(Inputs(settings)).counts["images"] == 0
    with pytest.raises(QuarantineLimitError, match="12 of 12 samples"):
        plan_samples(Inputs(settings), prepare(Inputs(settings), "finetune"))


def test_a_token_without_a_row_in_the_embedding_is_refused_before_workers_start(make_settings, encode, monkeypatch):
    settings = make_settings()
    encode(settings)
    monkeypatch.setattr(training, "_run_workers", lambda *arguments: pytest.fail("workers were started"))
    tokenizer = load_tokenizer(settings.llm.path)
    num_rows = read_llm_config(settings.llm.path).vocab_size
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id >= num_rows
    monkeypatch.setattr(Inputs, "tokenizer", lambda inputs: tokenizer)
    for start in (pretrain.plan, pretrain.run):
        with pytest.raises(SettingsError, match=rf"'\[PAD\]' for padding has the id \d+, .* has {num_rows} rows"):
            start(Inputs(settings))


def test_a_dry_run_keeps_records_and_tokens_of_the_samples_and_changes_nothing_else(
    make_settings, encode, digest_of, tmp_path
):
    settings = make_settings()
    encode(settings)
    shutil.rmtree(tmp_path / "out/cache/index/samples")
    before = digest_of(tmp_path / "out")
    assert "2 of 8 samples" in pretrain.plan(Inputs(settings))
    cache_features.plan(Inputs(settings))
    after = digest_of(tmp_path / "out")
    kept = {name for name in after if name.startswith("cache/index/samples/")}
    assert any(name.endswith(".arrow") for name in kept)
    assert {name: digest for name, digest in after.items() if name not in kept} == before

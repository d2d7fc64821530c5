"""Evaluation on Ray: every benchmark's format by one command, answers that are kept, images that cannot be used."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoConfig, CLIPVisionConfig

from meteor.assembly import Inputs, load_encoder, pixel_settings
from meteor.errors import DataError, QuarantineLimitError, TooLongError
from meteor.evaluation.benchmarks import BENCHMARKS
from meteor.evaluation.questions import ask
from meteor.model import MeteorConfig, MeteorForConditionalGeneration, MeteorImageProcessor, MeteorProcessor
from meteor.projector.answering import AnswerSelection
from meteor.runs.mlflow_log import tracking_uri
from meteor.synthetic.benchmarks import write_benchmarks
from meteor.text.tokenizer import load_tokenizer
from meteor.tracking import Tracker
from pipelines import cache_features, evaluate
from pipelines.ray_parts import answering
from pipelines.ray_parts.answers import Answer, AnswerStore, prompt_digest

SIZES = {"one": 56, "three": 112}
pytestmark = [pytest.mark.usefixtures("ray_once"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="session")
def benchmarks(tmp_path_factory):
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks") / "all")


def save_model(settings, folder):
    """A finished model with random weights that reads the run's cache."""
    encoder = load_encoder(settings)
    config = MeteorConfig(
        text_config=AutoConfig.from_pretrained(settings.llm.path),
        vision_config=CLIPVisionConfig.from_pretrained(settings.vision.path),
        projector={"name": settings.projector.name, **settings.projector.settings},
        select_layer=settings.vision.select_layer,
        cache_identity=Inputs(settings).cache_identity().to_dict(),
    )
    images = MeteorImageProcessor(
        **vars(pixel_settings(settings)),
        image_mean=encoder.preprocessing["mean"],
        image_std=encoder.preprocessing["std"],
    )
    processor = MeteorProcessor(images, load_tokenizer(settings.llm.path), config.projector)
    config.image_token_id = processor.image_token_id
    torch.manual_seed(0)
    MeteorForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make_evaluation(make_settings, tmp_path):
    model = save_model(make_settings(), tmp_path / "model")

    def make(question_sets, /, *, roots=None, **options):
        options = {"model": model, "max_new_tokens": 2, "limit": 3, "batch_size": 8, **options}
        data = {"pretrain": None, "finetune": None, "evaluate": question_sets, **({"roots": roots} if roots else {})}
        return make_settings(data=data, evaluate=options)

    return make


def read_scores(summary):
    return json.loads(Path(summary.results["run"], "scores.json").read_text())


def test_every_benchmark_is_scored_by_one_command(make_evaluation, benchmarks, small):
    sets = {name: {"format": name, "path": str(benchmarks / name)} for name in BENCHMARKS if name != "llava"}
    sets |= {
        "scenes": str(small / "data/evaluate.json"),
        "textvqa_ocr": {**sets["textvqa"], "ocr": True},
        "test_dev": {**sets["vqav2"], "split": "test-dev"},
        "vizwiz_test": {**sets["vizwiz"], "split": "test"},
    }
    settings = make_evaluation(sets)
    cache_features.run(Inputs(settings))
    summary = evaluate.run(Inputs(settings))
    scores = read_scores(summary)
    assert set(scores) == set(sets)
    unscored = {name for name, table in scores.items() if table["score"] is None}
    assert unscored == {"mmvet", "test_dev", "vizwiz_test"}
    for name, table in scores.items():
        assert table["num_questions"] == 3, name
        assert {"split", "ocr", "prompt", "metric_version", "model_digest", "cache_key", "cache_version"} <= set(table)
    assert {name: table["scored_by"] for name, table in scores.items() if table["scored_by"]} == {
        "mmvet": "judge",
        "test_dev": "server",
        "vizwiz_test": "server",
    }
    assert {(table["limit"], *table["selection"]) for table in scores.values()} == {(3,)}
    assert scores["textvqa_ocr"]["ocr"]
    assert "Reference OCR token" in scores["textvqa_ocr"]["prompt"]

    rows = pq.read_table(summary.results["predictions"]).to_pylist()
    # Three questions of MMBench are asked under every rotation.
    circular = [row for row in rows if row["set"] == "mmbench"]
    assert len({row["group"] for row in circular}) == 3 < len(circular)
    assert sum(row["score"] is not None for row in circular) == 3
    exports = {path.name for path in Path(summary.results["run"]).iterdir()}
    assert {
        "test_dev_submission.json",
        "vizwiz_test_submission.json",
        "mmvet_for_judge.json",
        "scenes_answers.jsonl",
    } <= exports

    tracker = Tracker(tracking_uri(settings), settings.tracking.experiment)
    [run] = [
        run
        for run in tracker._client.search_runs([tracker.experiment_id])
        if run.data.tags.get("meteor.stage") == "evaluate"
    ]
    assert run.data.metrics["pope/f1"] == pytest.approx(scores["pope"]["score"])
    assert "nlvr/consistency" in run.data.metrics
    # A part of the questions compares with no number of the paper.
    assert run.data.metrics["paper/comparable_columns"] == 0

    assert evaluate.run(Inputs(settings)).reused
    # A judge's verdicts change the score and ask nothing.
    verdicts = Path(settings.output, "verdicts.json")
    verdicts.write_text(json.dumps({f"v1_{i}": 0.5 for i in range(8)}))
    judged = make_evaluation({**sets, "mmvet": {**sets["mmvet"], "verdicts": str(verdicts)}})
    again = evaluate.run(Inputs(judged))
    assert (again.counts["answered_now"], read_scores(again)["mmvet"]["score"]) == (0, 0.5)


@pytest.fixture
def say_yes(monkeypatch):
    """Answer every question with "yes" in this process; after ``until`` answers the node is gone."""

    def install(until=None):
        def ask(settings, missing, *arguments):
            for number, prompt in enumerate(missing):
                if number == until:
                    raise OSError("the node is gone")
                yield {prompt: Answer("yes")}

        monkeypatch.setattr(answering, "_ask", ask)

    return install


def test_what_was_answered_before_a_crash_is_not_asked_again(make_evaluation, encode, say_yes, small):
    settings = make_evaluation({"scenes": str(small / "data/evaluate.json")}, limit=6)
    encode(settings)
    say_yes(until=4)
    with pytest.raises(OSError, match="the node is gone"):
        evaluate.run(Inputs(settings))
    say_yes()
    summary = evaluate.run(Inputs(settings))
    assert (summary.counts["questions"], summary.counts["answered_now"]) == (6, 2)
    # More questions, under another name of the set: only the new ones are asked.
    other = make_evaluation({"other": str(small / "data/evaluate.json")}, limit=8)
    assert evaluate.run(Inputs(other)).counts["answered_now"] == 2


def test_a_prompt_is_what_its_answer_depends_on():
    question = replace(ask("1", "what?", ["a.png"], ["x"]), image_keys=("k",))
    same = replace(ask("2", "what?", ["b.png"], ["y"], type="t"), image_keys=("k",))
    assert prompt_digest(question, 16) == prompt_digest(same, 16)
    other_text = replace(ask("1", "why?", ["a.png"]), image_keys=("k",))
    others = [replace(question, image_keys=("l",)), other_text]
    assert prompt_digest(question, 16, AnswerSelection()) != prompt_digest(question, 16, AnswerSelection(k=2))
    assert len({prompt_digest(question, 17), *(prompt_digest(one, 16) for one in [question, *others])}) == 4


def test_the_share_of_visual_tokens_counts_each_question_at_its_own_k(make_settings):
    settings = make_settings(projector={"name": "meteor", "settings": {"k": [2, 4]}})
    # One sub-image, and three: 4 tokens each in training.
    index = SimpleNamespace(
        rows=lambda: [SimpleNamespace(image_key=key, width=w, height=56) for key, w in SIZES.items()]
    )

    def answered(key, **changes):
        question = replace(ask("1", "what?", ["a.png"]), image_keys=(key,))
        return answering.SetQuestion("set", question, "", 16, AnswerSelection(**changes))

    assert evaluate.tokens_share(settings, [answered("one"), answered("three")], index) == 1
    assert evaluate.tokens_share(settings, [answered("one", k=2), answered("three")], index) == (2 + 12) / 16
    both = [answered("one"), answered("three", k=2, sub_images="global")]
    assert evaluate.tokens_share(settings, both, index) == (4 + 2) / 16


def test_a_question_about_an_image_that_cannot_be_used_is_wrong_and_reported(
    make_evaluation, encode, say_yes, small, tmp_path
):
    good, bad = (path.name for path in sorted((small / "data/images/train").iterdir())[:2])
    shutil.copytree(small / "data/images/train", tmp_path / "images")
    (tmp_path / "images" / bad).write_bytes(b"no image")
    turns = [{"from": "human", "value": "<image>\n<image>\nAre they alike?"}, {"from": "gpt", "value": "yes"}]
    pairs = {"alike": [good, good], "damaged": [good, bad]}
    records = [{"id": name, "image": images, "conversations": turns} for name, images in pairs.items()]
    (tmp_path / "pairs.json").write_text(json.dumps(records))
    settings = make_evaluation({"pairs": str(tmp_path / "pairs.json")}, roots={"": str(tmp_path / "images")})
    encode(settings, index=False)
    say_yes()
    summary = evaluate.run(Inputs(settings))
    assert summary.counts["quarantined"] == 1
    rows = {row["id"]: row for row in pq.read_table(summary.results["predictions"]).to_pylist()}
    bad = rows["damaged"]
    assert (bad["score"], bad["quarantined"], bad["prediction"]) == (0.0, True, "")
    assert bad["quarantine_reason"]
    assert (rows["alike"]["score"], rows["alike"]["quarantined"]) == (1.0, False)
    table = read_scores(summary)["pairs"]
    assert (table["num_questions"], table["num_quarantined"]) == (2, 1)


def test_a_record_that_cannot_be_asked_is_a_wrong_answer_and_too_many_stop_the_stage(
    make_evaluation, encode, say_yes, tmp_path
):
    turns = [{"from": "human", "value": "yes?"}, {"from": "gpt", "value": "yes"}]
    records = [{"id": name, "conversations": turns} for name in ("a", "b", "c")]
    records.append({"id": "odd", "conversations": [{"from": "human", "value": "\ud83d"}, turns[1]]})
    (tmp_path / "questions.json").write_text(json.dumps(records))
    sets = {"odd": str(tmp_path / "questions.json")}
    settings = make_evaluation(sets, limit=None)
    encode(settings)
    say_yes()
    summary = evaluate.run(Inputs(settings))
    table = read_scores(summary)["odd"]
    assert (table["score"], table["num_questions"], table["num_quarantined"]) == (0.75, 4, 1)
    assert (summary.counts["questions"], summary.counts["quarantined"]) == (4, 1)
    rows = {row["id"]: row for row in pq.read_table(summary.results["predictions"]).to_pylist()}
    assert (rows["odd"]["score"], rows["odd"]["quarantined"]) == (0.0, True)
    assert rows["odd"]["quarantine_reason"].startswith("bad_text: ")
    # Repaired or removed, the record makes another evaluation.
    (tmp_path / "questions.json").write_text(json.dumps(records[:3]))
    assert read_scores(evaluate.run(Inputs(settings)))["odd"]["score"] == 1.0
    (tmp_path / "questions.json").write_text(json.dumps(records))
    strict = make_evaluation(sets, limit=None)
    data = strict.data.model_copy(update={"min_bad_images": 0, "max_bad_share": 0.0})
    with pytest.raises(
        QuarantineLimitError, match="1 of 4 questions cannot be asked, for example odd: a text contains half"
    ):
        evaluate.find_questions(
            strict.model_copy(update={"data": data}),
            Inputs(strict).question_sets(),
            Inputs(strict).index(),
            Inputs(strict).cache(),
        )


def ask_here(answerer, settings, missing, *arguments):
    """Answer without Ray."""
    actor = answering.AnswerActor.__new__(answering.AnswerActor)
    actor._questions, actor._answerer, actor._source = list(missing.values()), answerer, None
    actor._cuts = settings.evaluate.long_prompts == "global"
    rows = actor(pa.table({"position": range(len(missing))})).to_pylist()
    yield from answering._by_prompt(rows, list(missing))


def test_a_prompt_that_is_too_long_is_wrong_or_answered_from_global_views_and_counted(
    make_evaluation, encode, monkeypatch, small
):
    class Answerer:
        def answer(self, questions, source, *, max_new_tokens, selection):
            if any(question.id == long for question in questions) and selection.sub_images != "global":
                raise TooLongError("the prompt has 5145 tokens")
            return ["yes"] * len(questions)

    monkeypatch.setattr(answering, "_ask", partial(ask_here, Answerer()))
    sets = {"scenes": str(small / "data/evaluate.json")}
    cut, plain = (make_evaluation(sets, limit=8, long_prompts=way) for way in ("global", "wrong"))
    encode(cut)
    long = Inputs(cut).question_sets()[0].questions[3].id
    summaries = [evaluate.run(Inputs(settings)) for settings in (cut, plain, cut)]
    # The plain run finds the answers of the other, but none to a prompt that was cut.
    assert [summary.counts["answered_now"] for summary in summaries[:2]] == [8, 1]
    for summary, num_cut in zip(summaries, (1, 0, 1), strict=True):
        table = read_scores(summary)["scenes"]
        assert (table["num_global_only"], table["num_quarantined"]) == (num_cut, 1 - num_cut)
        rows = {row["id"]: row for row in pq.read_table(summary.results["predictions"]).to_pylist()}
        assert [name for name, row in rows.items() if row["global_only"]] == [long] * num_cut
        assert rows[long]["prediction"] == "yes" * num_cut
    assert ", 1 of 8 questions by global views alone" in summaries[0].counts["scenes"]


def test_a_question_that_is_asked_in_vain_costs_no_other_and_is_asked_again(
    make_evaluation, encode, monkeypatch, small
):
    selections = []

    class Answerer:
        def answer(self, questions, source, *, max_new_tokens, selection):
            selections.append(selection)
            if any(question.id == gone for question in questions):
                raise DataError("gone.png was readable when it was indexed, but is not now")
            return ["yes"] * len(questions)

    monkeypatch.setattr(answering, "_ask", partial(ask_here, Answerer()))
    settings = make_evaluation({"scenes": str(small / "data/evaluate.json")}, limit=8)
    encode(settings)
    gone = Inputs(settings).question_sets()[0].questions[3].id
    summary = evaluate.run(Inputs(settings))
    assert (summary.counts["questions"], summary.counts["answered_now"], summary.counts["quarantined"]) == (8, 8, 1)
    rows = {row["id"]: row for row in pq.read_table(summary.results["predictions"]).to_pylist()}
    assert (rows[gone]["score"], rows[gone]["prediction"]) == (0.0, "")
    assert "gone.png" in rows[gone]["quarantine_reason"]
    other = make_evaluation({"other": str(small / "data/evaluate.json")}, limit=8)
    gone = None
    assert evaluate.run(Inputs(other)).counts["answered_now"] == 1
    # Answers with another selection are other answers.
    assert set(selections) == {AnswerSelection()}
    changed = make_evaluation(
        {"scenes": str(small / "data/evaluate.json")}, limit=8, k=3, visual_weight=0.5, sets={"scenes": {"k": 2}}
    )
    assert evaluate.run(Inputs(changed)).counts["answered_now"] == 8
    assert selections[-1] == AnswerSelection(k=2, visual_weight=0.5)


def test_the_plan_names_every_set_and_asks_nothing(make_evaluation, benchmarks):
    settings = make_evaluation({"gqa": {"format": "gqa", "path": str(benchmarks / "gqa")}}, max_new_tokens=None)
    text = evaluate.plan(Inputs(settings))
    assert "questions (GQA, testdev_balanced), exact_match, up to 16 tokens per answer" in text


def test_answers_written_by_two_at_once_are_all_read(tmp_path):
    one, other = AnswerStore(str(tmp_path)), AnswerStore(str(tmp_path))
    one.add({"a": Answer("1")})
    other.add({"b": Answer("2", global_only=True)})
    assert one.read() == {}
    one.flush()
    other.flush()
    assert AnswerStore(str(tmp_path)).read() == {"a": Answer("1"), "b": Answer("2", global_only=True)}
    one.flush()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_file_of_answers_counts_for_nothing(tmp_path, caplog):
    store = AnswerStore(str(tmp_path))
    store.add({"a": Answer("yes")})
    store.flush()
    [file] = tmp_path.iterdir()
    intact = file.read_bytes()
    for position in range(0, len(intact), 13):
        damaged = bytearray(intact)
        damaged[position] ^= 4
        file.write_bytes(damaged)
        assert AnswerStore(str(tmp_path)).read() == {}
    assert "Its questions are answered again" in caplog.text

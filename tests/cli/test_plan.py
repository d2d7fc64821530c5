"""`meteor plan` against counts made by hand from the run's files."""

import json
import shutil
from pathlib import Path

import pytest

from meteor.checksums import write_checked_json
from meteor.config import load_run, resolve_paths

TURNS = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "that"}]
STUDY = {
    "variants": {
        "meteor": {},
        "k2": {"projector.settings.k": 2},
        "slow": {"finetune.lr": 1e-6},
        "small": {"cache.codec": "int8"},
    }
}


@pytest.fixture
def settings(make_image, png, clip_folder, llm_folder, tokenizer_folder, tmp_path):
    """A run of four samples over two images, with both stages."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, size in [("0.png", (60, 60)), ("1.png", (200, 90))]:
        (folder / name).write_bytes(png(make_image(*size)))
    llm = shutil.copytree(llm_folder, tmp_path / "llm")
    for file in Path(tokenizer_folder).iterdir():
        shutil.copy(file, llm)
    samples = [{"id": str(i), "image": f"{i % 2}.png", "conversations": TURNS} for i in range(4)]
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    return {
        "output": str(tmp_path / "out"),
        "data": {
            "roots": {"": str(folder)},
            "pretrain": str(tmp_path / "samples.json"),
            "finetune": str(tmp_path / "samples.json"),
        },
        "slicing": {"resolution": 56, "max_slices": 2},
        "vision": {"path": clip_folder, "dtype": "float32"},
        "llm": {"path": str(llm), "dtype": "float32"},
        "projector": {"name": "meteor", "settings": {"k": 4, "state_size": 2}},
        "runtime": {"num_workers": 4},
    }


def plan(call, file, *options):
    code, shown, said = call("plan", "--run", file, "--json", *options)
    assert code == 0, said
    return json.loads(shown)


def test_a_run_is_counted_and_timed(call, write_run, settings):
    file = write_run(settings)
    cost = plan(call, file, "--sub-images-per-s", "2", "--gpu", "A100", "--mfu", "0.5", "--usd-per-gpu-hour", "10")
    work = {one["stage"]: one for one in cost["work"]}
    assert list(work) == ["cache_features", "pretrain", "finetune"]
    num_sub_images = work["cache_features"]["amount"]
    assert work["cache_features"]["hours"] == num_sub_images / 2 / 3600
    assert work["pretrain"]["hours"] == pytest.approx(work["pretrain"]["amount"] / (0.5 * 312e12) / 3600)
    # The same samples, with another template; a trained weight costs 6 FLOPs a token, a frozen one 4.
    assert work["finetune"]["amount"] > 1.5 * work["pretrain"]["amount"]
    # Every image is shown twice in either stage.
    assert cost["avoided_sub_images"] == 2 * 2 * num_sub_images - num_sub_images
    assert cost["usd"] == cost["hours"] * 10
    text = call("plan", "--run", file, "runtime.gpus_per_worker=1")[1]
    assert "assumed: 40% of H100's peak" in text
    assert "hours on 4 GPUs" in text
    # Workers on CPUs are not taken for GPUs.
    assert "not known before a stage has finished" in call("plan", "--run", file)[1]


def test_variants_share_what_they_agree_on(call, write_run, settings):
    cost = plan(call, write_run({**settings, "study": STUDY}))
    runs = {one["stage"]: one["num_stages"] for one in cost["work"]}
    # `slow` trains stage 1 of `meteor`, and `small` reads other numbers.
    assert runs == {"cache_features": 2, "pretrain": 3, "finetune": 4}
    assert sorted(cache["codec"] for cache in cost["caches"]) == ["float16", "int8"]
    one = plan(call, write_run(settings, "one.yaml"))
    # Another codec is converted, not encoded again.
    assert cost["work"][0]["amount"] == one["work"][0]["amount"]


def test_finished_runs_tell_the_rates(call, write_run, settings):
    file = write_run(settings)
    before = {one["stage"]: one for one in plan(call, file)["work"]}
    stored = resolve_paths(load_run(file)).model_dump(mode="json")
    counts = {"sub_images_encoded": 600, "encoding_seconds": 20.0}
    totals = {"visual_tokens": 30, "text_tokens": 20}
    leave(stored, "cache_features", counts, {})
    leave(stored, "pretrain", {}, {"training_seconds": 5.0, "totals": totals})
    after = {one["stage"]: one for one in plan(call, file)["work"]}
    assert after["cache_features"]["rate"] == {"per_s": 30.0, "source": "measured by 1 finished stage"}
    # 4 FLOPs for each weight and token, over 5 seconds of 4 workers.
    per_token = before["pretrain"]["amount"] / num_tokens_of_stage_1(stored)
    assert after["pretrain"]["rate"]["per_s"] == pytest.approx(per_token * 50 / 20)
    assert after["finetune"]["rate"] is before["finetune"]["rate"] is None
    # They ran on CPUs: of a GPU they say nothing.
    on_gpus = plan(call, file, "runtime.gpus_per_worker=1")["work"]
    assert all("measured" not in one["rate"]["source"] for one in on_gpus)


def leave(settings, stage, counts, extra):
    folder = f"{settings['output']}/runs/{stage}-000000000000"
    write_checked_json(f"{folder}/run.json", {"settings": settings})
    write_checked_json(f"{folder}/summary.json", {"stage": stage, "counts": counts, "extra": extra})


def num_tokens_of_stage_1(settings):
    """Of four samples: visual ones by the projector's k, and the text's."""
    from meteor.assembly import pixel_settings
    from meteor.config import RunSettings
    from meteor.data.samples import load_samples
    from meteor.image.budget import visual_token_budget
    from meteor.text.tokenizer import load_tokenizer
    from meteor.text.tokens import tokenise

    run = RunSettings.model_validate(settings)
    samples, _ = load_samples(run.data.pretrain)
    tokenizer, budget = load_tokenizer(run.llm.path), visual_token_budget("meteor", run.projector.settings)
    total = 0
    for sample in samples:
        size = {"0.png": (60, 60), "1.png": (200, 90)}[sample.images[0]]
        total += sum(budget(pixel_settings(run).plan(*size).patch_grids))
        total += len(tokenise(sample.conversation, tokenizer, "plain").input_ids) - 1
    return total

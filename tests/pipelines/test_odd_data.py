"""A data set with one of each odd image and record goes through all stages; the data check says before what each leaves out."""

import json
import os

import pyarrow.parquet as pq
import pytest
from PIL import Image

from meteor.assembly import Inputs
from meteor.assembly.sample_tables import plan_samples
from meteor.assembly.training_stage import prepare
from meteor.cache import FeatureCache
from meteor.planning.run_check import check_run
from pipelines import evaluate, finetune, pretrain

pytestmark = [pytest.mark.usefixtures("ray_once"), pytest.mark.filterwarnings("ignore")]

LONG_NAME = f"{'x' * 300}.png"
# Names of images that can be used, and of others with the reason that the quarantine gives.
GOOD = ["dot.png", "cmyk.jpg", "animated.gif", "grey.png"]
BAD = {
    "empty.jpg": "empty",
    "text.jpg": "not_an_image",
    "cut.png": "truncated",
    "strip.png": "aspect_ratio",
    "absent.png": "missing",
    "../out.png": "outside_roots",
    "loop.png": "inaccessible",
    "pipe.jpg": "missing",
    "folder.jpg": "missing",
    LONG_NAME: "outside_roots",
}


def make_images(folder):
    folder.mkdir()
    Image.new("RGB", (1, 1), "red").save(folder / "dot.png")
    Image.new("CMYK", (70, 50)).save(folder / "cmyk.jpg")
    Image.new("L", (60, 60), 90).save(folder / "grey.png")
    frames = [Image.new("P", (64, 48), colour) for colour in (1, 2, 3)]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("<html>not found</html>")
    noise = Image.effect_noise((300, 200), 90)
    noise.save(folder / "cut.png")
    (folder / "cut.png").write_bytes((folder / "cut.png").read_bytes()[:-2000])
    Image.new("RGB", (1, 50_000)).save(folder / "strip.png")
    (folder / "loop.png").symlink_to("loop.png")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "folder.jpg").mkdir()


def record(name, image=None, question="What?", answer="That.", **fields):
    shown = {"image": image} if image else {}
    turns = [
        {"from": "human", "value": f"<image>\n{question}" if image else question},
        {"from": "gpt", "value": answer},
    ]
    return {"id": name, **shown, "conversations": turns, **fields}


def odd_lines(image):
    """Lines of records that cannot be used, and the reason for each; the id of a line without its own is its position."""
    texts = {
        '{"id": "broken", "conversations": [}': "bad_record",
        f'{{"id": "deep", "x": {"[" * 100_000}{"]" * 100_000}}}': "bad_record",
        f'{{"id": {"9" * 5000}}}': "bad_record",
        '"a text"': "bad_record",
        "null": "bad_record",
    }
    records = {
        "surrogate": (record("surrogate", image, answer="\ud83d"), "bad_text"),
        "surrogate in a name": (record("surrogate in a name", "\udc00.png"), "bad_text"),
        "no turns": (record("no turns", image) | {"conversations": None}, "empty_conversation"),
        "no placeholder": (record("no placeholder", image) | {"image": [image, image]}, "image_without_placeholder"),
        "number": (record("number") | {"image": 7}, "bad_image_field"),
    }
    lines = [*texts, *(json.dumps(content) for content, _ in records.values())]
    return lines, [*texts.values(), *(reason for _, reason in records.values())]


@pytest.fixture
def make_odd(make_settings, small, tmp_path):
    def make(images):
        """A run over the odd data and some good samples; the reasons of its bad records; the number of good samples."""
        make_images(tmp_path / "images")
        known = [f"small/{path.name}" for path in sorted((small / "data/images/train").iterdir())[:4]]
        lines, reasons = odd_lines(known[0])
        good = [record(f"good {i}", name) for i, name in enumerate([*known, *images])]
        good += [record("same id", known[0]), record("same id", known[1]), record("\ud83d", known[2])]
        good += [record("nul", known[0], answer="a\0b"), record("bidi", known[1], answer="\u202egpj\ufeff")]
        bad = [record(f"with {name}", name) for name in BAD]
        lines += [json.dumps(content) for content in (*good, *bad)]
        (tmp_path / "odd.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join([*lines, ""]).encode())
        path = str(tmp_path / "odd.jsonl")
        roots = {"small/": str(small / "data/images/train"), "": str(tmp_path / "images")}
        files = {"pretrain": path, "finetune": path, "evaluate": {"odd": path}}
        settings = make_settings(
            data={"roots": roots, **files, "min_bad_images": 1000},
            finetune={"fraction": 1.0},
            evaluate={"limit": None},
        )
        return settings, reasons, len(good)

    return make


def left_out(report):
    """Sample -> reason, as the data check says; a sample with several bad images has the reason of the first."""
    bad = {image.name: image.reason for source in report.sources for image in source.bad}
    reasons = {problem.sample_id: problem.reason for problem in report.problems}
    return reasons | {f"with {name}": bad[name] for name in bad}


@pytest.mark.slow
def test_the_check_says_what_the_stages_leave_out(make_odd, encode):
    # Images that the cache has already: an encoder takes seconds to start.
    settings, reasons, num_good = make_odd([])
    checked = {one.name: left_out(one) for one in check_run(Inputs(settings), full=True).sets}
    assert checked["pretrain"] == checked["finetune"] == checked["odd"]
    assert sorted(checked["pretrain"].values()) == sorted([*reasons, *BAD.values()])
    summary = encode(settings, index=False)
    assert {row.name: row.reason for row in FeatureCache.open(summary.results["cache"]).quarantine()} == BAD
    plan = plan_samples(Inputs(settings), prepare(Inputs(settings), "pretrain"))
    assert {exclusion.sample_id: exclusion.reason for exclusion in plan.excluded} == checked["pretrain"]
    assert all(exclusion.message for exclusion in plan.excluded)
    assert len(plan.table) == num_good


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_over_odd_data_ends_with_scores(make_odd, encode):
    settings, reasons, num_good = make_odd(GOOD)
    encoded = encode(settings, index=False)
    assert (encoded.counts["quarantined"], encoded.counts["images_encoded"]) == (len(BAD), len(GOOD))
    pretrain.run(Inputs(settings))
    finetune.run(Inputs(settings))
    summary = evaluate.run(Inputs(settings))
    rows = pq.read_table(summary.results["predictions"]).to_pylist()
    assert len(rows) == num_good + len(reasons) + len(BAD)
    assert summary.counts["quarantined"] == len(reasons) + len(BAD)
    assert all(row["quarantine_reason"] and row["score"] == 0 for row in rows if row["quarantined"])

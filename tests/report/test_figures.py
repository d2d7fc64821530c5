"""Charts: what they say in words, and that awkward names and numbers do not stop them."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from meteor.report.canvas import variant_looks
from meteor.report.figures import comparable_runs, curves, loss_figure, scores_figure, throughput_figure


def png_size(image):
    return Image.open(io.BytesIO(image.png)).size


def test_every_variant_looks_different():
    looks = variant_looks([f"v{index}" for index in range(28)])
    assert len({(look.colour, look.line_style) for look in looks.values()}) == 28
    assert len({(look.colour, look.hatch) for look in looks.values()}) == 28


def test_the_loss_figure_tells_where_each_curve_ends(make_run):
    runs = {"meteor": [make_run(losses=[2.0] * 30 + [1.25] * 30)], "mlp": [make_run(losses=[1.5])]}
    image = loss_figure("pretrain", runs, variant_looks(list(runs)))
    assert image.alt.endswith("At the last step: meteor 1.25, mlp 1.50.")
    assert image.name == "loss_pretrain"


def test_a_figure_is_sharper_than_its_size_on_the_page(make_run):
    image = loss_figure("pretrain", {"a": [make_run(), make_run()]}, variant_looks(["a"]))
    width, height = png_size(image)
    assert width >= 1.5 * image.width
    assert width / height == pytest.approx(image.width / image.height, rel=0.01)


def test_variants_that_share_a_run_are_one_curve(make_variant, make_run):
    shared, own = make_run(), make_run("finetune")
    variants = [
        make_variant(name, stages={"pretrain": replace(shared, uri="p"), "finetune": replace(own, uri=name)})
        for name in "ab"
    ]
    assert list(curves(variants, "pretrain")) == ["a, b"]
    assert list(curves(variants, "finetune")) == ["a", "b"]
    seeds = [replace(one, variant="v", seed=seed) for seed, one in enumerate(variants)]
    assert [run.uri for run in curves(seeds, "finetune")["v"]] == ["a", "b"]


def test_a_loss_that_is_not_finite_leaves_a_gap(make_run):
    runs = {"a": [make_run(losses=[1.0, float("nan"), 2.0] * 20)]}
    assert loss_figure("pretrain", runs, variant_looks(["a"])).png


def test_names_with_markup_of_the_plotting_library_are_drawn_as_text(make_run, make_score):
    name = r"$\frac{oops$ _k"
    looks = variant_looks([name])
    assert loss_figure("pretrain", {name: [make_run()]}, looks).png
    assert throughput_figure({"pretrain": {name: make_run()}}, looks).png
    assert scores_figure("scores", {name: make_score(by_type={"$a$": make_score(), "$": make_score()})}, looks).png


def test_throughput_says_what_was_not_recorded(make_run):
    silent = make_run()
    silent.metrics[:] = [{"step": 1, "loss": 1.0}]
    runs = {"pretrain": {"a": make_run(), "b": silent}, "finetune": {"b": silent}}
    image = throughput_figure(runs, variant_looks(["a", "b"]))
    assert "pretrain, samples/s: a 16.0." in image.alt
    assert "pretrain, visual tokens/s: a 1,600." in image.alt
    assert "finetune, samples/s: not recorded." in image.alt


def test_scores_figure_gives_every_type_its_row(make_score):
    types = {f"type {index}": make_score() for index in range(6)}
    looks = variant_looks(["a", "b"])
    all_types = scores_figure("s", {"a": make_score(by_type=types), "b": make_score()}, looks)
    one_type = scores_figure("s", {"a": make_score(by_type={"only": make_score()}), "b": make_score()}, looks)
    assert all_types.height > one_type.height
    assert "All questions: a 50.0 %, b 50.0 %." in all_types.alt


def test_a_perfect_score_stays_inside_the_figure(make_score):
    score = {**make_score(1.0), "interval": [0.9, 1.0], "majority_share": 1.0}
    pixels = np.asarray(Image.open(io.BytesIO(scores_figure("s", {"a": score}, variant_looks(["a"])).png)).convert("L"))
    assert pixels[:, -3:].min() == 255


def test_runs_without_a_step_are_not_compared(make_run, make_variant):
    variants = [
        make_variant("a"),
        make_variant("b", stages={"pretrain": make_run(losses=())}),
        make_variant("c", stages={}),
    ]
    assert list(comparable_runs(variants, "pretrain")) == ["a"]

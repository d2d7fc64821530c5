"""A study's variants: changes, grids, seeds, names, and what is refused."""

import pytest

from meteor.config import RunSettings, expand_study, load_run
from meteor.errors import SettingsError


def make_run(**study):
    return RunSettings.model_validate(
        {"name": "st", "projector": {"name": "meteor", "settings": {"window": 5}}, "study": study}
    )


def names(run):
    return [variant.settings.name for variant in expand_study(run)]


def test_named_variants_change_the_run_and_belong_to_the_study():
    one, other = expand_study(
        make_run(variants={"as_it_is": {}, "small": {"projector.settings.k": 32, "finetune.lr": "1e-4"}})
    )
    assert one.settings.projector.settings == {"window": 5}
    assert other.settings.projector.settings == {"window": 5, "k": 32}
    assert other.settings.finetune.lr == 1e-4
    assert (other.name, other.settings.name, other.settings.tracking.study) == ("small", "small", "st")
    assert other.settings.study is None
    assert other.changes == {"projector.settings.k": 32, "finetune.lr": "1e-4"}


def test_another_projector_starts_without_settings_whatever_the_order_of_changes():
    [variant] = expand_study(make_run(variants={"r": {"projector.settings.k": 32, "projector.name": "resampler"}}))
    assert variant.settings.projector.name == "resampler"
    assert variant.settings.projector.settings == {"k": 32}


def test_grid_and_seeds_multiply_named_variants():
    run = make_run(
        variants={"a": {}, "b": {"finetune.epochs": 2}},
        grid={"projector.settings.k": [64, 32], "projector.settings.scan": ["single", "both"]},
        seeds=[0, 7],
    )
    found = names(run)
    assert len(found) == len(set(found)) == 2 * 4 * 2
    assert found[0] == "a_k-64_scan-single.s0"
    assert found[-1] == "b_k-32_scan-both.s7"
    seeded = expand_study(run)[1]
    assert (seeded.name, seeded.seed) == ("a_k-64_scan-single", 7)
    assert (seeded.settings.pretrain.seed, seeded.settings.finetune.seed) == (7, 7)


def test_one_seed_leaves_the_name_alone_and_none_the_runs_own():
    assert names(make_run(variants={"a": {}}, seeds=[3])) == ["a"]
    assert [variant.seed for variant in expand_study(make_run(variants={"a": {}}))] == [None]
    assert names(make_run(grid={"projector.settings.visual_weight": [0.5, 1]})) == [
        "visual_weight-0.5",
        "visual_weight-1",
    ]
    assert names(make_run()) == ["st"]


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ({"variants": {"a": {"finetune.learning_rate": 1}}}, r"variant a: unknown setting finetune\.learning_rate"),
        ({"variants": {"a": {"finetune.lr": "fast"}}}, "variant a: finetune.lr = 'fast'"),
        ({"variants": {"a b": {}}}, "variant a b: name = 'a b'"),
        ({"grid": {"finetune.template": ["plain", "plain"]}}, "two variants of the study are called 'template-plain'"),
    ],
)
def test_what_is_no_setting_is_refused_with_the_variants_name(study, message):
    with pytest.raises(SettingsError, match=message):
        expand_study(make_run(**study))


def test_a_run_without_a_study_is_refused():
    with pytest.raises(SettingsError, match="has no study"):
        expand_study(RunSettings())


def test_a_study_is_part_of_a_run_file(tmp_path):
    (tmp_path / "base.yaml").write_text("projector: {name: meteor, settings: {k: 64}}\n")
    file = tmp_path / "study.yaml"
    file.write_text("extends: base.yaml\nname: s\nstudy: {variants: {a: {}, b: {projector.name: mlp}}}\n")
    assert [one.settings.projector.name for one in expand_study(load_run(str(file)))] == ["meteor", "mlp"]
    with pytest.raises(SettingsError, match=r"unknown setting study\.variant"):
        load_run(str(file), ["study.variant={}"])


def test_a_study_with_tables_needs_question_sets():
    tables = {"Tokens": {"control": "a"}}
    variants = {"a": {}, "b": {"projector.settings.k": 8}}
    with pytest.raises(SettingsError, match="no question sets for a, b: name question sets"):
        expand_study(RunSettings(study={"variants": variants, "tables": tables}))
    assert len(expand_study(RunSettings(study={"variants": variants}))) == 2
    scored = {"evaluate": {"mine": "questions.json"}}
    assert len(expand_study(RunSettings(data=scored, study={"variants": variants, "tables": tables}))) == 2
    partly = {**variants, "b": {"data.evaluate": {}}}
    with pytest.raises(SettingsError, match="no question sets for b:"):
        expand_study(RunSettings(data=scored, study={"variants": partly, "tables": tables}))

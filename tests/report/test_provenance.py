"""What is needed to repeat a run, and what a report says it lacks."""

import json

from meteor.report.provenance import missing_pieces, projector_notes, provenance, settings_blocks


def test_facts_that_all_runs_share_are_said_once(make_run, make_variant):
    stages = {
        "pretrain": make_run(git_commit="c0ffee", cache_key="k1", versions={"torch": "2.11.0"}),
        "finetune": make_run(
            "finetune", git_commit="c0ffee", parent={"digest": "d1"}, versions={"torch": "2.12.0", "ray": "2.60.0"}
        ),
    }
    found = provenance([make_variant(stages=stages)])

    assert found.shared.rows == (("run digest", "d1"), ("git commit", "c0ffee"))
    assert found.by_run.columns == ("Run", "folder", "cache key", "parent digest")
    assert found.by_run.rows == (
        ("meteor, pretrain", "runs/pretrain", "k1", "none"),
        ("meteor, finetune", "runs/finetune", "none", "d1"),
    )
    assert found.versions.rows == (("ray", "2.60.0"), ("torch", "2.11.0, 2.12.0"))


def test_a_single_run_keeps_its_facts_together(make_run, make_variant):
    found = provenance([make_variant(stages={"pretrain": make_run(git_commit="c0ffee")})])
    assert found.shared.rows == ()
    assert found.by_run.rows == (("meteor, pretrain", "d1", "runs/pretrain", "c0ffee"),)


def test_equal_settings_are_shown_once(make_run, make_variant):
    stages = {
        "pretrain": make_run(settings={"a": 1, "b": 2}),
        "finetune": make_run("finetune", settings={"b": 2, "a": 1}),
    }
    stages["evaluate"] = make_run("evaluate", settings={"a": 3})
    blocks = settings_blocks([make_variant(stages=stages)])
    assert [(block.title, json.loads(block.text)) for block in blocks] == [
        ("meteor, pretrain; meteor, finetune", {"a": 1, "b": 2}),
        ("meteor, evaluate", {"a": 3}),
    ]


def test_missing_pieces_are_named(make_run, make_variant, make_score):
    complete = make_variant("complete", scores={"x": make_score()})
    unscored = make_variant("unscored")
    stages = {
        "pretrain": make_run(losses=(1.0,) * 7, finished=False),
        "finetune": make_run("finetune", losses=(), finished=False),
    }
    assert missing_pieces([complete], {}) == []
    assert missing_pieces([complete, unscored, make_variant("partial", stages=stages)], None) == [
        "No facts about the feature cache were given.",
        "unscored: stage evaluate has written no scores.",
        "partial: stage pretrain has not finished; it had reached step 7.",
        "partial: stage finetune has not finished; it had reported no step.",
        "partial: stage evaluate was not run.",
    ]


def test_projectors_that_are_not_the_published_ones_are_called_so(make_variant, make_run):
    def made_with(name):
        return make_variant(name, stages={"pretrain": make_run(settings={"projector": {"name": name}})})

    focus, meteor = made_with("focus"), made_with("meteor")
    assert [note[:24] for note in projector_notes([meteor, focus, focus])] == ["focus: FocusLLaVA-style,"]
    assert projector_notes([meteor]) == []

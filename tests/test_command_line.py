"""One convention for all command lines: overrides anywhere, and the same exit statuses."""

from contextlib import nullcontext

import pytest
import yaml

import jobs.preflight
import jobs.submit
import meteor.cli.main
from meteor.command_line import parse
from meteor.errors import SettingsError
from pipelines import ablate
from pipelines.command import stage_main, stage_parser

# Ray Data deprecates a default of its own.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
MAINS = {
    "meteor config": lambda *words: meteor.cli.main.main(["config", "show", *words]),
    "meteor plan": lambda *words: meteor.cli.main.main(["plan", *words]),
    "pipelines.pretrain": lambda *words: stage_main("pretrain", "", None, None, words),
    "pipelines.ablate": lambda *words: ablate.main(words),
    "jobs.submit": lambda *words: jobs.submit.main(["pretrain", *words]),
    "jobs.preflight": lambda *words: jobs.preflight.main(words),
}


@pytest.mark.parametrize("name", MAINS)
def test_an_error_is_one_line_and_status_2(name, capsys):
    assert MAINS[name]("--run", "no_such_run") == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("SettingsError: there is no run file 'no_such_run'")


@pytest.mark.parametrize("name", MAINS)
def test_a_wrong_option_is_status_2_and_named(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        MAINS[name]("--run", "demo", "--no-such-option")
    assert stopped.value.code == 2
    assert "unrecognized arguments: --no-such-option" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["pretrain.lr", "stray"])
def test_a_word_that_is_no_override_is_refused(word, capsys):
    with pytest.raises(SystemExit):
        parse(stage_parser("pretrain", ""), ["a.b=1", "--run", "demo", word])
    assert f"unrecognized arguments: {word}" in capsys.readouterr().err


def test_overrides_stand_on_both_sides_of_options(capsys):
    words = ["pretrain.lr=0.5", "--run", "demo", "finetune.lr=0.25"]
    assert MAINS["meteor config"](*words) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["pretrain"]["lr"], shown["finetune"]["lr"]) == (0.5, 0.25)
    arguments = parse(stage_parser("pretrain", ""), ["a=1", "--run", "demo", "b=2", "--dry-run", "c=3"])
    assert arguments.overrides == ["a=1", "b=2", "c=3"]
    assert MAINS["jobs.submit"]("pretrain.lr=1", "--run", "demo", "--dry-run", "finetune.lr=2") == 0
    assert "--run demo pretrain.lr=1 finetune.lr=2" in capsys.readouterr().out


def test_a_short_option_sets_its_setting(monkeypatch):
    seen = []

    def plan(inputs):
        seen.append(inputs.settings.evaluate.k)
        raise SettingsError("seen")

    monkeypatch.setattr("pipelines.command.ray_session", lambda runtime: nullcontext())
    for words in (["--k", "8", "evaluate.limit=2"], ["evaluate.limit=2", "--k", "8"], []):
        assert stage_main("evaluate", "", plan, plan, ["--run", "demo", *words], short={"--k": "evaluate.k"}) == 2
    assert seen == [8, 8, None]

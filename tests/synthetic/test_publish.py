"""A published folder is whole, belongs to its arguments, and is made once."""

import json
from pathlib import Path
from typing import Any

import pytest

from meteor.errors import AlreadyExistsError
from meteor.synthetic.publish import publish_folder


def fill(folder: Path) -> dict[str, Any]:
    (folder / "data.txt").write_text("data")
    return {"lines": 1}


def refuse(folder: Path) -> dict[str, Any]:
    raise AssertionError("the work was done again")


def test_the_record_holds_arguments_and_results(tmp_path: Path) -> None:
    publish_folder(tmp_path / "a" / "made", "record.json", {"seed": 1}, fill)
    assert json.loads((tmp_path / "a" / "made" / "record.json").read_text()) == {"arguments": {"seed": 1}, "lines": 1}
    assert (tmp_path / "a" / "made" / "data.txt").read_text() == "data"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["made"]


def test_finished_work_is_found_and_not_done_again(tmp_path: Path) -> None:
    publish_folder(tmp_path / "made", "record.json", {"seed": 1}, fill)
    publish_folder(tmp_path / "made", "record.json", {"seed": 1}, refuse)


def test_an_empty_folder_may_exist_before(tmp_path: Path) -> None:
    publish_folder(tmp_path, "record.json", {"seed": 1}, fill)
    assert (tmp_path / "record.json").exists()


def test_other_arguments_and_foreign_files_are_refused(tmp_path: Path) -> None:
    publish_folder(tmp_path / "made", "record.json", {"seed": 1}, fill)
    with pytest.raises(AlreadyExistsError, match=r"'seed': 1.*not with.*'seed': 2"):
        publish_folder(tmp_path / "made", "record.json", {"seed": 2}, refuse)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("")
    with pytest.raises(AlreadyExistsError, match=r"has no record\.json"):
        publish_folder(tmp_path / "foreign", "record.json", {"seed": 1}, refuse)


def test_failed_work_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        fill(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        publish_folder(tmp_path / "made", "record.json", {"seed": 1}, fail)
    assert list(tmp_path.iterdir()) == []


def test_the_loser_of_a_race_keeps_the_winners_folder(tmp_path: Path) -> None:
    def lose(folder: Path) -> dict[str, Any]:
        publish_folder(tmp_path / "made", "record.json", {"seed": 1}, fill)
        (folder / "data.txt").write_text("late")
        return {}

    publish_folder(tmp_path / "made", "record.json", {"seed": 1}, lose)
    assert (tmp_path / "made" / "data.txt").read_text() == "data"
    assert [path.name for path in tmp_path.iterdir()] == ["made"]

"""Two evaluations compared from their tables of predictions."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from meteor.cli.main import main
from meteor.evaluation.metrics import CIRCULAR, EXACT_MATCH
from meteor.evaluation.questions import ask
from meteor.evaluation.score_table import score_rows


@pytest.fixture
def write(tmp_path):
    def write(name, predictions, circular=("A", "A")):
        questions = [ask(str(i), f"what {i}?", [f"{i // 2}.png"], ["yes"]) for i in range(len(predictions))]
        rows = score_rows("plain", [(q, p, "") for q, p in zip(questions, predictions, strict=True)], EXACT_MATCH)
        turns = [
            ask(f"0+{i}", "which?", ["x.png"], ["AB"[i]], choices=["u", "v"][i:] + ["u", "v"][:i], group="0")
            for i in range(2)
        ]
        rows += score_rows("turned", [(q, p, "") for q, p in zip(turns, circular, strict=True)], CIRCULAR)
        (tmp_path / name).mkdir()
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name / "predictions.parquet")
        return str(tmp_path / name)

    return write


def test_differences_are_of_the_same_questions(write, capsys):
    a = write("a", ["no", "yes", "no", "no", "no", "no"])
    b = write("b", ["yes", "no", "yes", "yes", "yes", "yes", "yes", "yes"], circular=("A", "B"))
    assert main(["compare", a, b, "--json"]) == 0
    plain, turned = json.loads(capsys.readouterr().out)
    assert (plain["a"], plain["b"]) == (pytest.approx(1 / 6), pytest.approx(5 / 6))
    assert plain["difference"] == pytest.approx(4 / 6)
    assert plain["low"] < 4 / 6 < plain["high"]
    assert (plain["num_questions"], plain["num_images"], plain["num_better"], plain["num_worse"]) == (6, 3, 5, 1)
    # Two rotations are one question, about one image.
    assert (turned["num_questions"], turned["difference"], turned["low"]) == (1, 1.0, None)
    assert main(["compare", a, f"{b}/predictions.parquet"]) == 0
    printed = capsys.readouterr().out
    assert "plain: 16.7 -> 83.3, +66.7 (" in printed
    assert "6 questions about 3 images, 5 better, 1 worse" in printed
    assert "turned: 0.0 -> 100.0, +100.0 (no interval, one image)" in printed


def test_a_place_without_an_evaluation_is_named(write, tmp_path, capsys):
    a = write("a", ["yes"])
    assert main(["compare", a, str(tmp_path / "nowhere")]) == 2
    assert "no evaluation at" in capsys.readouterr().err

"""Reading back what stages left behind."""

import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq

from meteor.report import RunResult
from meteor.runs.reading import StageRecord
from pipelines.studies.results import read_result, unequal_workers


def test_scores_of_an_earlier_release_are_left_out_and_said(tmp_path, caplog):
    run = StageRecord("evaluate", str(tmp_path), {}, {"counts": {}}, [])
    pq.write_table(pa.table({"id": ["1"]}), tmp_path / "predictions.parquet")
    (tmp_path / "scores.json").write_text(json.dumps({"scenes": {"exact_match": 0.5}}))
    with caplog.at_level(logging.WARNING):
        result = read_result("mine", {"evaluate": run})
    assert (result.scores, result.predictions) == (None, None)
    assert "mine" in caplog.text
    assert "evaluate again" in caplog.text
    (tmp_path / "scores.json").write_text(json.dumps({"scenes": {"metric": "exact_match", "score": 0.5}}))
    assert read_result("mine", {"evaluate": run}).predictions == [{"id": "1"}]


def test_times_of_other_numbers_of_workers_are_said_not_to_compare():
    def make(name, num_workers):
        run = StageRecord("finetune", "x", {"runtime": {"num_workers": num_workers}}, {"counts": {}}, [])
        return RunResult(name, {"finetune": run})

    assert unequal_workers([make("a", 1), make("b", 1), RunResult("c", {})]) == []
    (sentence,) = unequal_workers([make("a", 1), make("b", 2)])
    assert sentence.startswith("Times of finetune do not compare: a had 1 worker, b 2.")

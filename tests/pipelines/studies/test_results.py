"""Reading back what stages left behind."""

import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq

from meteor.runs.reading import StageRecord
from pipelines.studies.results import read_result


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

"""What a training worker leaves in its run's folder besides checkpoints."""

import json

from meteor.errors import FailedStepError
from pipelines.ray_parts.worker import write_failure


def test_a_failed_step_leaves_the_samples_of_its_batch_and_names_the_file(tmp_path):
    failure = {"step": 12, "loss": "nan", "samples": [{"id": "s1", "row": 0}, {"id": "s5", "row": 4}]}
    error = write_failure(FailedStepError("step 12: the loss is nan.", failure), str(tmp_path))
    file = tmp_path / "failures/step_00000012.json"
    assert json.loads(file.read_text()) == failure
    assert str(error) == f"step 12: the loss is nan. The samples of the step's global batch are in {file}"
    # Every worker of the group comes to the same failure, and so does a restarted group.
    write_failure(FailedStepError("step 12: the loss is nan.", failure), str(tmp_path))
    assert json.loads(file.read_text()) == failure

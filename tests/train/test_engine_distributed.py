"""Two real processes: every engine against the plain one in one process, with unequal shares of the batch, and resuming."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from meteor.checkpoint.format import Checkpoint, complete_checkpoints
from meteor.constants import IGNORE_INDEX, IMAGE_TOKEN_ID
from meteor.text.tokens import TokenisedSample
from meteor.train.build import freeze_for
from meteor.train.engine import make_engine
from meteor.train.loop import save_checkpoint

NUM_STEPS, SAVED_AT = 4, 2
# Rank 1 has one sample fewer; its second micro step is the empty batch.
SHARES = [[[0, 1], [2]], [[3], []]]


def make_samples(make_features: Callable, num: int = 4) -> list:
    rows = []
    for i in range(num):
        ids = [1, IMAGE_TOKEN_ID, 10 + i, 20 + i, 2]
        rows.append(
            (TokenisedSample(ids, [IGNORE_INDEX] * 3 + [20 + i, 2]), [make_features(f"k{i}", sliced=i == 1, seed=i)])
        )
    return rows


def run(stage: str, zero_stage: int, folder: str, fixtures: tuple) -> None:
    """One process: trains, saves at `SAVED_AT`, goes on; or resumes from that checkpoint where there is one."""
    make_model, make_features, make_batch = fixtures
    samples = make_samples(make_features)
    shares = SHARES[dist.get_rank()] if dist.get_world_size() == 2 else [[0, 1, 2, 3]]
    batches = [make_batch([samples[i] for i in share]) for share in shares]
    model = make_model()
    freeze_for(model, stage)
    done = complete_checkpoints(f"{folder}/checkpoints")
    engine = make_engine(
        model,
        zero_stage=zero_stage,
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_grad_norm=1.0,
        empty_inputs=make_batch([]).as_inputs(),
        checkpoint=Checkpoint(done[-1]) if done else None,
    )
    for step in range(SAVED_AT if done else 0, NUM_STEPS):
        for i, batch in enumerate(batches):
            engine.forward_backward({**batch.as_inputs(), "num_items_in_batch": 8}, last=i == len(batches) - 1)
        engine.step(lr=1e-2 / (step + 1))
        if step + 1 == SAVED_AT and not done:
            save_checkpoint(engine, f"{folder}/checkpoints", step + 1, epoch=0, keep=2)
    save_checkpoint(engine, f"{folder}/{'resumed' if done else 'straight'}", NUM_STEPS, epoch=0, keep=1)


def weights_of(folder: str, name: str) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(complete_checkpoints(f"{folder}/{name}")[-1])
    return {
        f"{kind}/{key}": checkpoint.read(kind, key) for key in checkpoint.shapes for kind in ("weights", "exp_avg_sq")
    }


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_workers_equal_one_and_a_resumed_run_equals_an_uninterrupted_one(
    zero_stage, stage, tmp_path, make_model, make_features, make_batch, start_workers
):
    fixtures = (make_model, make_features, make_batch)
    folder, truth = str(tmp_path / "two"), str(tmp_path / "one")
    start_workers(1, run, stage, 0, truth, fixtures)
    start_workers(2, run, stage, zero_stage, folder, fixtures)
    straight = weights_of(folder, "straight")
    for name, expected in weights_of(truth, "straight").items():
        torch.testing.assert_close(
            straight[name], expected, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    start_workers(2, run, stage, zero_stage, folder, fixtures)
    resumed = weights_of(folder, "resumed")
    for name, expected in straight.items():
        assert torch.equal(resumed[name], expected), name

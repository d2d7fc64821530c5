"""Engines on one process against the plain one, and resuming; several processes are in test_engine_distributed.py."""

import copy

import pytest
import torch
from saving import save_checkpoint

from meteor.checkpoint.folder import complete_checkpoints
from meteor.checkpoint.format import Checkpoint
from meteor.constants import IGNORE_INDEX, IMAGE_PLACE
from meteor.errors import CheckpointError, SettingsError
from meteor.text.tokens import TokenisedSample
from meteor.train.build import freeze_for
from meteor.train.engine import make_engine


def make_samples(make_features, num=4):
    samples = []
    for i in range(num):
        ids = [1, IMAGE_PLACE, 10 + i, 20 + i, 30 + i, 2]
        labels = [IGNORE_INDEX, IGNORE_INDEX, IGNORE_INDEX, 20 + i, 30 + i, 2]
        samples.append((TokenisedSample(ids, labels), [make_features(f"k{i}", sliced=i % 2 == 0, seed=i)]))
    return samples


def make_torch_engine(model, batch, checkpoint=None):
    return make_engine(
        model,
        zero_stage=0,
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_grad_norm=1.0,
        empty_inputs=batch.as_inputs(),
        checkpoint=checkpoint,
    )


def run_steps(engine, batches, num_steps, first=0):
    losses = []
    for step in range(first, first + num_steps):
        total = 0.0
        for i, batch in enumerate(batches):
            inputs = {**batch.as_inputs(), "num_items_in_batch": 12}
            total += float(engine.forward_backward(inputs, last=i == len(batches) - 1).loss)
        losses.append(total)
        engine.step(lr=1e-2 / (step + 1))
    return losses


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_any_split_into_micro_steps_gives_the_same_loss_and_weights(make_model, make_features, make_batch, micro):
    samples = make_samples(make_features)
    whole, split = make_model(), make_model()
    for model in (whole, split):
        freeze_for(model, "finetune")
    batch = make_batch(samples)
    expected = run_steps(make_torch_engine(whole, batch), [batch], 3)
    batches = [make_batch(samples[i : i + micro]) for i in range(0, 4, micro)]
    got = run_steps(make_torch_engine(split, batch), batches, 3)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    for (name, one), other in zip(whole.named_parameters(), split.parameters(), strict=True):
        # Adam makes a step of the size of lr out of a gradient of rounding errors.
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_an_empty_batch_adds_nothing_and_touches_every_parameter(make_model, make_features, make_batch):
    model = make_model()
    freeze_for(model, "finetune")
    empty = make_batch([])
    engine = make_torch_engine(model, empty)
    before = copy.deepcopy(model.state_dict())
    loss, selection_sums = engine.forward_backward({**empty.as_inputs(), "num_items_in_batch": 5}, last=True)
    assert float(loss) == 0
    assert not selection_sums.any()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)
    engine.step(lr=1e-2)
    torch.testing.assert_close(model.state_dict(), before)


def test_selection_sums_of_micro_steps_add_up_to_those_of_the_whole_batch(make_model, make_features, make_batch):
    samples, model = make_samples(make_features), make_model()
    engine = make_torch_engine(model, make_batch(samples))
    whole, *parts = (
        engine.forward_backward(make_batch(share).as_inputs(), last=True)
        for share in (samples, samples[:1], samples[1:3], [], samples[3:])
    )
    assert not whole.selection_sums.requires_grad
    # Two images of three sub-images, two of one.
    assert whole.selection_sums[0] == 8
    torch.testing.assert_close(sum(part.selection_sums for part in parts), whole.selection_sums)


def test_a_projector_that_does_not_select_gives_no_sums(make_model, make_features, make_batch):
    batch = make_batch(make_samples(make_features), {"name": "mlp"})
    engine = make_torch_engine(make_model({"name": "mlp"}), batch)
    assert engine.forward_backward(batch.as_inputs(), last=True).selection_sums is None


def test_stage_1_changes_the_projector_alone(make_model, make_features, make_batch):
    model = make_model()
    freeze_for(model, "pretrain")
    before = copy.deepcopy(model.state_dict())
    batch = make_batch(make_samples(make_features))
    losses = run_steps(make_torch_engine(model, batch), [batch], 5)
    assert losses[-1] < losses[0]
    changed = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"projector"}


def test_resuming_gives_the_weights_of_the_uninterrupted_run(make_model, make_features, make_batch, tmp_path):
    batch = make_batch(make_samples(make_features))
    straight, interrupted, resumed = make_model(), make_model(), make_model(seed=9)
    resumed.language_model.load_state_dict(interrupted.language_model.state_dict())
    for model in (straight, interrupted, resumed):
        freeze_for(model, "pretrain")
    run_steps(make_torch_engine(straight, batch), [batch], 6)
    engine = make_torch_engine(interrupted, batch)
    run_steps(engine, [batch], 3)
    save_checkpoint(engine, str(tmp_path), 3, epoch=0, keep=2)
    checkpoint = Checkpoint(complete_checkpoints(str(tmp_path))[-1])
    run_steps(make_torch_engine(resumed, batch, checkpoint), [batch], 3, first=3)
    for one, other in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_of_another_model_is_refused_with_the_first_difference(
    make_model, make_features, make_batch, tmp_path
):
    batch = make_batch(make_samples(make_features))
    model = make_model()
    freeze_for(model, "pretrain")
    engine = make_torch_engine(model, batch)
    run_steps(engine, [batch], 1)
    save_checkpoint(engine, str(tmp_path), 1, epoch=0, keep=1)
    other = make_model({"name": "mlp"})
    freeze_for(other, "pretrain")
    with pytest.raises(CheckpointError, match=r"does not fit the model: projector\."):
        make_torch_engine(other, batch, Checkpoint(complete_checkpoints(str(tmp_path))[-1]))


def test_a_model_with_everything_frozen_is_refused(make_model, make_batch):
    model = make_model().requires_grad_(False)
    with pytest.raises(SettingsError, match="no parameter"):
        make_torch_engine(model, make_batch([]))

"""The trial of the model itself: sound layouts pass, and a model that lets neighbours through is refused."""

import pytest
import torch

from meteor.errors import SettingsError
from meteor.train.engine import make_engine
from meteor.train.row_check import check_rows


@pytest.fixture
def check(make_model, make_batch):
    def run(*, packs, change=lambda model: None, dtype=torch.float32, attention="varlen"):
        model = make_model()
        # Weights of random initial size hardly let tokens see each other.
        for weight in model.language_model.parameters():
            weight.data *= 4 if weight.ndim > 1 else 1
        model.language_model.set_attn_implementation(attention)
        change(model)
        engine = make_engine(
            model, zero_stage=0, dtype=dtype, device=torch.device("cpu"), max_grad_norm=1.0, empty_inputs={}
        )

        def collate(rows):
            samples = [sample for row in rows for sample in row]
            places = iter(range(len(samples)))
            return make_batch(samples, rows=[[next(places) for _ in row] for row in rows])

        check_rows(engine, collate, packs=packs, vocab_size=64, dtype=dtype)

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("packs", "attention"), [(True, "varlen"), (True, "sdpa"), (True, "eager"), (False, "sdpa")])
def test_sound_layouts_pass(check, packs, attention, dtype):
    check(packs=packs, attention=attention, dtype=dtype)


def average_over_the_row(model):
    """Mix tokens by more than attention: each token also sees the mean of all tokens before it in its row."""

    def mix(layer, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        counts = torch.arange(1, hidden.shape[1] + 1).view(1, -1, 1)
        mixed = hidden + hidden.cumsum(1) / counts
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    model.language_model.base_model.layers[0].register_forward_hook(mix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_mixes_the_tokens_of_a_row_is_refused_for_packed_rows_alone(check, dtype):
    with pytest.raises(SettingsError, match=r"depends on its neighbour in its row: .* Set batching=grouped"):
        check(packs=True, change=average_over_the_row, dtype=dtype)
    check(packs=False, change=average_over_the_row, dtype=dtype, attention="sdpa")


def test_a_model_whose_samples_share_a_batch_s_statistics_is_refused(check):
    def center(model):
        model.language_model.base_model.layers[0].register_forward_pre_hook(
            lambda layer, args: (args[0] - args[0].mean((0, 1)), *args[1:])
        )

    with pytest.raises(SettingsError, match="depends on its neighbour in its batch"):
        check(packs=False, change=center, attention="sdpa")

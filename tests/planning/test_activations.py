"""What is counted on the meta device against what real forward passes keep."""

import pytest
import torch

from meteor.model.attention import Layout
from meteor.planning.activations import count_layer_bytes, count_saved_bytes
from meteor.train.build import checkpoint_activations

ROWS, LENGTH = 2, 96


def keep(model, attention, dtype):
    """Bytes that the decoder really keeps of full rows; the mask and the embeddings left out."""
    decoder = model.language_model.base_model
    model.language_model.set_attn_implementation(attention)
    shape = (1, ROWS * LENGTH) if attention == "varlen" else (ROWS, LENGTH)
    embeds = torch.randn(*shape, decoder.config.hidden_size, dtype=dtype, requires_grad=True)
    layout = Layout.of(torch.ones(ROWS, LENGTH, dtype=torch.long), torch.ones(ROWS, LENGTH, dtype=torch.bool))
    if attention == "varlen":
        flat = layout.unpadded()
        inputs = {"position_ids": flat.position_1N, **flat.attention_arguments()}
        mask = embeds
    else:
        mask = layout.mask(decoder.config, dtype)
        inputs = {"position_ids": layout.position_BL, "attention_mask": mask}
    given = [*decoder.parameters(), *decoder.buffers(), embeds, mask]
    return count_saved_bytes(lambda: decoder(inputs_embeds=embeds, use_cache=False, **inputs), given)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["varlen", "sdpa", "eager"])
def test_a_layer_keeps_what_is_counted(make_model, attention, dtype, trained):
    shape = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    models = [make_model(num_hidden_layers=n, **shape).to(dtype).requires_grad_(trained) for n in (2, 5)]
    two, five = (keep(model, attention, dtype) for model in models)
    counted = count_layer_bytes(
        models[0].language_model.config, dtype=dtype, rows=ROWS, length=LENGTH, attention=attention, trained=trained
    )
    # Of one sample after the other the CPU's attention is put together in a copy, which FlashAttention does not make.
    assert (five - two) / 3 == pytest.approx(counted.layer, rel=0.06 if attention == "varlen" else 0.01)


def test_a_checkpointed_layer_keeps_its_input(make_model):
    kept = []
    for num_layers in (2, 5):
        model = make_model(num_hidden_layers=num_layers)
        checkpoint_activations(model)
        kept.append(keep(model, "sdpa", torch.float32))
    counted = count_layer_bytes(
        model.language_model.config, dtype=torch.float32, rows=ROWS, length=LENGTH, attention="sdpa", trained=True
    )
    assert (kept[1] - kept[0]) / 3 == counted.layer_input == ROWS * LENGTH * 32 * 4

"""The loss against transformers' own LLaVA with the same weights, where shapes allow: one global view and an MLP."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from meteor.constants import IGNORE_INDEX, IMAGE_PLACE
from meteor.features import ImageFeatures
from meteor.model.attention import IMPLEMENTATIONS
from meteor.text.tokens import TokenisedSample
from meteor.vision.encoder import FrozenEncoder

V, X = IMAGE_PLACE, IGNORE_INDEX
IMAGE_TOKEN = 63  # LLaVA's, in its vocabulary
SAMPLES = [([1, V, 10, 11, 12, 2], 3), ([1, 5, V, 20, 2], 3), ([1, V, 30, 31, 32, 33, 34, 2], 6)]


@pytest.fixture(scope="module")
def llava(make_model):
    """LLaVA of `make_model`'s shapes, and ours with its weights."""
    ours = make_model({"name": "mlp"}, vision_tower=True).eval()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**ours.config.vision_config.to_diff_dict()),
        text_config=LlamaConfig(**ours.config.text_config.to_diff_dict()),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    theirs = LlavaForConditionalGeneration(config).eval()
    theirs.model.vision_tower.load_state_dict(ours.vision_tower.state_dict())
    theirs.model.language_model.load_state_dict(ours.language_model.model.state_dict())
    theirs.lm_head.load_state_dict(ours.language_model.lm_head.state_dict())
    mlp = dict(zip(theirs.model.multi_modal_projector.state_dict(), ours.projector.state_dict().values(), strict=True))
    theirs.model.multi_modal_projector.load_state_dict(mlp)
    return theirs, ours


def by_llava(model, ids, num_question, pixels):
    """Its summed loss of one sample: every placeholder is as many tokens as patches."""
    spread = [[IMAGE_TOKEN] * 16 if token == V else [token] for token in ids]
    labels = [[X] * len(part) if i < num_question else part for i, part in enumerate(spread)]
    flat_ids, flat_labels = (torch.tensor([[token for part in parts for token in part]]) for parts in (spread, labels))
    output = model(input_ids=flat_ids, pixel_values=pixels[None], labels=flat_labels)
    return output.loss * (len(ids) - num_question)


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [[[0], [1], [2]], [[0, 1], [2]], [[2, 0, 1]]])
def test_padded_and_packed_losses_are_llavas(llava, make_batch, rows, attention):
    theirs, ours = llava
    ours.language_model.set_attn_implementation(attention)
    pixels = [torch.randn(3, 56, 56, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    clip = FrozenEncoder(ours.vision_tower, select_layer=-2, attention_layers=(-2,), digest="0" * 64)
    samples, expected = [], 0.0
    with torch.no_grad():
        for (ids, num_question), shown in zip(SAMPLES, pixels, strict=True):
            [seen] = clip.encode([shown])
            image = ImageFeatures(
                "k", 56, 56, None, (seen.grid,), (-2,), [seen.features], [seen.cls_attention], seen.cls[None]
            )
            samples.append((TokenisedSample(ids, [X] * num_question + ids[num_question:]), [image]))
            expected += float(by_llava(theirs, ids, num_question, shown))
        batch = make_batch(samples, {"name": "mlp"}, rows=rows)
        assert float(ours(**batch.as_inputs(), num_items_in_batch=1).loss) == pytest.approx(expected, rel=1e-5)

"""The plain MLP projector."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from meteor.projector import build_projector


def test_every_real_token_goes_through_the_mlp_and_padding_is_zero(make_sub_images: Callable[..., Any]) -> None:
    batch = make_sub_images((2, 3), (2, 2)).with_padding(torch.nan)
    projector = build_projector("mlp", vision_width=16, llm_width=8)
    output = projector(batch.features, batch.cls_attention, batch.grids)
    first, _, second = projector.mlp
    expected = F.linear(F.gelu(F.linear(batch.features, first.weight, first.bias)), second.weight, second.bias)
    assert output.mask.tolist() == [[True] * 6, [True] * 4 + [False] * 2]
    torch.testing.assert_close(output.tokens[output.mask], expected[output.mask])
    assert (output.tokens[~output.mask] == 0).all()
    assert output.indices.tolist() == [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 0, 0]]
    assert output.visual_scores is None
    assert output.aux_loss is None

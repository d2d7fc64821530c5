"""Visual-Native Selection on cases worked by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from meteor.errors import SettingsError
from meteor.projector.selection import Selection, select_tokens

# <F_i, INS> = 0, ln 2, ln 4, ln 1: the native scores are 1, 2, 4 and 1 eighths.
LOGITS = [0.0, math.log(2), math.log(4), 0.0]


def make_selection(
    attention: list[list[float]],
    logits: list[list[float]] | None = None,
    mask: list[list[bool]] | None = None,
    **settings: Any,
) -> Selection:
    attention_BP = torch.tensor(attention)
    logits_BP = torch.zeros_like(attention_BP) if logits is None else torch.tensor(logits)
    # Width 2 with INS = (1, 0): the dot product is the first channel.
    fused = torch.stack([logits_BP, torch.full_like(logits_BP, 5.0)], dim=-1)
    instruction = torch.tensor([[1.0, 0.0]]).expand(len(attention), 2)
    mask_BP = torch.ones_like(attention_BP, dtype=torch.bool) if mask is None else torch.tensor(mask)
    return select_tokens(fused, instruction, attention_BP, mask_BP, **settings)


def test_scores_of_both_experts_and_their_aggregate_by_hand() -> None:
    # The patches' attention adds up to 0.5: the class token kept the other half for itself.
    selection = make_selection([[0.05, 0.2, 0.05, 0.2]], [LOGITS], k=2)
    torch.testing.assert_close(selection.visual_scores, torch.tensor([[0.1, 0.4, 0.1, 0.4]]))
    torch.testing.assert_close(selection.native_scores, torch.tensor([[0.125, 0.25, 0.5, 0.125]]))
    torch.testing.assert_close(selection.scores, torch.tensor([[0.105, 0.37, 0.18, 0.345]]))
    assert selection.indices.tolist() == [[1, 3]]
    assert selection.mask.all()


@pytest.mark.parametrize(("experts", "expected"), [("visual", [1, 3]), ("native", [1, 2]), ("visual_native", [1, 3])])
def test_each_choice_of_experts_ranks_by_its_own_scores(experts: str, expected: list[int]) -> None:
    selection = make_selection([[0.05, 0.2, 0.05, 0.2]], [LOGITS], k=2, experts=experts)
    assert selection.indices.tolist() == [expected]
    own = {"visual": selection.visual_scores, "native": selection.native_scores}
    if experts in own:
        assert torch.equal(selection.scores, own[experts])


def test_kept_tokens_stay_in_map_order_whatever_their_rank() -> None:
    assert make_selection([[0.1, 0.2, 0.3, 0.4, 0.5]], k=3, experts="visual").indices.tolist() == [[2, 3, 4]]
    assert make_selection([[0.3, 0.1, 0.2, 0.1, 0.3]], k=3, experts="visual").indices.tolist() == [[0, 2, 4]]


def test_ties_go_to_the_lower_index() -> None:
    assert make_selection([[0.1, 0.3, 0.1, 0.1, 0.3, 0.1]], k=4, experts="visual").indices.tolist() == [[0, 1, 2, 4]]


def test_ties_go_to_the_lower_index_among_many() -> None:
    assert make_selection([[1.0] * 576], k=144).indices.tolist() == [list(range(144))]


@pytest.mark.parametrize("k", [4, 5, 1000])
def test_a_sub_image_of_at_most_k_patches_keeps_them_all(k: int) -> None:
    selection = make_selection([[0.1, 0.4, 0.2, 0.3]], k=k)
    assert selection.indices.tolist() == [[0, 1, 2, 3]]
    assert selection.mask.all()


def test_padding_is_never_kept_nor_scored_even_if_it_holds_nan() -> None:
    selection = make_selection(
        [[0.4, 0.1, math.nan, 9.0], [0.1, 0.2, 0.3, 0.4]],
        [[0.0, math.log(3), math.nan, 9.0], LOGITS],
        [[True, True, False, False], [True] * 4],
        k=3,
    )
    assert selection.indices.tolist() == [[0, 1, 0], [1, 2, 3]]
    assert selection.mask.tolist() == [[True, True, False], [True] * 3]
    torch.testing.assert_close(selection.visual_scores[0], torch.tensor([0.8, 0.2, 0.0, 0.0]))
    torch.testing.assert_close(selection.native_scores[0], torch.tensor([0.25, 0.75, 0.0, 0.0]))
    torch.testing.assert_close(selection.scores[0], torch.tensor([0.69, 0.31, 0.0, 0.0]))


def test_real_tokens_without_any_attention_come_before_padding() -> None:
    selection = make_selection([[0.0, 0.0, 0.0]], mask=[[True, True, False]], k=2, experts="visual")
    assert selection.indices.tolist() == [[0, 1]]
    assert selection.mask.all()
    assert selection.visual_scores.tolist() == [[0, 0, 0]]


def test_without_any_attention_the_native_expert_decides() -> None:
    selection = make_selection([[0.0] * 4], [LOGITS], k=1)
    assert selection.indices.tolist() == [[2]]


def test_a_row_without_real_patches_gives_no_nan_in_scores_or_gradients() -> None:
    fused = torch.ones(1, 2, 3, requires_grad=True)
    selection = select_tokens(fused, torch.ones(1, 3), torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool), k=1)
    selection.scores.sum().backward()
    assert selection.scores.tolist() == [[0, 0]]
    assert not selection.mask.any()
    assert selection.indices.tolist() == [[0]]
    assert not fused.grad.any()


def test_a_native_weight_of_zero_ranks_as_the_visual_expert_alone() -> None:
    attention = [[0.05, 0.21, 0.06, 0.2, 0.06]]
    logits = [[9.0, 0.0, 8.0, 0.0, 7.0]]
    warm = make_selection(attention, logits, k=3, native_weight=torch.tensor(0.0))
    assert torch.equal(warm.indices, make_selection(attention, logits, k=3, experts="visual").indices)
    assert not torch.equal(warm.indices, make_selection(attention, logits, k=3).indices)


def test_the_full_native_weight_equals_the_default_and_leaves_single_experts_alone() -> None:
    weight = torch.tensor(0.2)
    for experts in ("visual_native", "visual", "native"):
        given = make_selection([[0.05, 0.2, 0.05, 0.2]], [LOGITS], k=2, native_weight=weight * 0.5, experts=experts)
        default = make_selection([[0.05, 0.2, 0.05, 0.2]], [LOGITS], k=2, experts=experts)
        assert torch.equal(given.scores, default.scores) == (experts != "visual_native")
    full = make_selection([[0.05, 0.2, 0.05, 0.2]], [LOGITS], k=2, native_weight=weight)
    torch.testing.assert_close(full.scores, make_selection([[0.05, 0.2, 0.05, 0.2]], [LOGITS], k=2).scores)


@pytest.mark.parametrize(("visual_weight", "expected"), [(0.0, 2), (1.0, 1)])
def test_the_visual_weight_moves_the_choice(visual_weight: float, expected: int) -> None:
    selection = make_selection([[0.1, 0.4, 0.2, 0.3]], [LOGITS], k=1, visual_weight=visual_weight)
    assert selection.indices.tolist() == [[expected]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scores_of_half_precision_tokens_are_float32(dtype: torch.dtype) -> None:
    # 64 x 64 x 32 is out of fp16's range: the dot products must not be.
    fused: Tensor = torch.full((1, 3, 32), 64.0, dtype=dtype)
    fused[0, 1, 0] = 65.0
    selection = select_tokens(
        fused, fused[:, 0], torch.ones(1, 3, dtype=dtype), torch.ones(1, 3, dtype=torch.bool), k=1, experts="native"
    )
    assert selection.scores.dtype == torch.float32
    assert selection.scores.isfinite().all()
    assert selection.indices.tolist() == [[1]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 2.5}, "k is 2.5"),
        ({"k": 2, "visual_weight": 1.5}, "visual_weight is 1.5"),
        ({"k": 2, "experts": "both"}, "visual_native, visual, native"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_selection([[0.5, 0.5]], **settings)

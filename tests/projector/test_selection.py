"""Visual-Native Selection on cases worked by hand."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from meteor.errors import SettingsError
from meteor.projector.selection import EXPERTS, Selection, select_tokens

# <F_i, INS> = 0, ln 2, ln 4, ln 1: the native scores are 1, 2, 4 and 1 eighths.
LOGITS = [0.0, math.log(2), math.log(4), 0.0]


def make_selection(
    attention: list[list[float]],
    logits: list[list[float]] | None = None,
    mask: list[list[bool]] | None = None,
    **options: Any,
) -> Selection:
    attention_BP = torch.tensor(attention)
    logits_BP = torch.zeros_like(attention_BP) if logits is None else torch.tensor(logits)
    # Width 2 with INS = (1, 0): the dot product is the first channel.
    fused = torch.stack([logits_BP, torch.full_like(logits_BP, 5.0)], dim=-1)
    instruction = torch.tensor([[1.0, 0.0]]).expand(len(attention), 2)
    mask_BP = torch.ones_like(attention_BP, dtype=torch.bool) if mask is None else torch.tensor(mask)
    return select_tokens(fused, instruction, attention_BP, mask_BP, **options)


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


@pytest.mark.parametrize("experts", EXPERTS)
def test_equal_scores_keep_the_lowest_indices(experts: str) -> None:
    selection = make_selection([[0.1] * 5, [0.3] * 5], k=3, experts=experts)
    assert selection.indices.tolist() == [[0, 1, 2]] * 2


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


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (1.0, [1 / 8, 2 / 8, 4 / 8, 1 / 8]),
        # The square roots 1, sqrt 2, 2, 1, and the squares 1, 4, 16, 1, each over their sum.
        (0.5, [one / (4 + math.sqrt(2)) for one in (1, math.sqrt(2), 2, 1)]),
        (2, [1 / 22, 4 / 22, 16 / 22, 1 / 22]),
    ],
)
def test_the_native_scale_multiplies_the_dot_products(scale: float, expected: list[float]) -> None:
    selection = make_selection([[0.25] * 4], [LOGITS], k=2, experts="native", native_scale=scale)
    torch.testing.assert_close(selection.scores, torch.tensor([expected]))


def test_the_scale_makes_the_native_expert_less_sure_of_itself() -> None:
    # As wide as CLIP's features: dot products of independent normal vectors have a standard deviation of 32.
    torch.manual_seed(0)
    arguments = (torch.randn(64, 576, 1024), torch.randn(64, 1024))
    even = (torch.ones(64, 576), torch.ones(64, 576, dtype=torch.bool))
    highest = [
        select_tokens(*arguments, *even, k=1, native_scale=scale).native_scores.amax(dim=1).mean()
        for scale in (1.0, 1024**-0.5)
    ]
    assert highest[0] > 0.8
    assert highest[1] < 0.05


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.5])
def test_attention_that_is_no_attention_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=rf"cls_attention is {value} at patch 2 of sub-image 1 .*cache verify"):
        make_selection([[0.1, 0.2, 0.3], [0.1, 0.2, value]], k=2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("experts", EXPERTS)
def test_fused_tokens_that_are_not_finite_are_refused(value: float, experts: str) -> None:
    message = rf"patch 1 of sub-image 1 of the batch has the dot product {value}: .*not finite in fused\. Check"
    with pytest.raises(ValueError, match=message):
        make_selection([[0.5, 0.5]] * 2, [[0.0, 0.0], [0.0, value]], k=1, experts=experts)


def test_an_instruction_that_is_not_finite_is_refused_and_named() -> None:
    fused, mask, instruction = torch.ones(3, 2, 4), torch.ones(3, 2, dtype=torch.bool), torch.ones(3, 4)
    instruction[2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"patch 0 of sub-image 2 .*not finite in instruction\."):
        select_tokens(fused, instruction, torch.ones(3, 2), mask, k=1)
    fused[2, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"not finite in fused and instruction\."):
        select_tokens(fused, instruction, torch.ones(3, 2), mask, k=1)


def test_a_dot_product_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the dot product inf: finite factors that are too large\."):
        make_selection([[0.5, 0.5]], [[0.0, 3e38]], k=1, native_scale=10)


def test_a_row_without_real_patches_may_hold_anything() -> None:
    nothing = torch.full((1, 2, 3), torch.nan)
    selection = select_tokens(nothing, nothing[:, 0], nothing[..., 0], torch.zeros(1, 2, dtype=torch.bool), k=1)
    assert selection.scores.tolist() == [[0, 0]]
    assert not selection.mask.any()


def test_what_stands_at_padding_is_in_no_gradient() -> None:
    gradients = []
    for value in (0.0, math.nan):
        fused = torch.tensor([[[0.5, 2.0], [1.0, -1.0], [value, value]]], requires_grad=True)
        instruction = torch.tensor([[0.3, 0.4]], requires_grad=True)
        mask = torch.tensor([[True, True, False]])
        select_tokens(fused, instruction, torch.ones(1, 3), mask, k=1).scores[0, 0].backward()
        gradients.append((fused.grad, instruction.grad))
    assert instruction.grad.any()
    assert all(torch.equal(clean, spoilt) for clean, spoilt in zip(*gradients, strict=True))


def test_a_compiled_selection_is_one_graph_and_as_loud() -> None:
    torch.manual_seed(0)
    fused, instruction, attention = torch.randn(2, 6, 4), torch.randn(2, 4), torch.rand(2, 6)
    mask = torch.tensor([[True] * 6, [True] * 5 + [False]])

    def choose(attention: Tensor, fused: Tensor) -> tuple[Tensor, Tensor]:
        selection = select_tokens(fused, instruction, attention, mask, k=3)
        return selection.indices, selection.scores

    # aot_eager: the graph as it would be lowered, without a C++ compiler.
    compiled = torch.compile(choose, fullgraph=True, backend="aot_eager")
    for got, expected in zip(compiled(attention, fused), choose(attention, fused), strict=True):
        torch.testing.assert_close(got, expected)
    third = torch.tensor(2)
    for spoilt in ((attention.index_fill(1, third, -1.0), fused), (attention, fused.index_fill(1, third, torch.nan))):
        with pytest.raises(RuntimeError, match="not finite; run without"):
            compiled(*spoilt)


@st.composite
def mixed_batches(draw: st.DrawFn) -> tuple[list[list[float]], list[list[float]], list[list[bool]]]:
    """Attention, logits and mask of up to 4 sub-images of up to 12 patches; few different values, so that ties abound."""
    num_patches = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    most = max(num_patches)

    def rows(values: list[float]) -> list[list[float]]:
        return draw(
            st.lists(
                st.lists(st.sampled_from(values), min_size=most, max_size=most),
                min_size=len(num_patches),
                max_size=len(num_patches),
            )
        )

    mask = [[patch < count for patch in range(most)] for count in num_patches]
    return rows([0.0, 0.125, 0.25, 0.5, 1.0, 7.0]), rows([-3.0, 0.0, 0.5, 1.0, 2.0]), mask


@settings(max_examples=150, deadline=None)
@given(
    batch=mixed_batches(), k=st.integers(1, 14), experts=st.sampled_from(EXPERTS), weight=st.sampled_from([0.0, 0.2])
)
def test_any_batch_keeps_the_best_of_each_sub_image(batch: Any, k: int, experts: str, weight: float) -> None:
    attention, logits, mask = batch
    options = {"k": k, "experts": experts, "native_weight": torch.tensor(weight)}
    selection = make_selection(attention, logits, mask, **options)
    assert selection.indices.shape == selection.mask.shape == (len(mask), min(k, len(mask[0])))
    for number, row in enumerate(mask):
        num_patches, scores = sum(row), selection.scores[number].tolist()
        num_kept = min(k, num_patches)
        assert selection.mask[number].tolist() == [slot < num_kept for slot in range(selection.mask.shape[1])]
        kept = selection.indices[number, :num_kept].tolist()
        # Sorted by score, then by index; what is kept stands in map order.
        best = sorted(range(num_patches), key=lambda patch: (-scores[patch], patch))[:num_kept]
        assert kept == sorted(best)
        alone = make_selection([attention[number][:num_patches]], [logits[number][:num_patches]], **options)
        assert alone.indices[0].tolist() == kept
        assert alone.scores[0].tolist() == pytest.approx(scores[:num_patches])


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
    ("options", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": 2.5}, "k is 2.5"),
        ({"k": 2, "visual_weight": 1.5}, "visual_weight is 1.5"),
        ({"k": 2, "experts": "both"}, "visual_native, visual, native"),
        ({"k": 2, "native_scale": 0}, "native_scale is 0; it must be a finite number above 0"),
        ({"k": 2, "native_scale": -1.0}, "native_scale is -1.0"),
        ({"k": 2, "native_scale": math.nan}, "native_scale is nan"),
        ({"k": 2, "native_scale": math.inf}, "native_scale is inf"),
        ({"k": 2, "native_scale": "1"}, "native_scale is '1'"),
        ({"k": 2, "native_scale": True}, "native_scale is True"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_selection([[0.5, 0.5]], **options)

"""What is counted of a selection, on cases worked by hand."""

import math

import pytest
import torch

from meteor.projector.statistics import NUM_SUMS, SelectionSums, mean_selection, sum_selection


def make_sums(visual: list[list[float]], native: list[list[float]], num_patches: list[int], *, k: int) -> SelectionSums:
    visual_BP = torch.tensor(visual)
    mask_BP = torch.arange(visual_BP.shape[1]) < torch.tensor(num_patches)[:, None]
    sums = sum_selection(visual_BP, torch.tensor(native), mask_BP, k=k)
    assert sums.shape == (NUM_SUMS,)
    assert sums.dtype == torch.float32
    return SelectionSums(*sums)


def test_entropies_are_in_nats_and_sum_over_sub_images() -> None:
    # Halves: ln 2. Certain: 0, and 0 log 0 is 0. Quarters: ln 4. An eighth twice, a quarter, a half: 1.75 ln 2.
    sums = make_sums(
        [[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]], [[1.0, 0.0, 0.0, 0.0], [0.125, 0.125, 0.25, 0.5]], [2, 4], k=4
    )
    assert float(sums.num_sub_images) == 2
    assert float(sums.visual_entropy) == pytest.approx(math.log(2) + math.log(4))
    assert float(sums.native_entropy) == pytest.approx(1.75 * math.log(2))


def test_experts_disagree_about_the_tokens_that_only_one_of_them_would_keep() -> None:
    # Visual keeps 0 and 1, native 1 and 2: one of two. In the second both keep 0 and 3: none of two.
    sums = make_sums(
        [[0.4, 0.3, 0.2, 0.1], [0.4, 0.1, 0.1, 0.4]], [[0.1, 0.3, 0.4, 0.2], [0.3, 0.2, 0.2, 0.3]], [4, 4], k=2
    )
    assert (float(sums.num_disagreements), float(sums.num_chosen)) == (1, 4)


def test_ties_go_to_the_lower_index_as_in_the_selection() -> None:
    # All equal: 0 and 1. Native: 2 and, of the equal others, 0.
    sums = make_sums([[0.25] * 4], [[0.2, 0.2, 0.4, 0.2]], [4], k=2)
    assert float(sums.num_disagreements) == 1


def test_sub_images_that_keep_all_their_patches_have_no_share_in_the_disagreement() -> None:
    # Of the three only the last has more than two patches; its experts share nothing.
    sums = make_sums(
        [[1.0, 0.0, 0.0, 0.0], [0.9, 0.1, 0.0, 0.0], [0.4, 0.4, 0.1, 0.1]],
        [[1.0, 0.0, 0.0, 0.0], [0.1, 0.9, 0.0, 0.0], [0.1, 0.1, 0.4, 0.4]],
        [1, 2, 4],
        k=2,
    )
    assert float(sums.num_sub_images) == 3
    assert (float(sums.num_disagreements), float(sums.num_chosen)) == (2, 2)


def test_padding_and_rows_without_patches_count_for_nothing() -> None:
    # Padding that ranks first, and a row of nothing but padding.
    sums = make_sums(
        [[0.5, 0.3, 0.2, 9.0], [9.0, math.nan, 9.0, 9.0]], [[0.5, 0.2, 0.3, math.nan], [9.0] * 4], [3, 0], k=1
    )
    assert float(sums.num_sub_images) == 1
    assert float(sums.visual_entropy) == pytest.approx(-sum(p * math.log(p) for p in (0.5, 0.3, 0.2)))
    assert (float(sums.num_disagreements), float(sums.num_chosen)) == (0, 1)


@pytest.mark.parametrize("max_patches", [0, 5])
def test_an_empty_batch_adds_zeros(max_patches: int) -> None:
    nothing = torch.zeros(0, max_patches)
    assert sum_selection(nothing, nothing, nothing.bool(), k=2).tolist() == [0] * NUM_SUMS


def test_sums_of_parts_add_up_to_those_of_the_whole() -> None:
    torch.manual_seed(0)
    visual, native = (torch.rand(5, 9).softmax(dim=1) for _ in range(2))
    mask = torch.ones(5, 9, dtype=torch.bool)
    parts = [sum_selection(visual[part], native[part], mask[part], k=4) for part in (slice(2), slice(2, 5), slice(0))]
    torch.testing.assert_close(sum(parts), sum_selection(visual, native, mask, k=4))


def test_sums_carry_no_gradient_and_compile_to_one_graph() -> None:
    arguments = (*(torch.rand(2, 6, requires_grad=True) for _ in range(2)), torch.ones(2, 6, dtype=torch.bool))
    compiled = torch.compile(sum_selection, fullgraph=True, backend="aot_eager")
    expected = sum_selection(*arguments, k=2)
    assert not expected.requires_grad
    torch.testing.assert_close(compiled(*arguments, k=2), expected)


def test_means_are_over_sub_images_and_over_the_tokens_kept_by_choice() -> None:
    assert mean_selection(torch.tensor([4.0, 6.0, 2.0, 3.0, 12.0])) == {
        "visual_entropy": 1.5,
        "native_entropy": 0.5,
        "expert_disagreement": 0.25,
    }


def test_a_mean_of_nothing_is_left_out() -> None:
    assert mean_selection(torch.zeros(NUM_SUMS)) == {}
    assert mean_selection(torch.tensor([2.0, 1.0, 3.0, 0.0, 0.0])) == {"visual_entropy": 0.5, "native_entropy": 1.5}

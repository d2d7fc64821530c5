from dataclasses import replace

import numpy as np
import pytest
import torch

from meteor.evaluation.selection import select_patches


def best(scores, k):
    """The k highest, ties to the lower index, in map order: by sorting pairs."""
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return sorted(ranked[:k])


@pytest.mark.parametrize("experts", ["visual_native", "visual", "native"])
@pytest.mark.parametrize("sliced", [True, False])
def test_the_combined_scores_are_those_that_the_kept_patches_were_chosen_by(make_model, make_features, experts, sliced):
    model = make_model({"name": "meteor", "k": 3, "experts": experts, "visual_weight": 0.7}).eval()
    with torch.no_grad():
        model.projector.instruction.mul_(200)  # or the native scores would be nearly even
    image = make_features("a", sliced=sliced, seed=4)
    selected = select_patches(model.projector, image, select_layer=-2)
    assert [len(patches.combined) for patches in selected] == [rows * columns for rows, columns in image.patch_grids]
    share = {"visual_native": 0.7, "visual": 1, "native": 0}[experts]
    for patches, attention in zip(selected, image.cls_attention, strict=True):
        row = attention[0].numpy()
        np.testing.assert_allclose(patches.visual, row / row.sum(), rtol=1e-5)
        assert patches.native.sum() == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(patches.combined, share * patches.visual + (1 - share) * patches.native, rtol=1e-5)
        assert patches.kept.tolist() == best(patches.combined.tolist(), 3)


def test_a_sub_image_gets_the_same_scores_beside_larger_ones(make_model, make_features):
    model = make_model({"name": "meteor", "k": 3}).eval()
    image = make_features("a", seed=4)  # 2 x 4
    both = replace(
        image,
        grid=(1, 1),
        patch_grids=((1, 2), *image.patch_grids),
        features=[image.features[0][:2], *image.features],
        cls_attention=[image.cls_attention[0][:, :2], *image.cls_attention],
        cls=image.cls.repeat(2, 1),
    )
    (alone,), (small, beside) = (
        select_patches(model.projector, image, select_layer=-2),
        select_patches(model.projector, both, select_layer=-2),
    )
    np.testing.assert_allclose(beside.combined, alone.combined, rtol=1e-5)
    assert beside.kept.tolist() == alone.kept.tolist()
    assert (len(small.combined), small.kept.tolist()) == (2, [0, 1])


def test_a_projector_that_does_not_select_keeps_every_patch_and_has_no_scores(make_model, make_features):
    (patches, *_) = select_patches(
        make_model({"name": "mlp"}).projector, make_features("a", sliced=True), select_layer=-2
    )
    assert (patches.visual, patches.native, patches.combined) == (None, None, None)
    assert patches.kept.tolist() == list(range(6))

"""Properties of the whole Meteor projector: isolation, padding, gradients, dtypes, empty batches."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from meteor.errors import SettingsError
from meteor.projector import Projector, ProjectorOutput, build_projector

VARIANTS = [
    {},
    {"scan": "single"},
    {"scan": "both", "window": 5},
    {"local": "conv"},
    {"selection_gradient": "straight_through"},
    {"experts": "native"},
]
GRIDS = [(4, 5), (1, 7), (6, 2), (1, 1), (3, 3)]


def make_projector(name: str = "meteor", *, llm_width: int = 24, **settings: Any) -> Projector:
    torch.manual_seed(0)
    return build_projector(name, **{"vision_width": 16, "llm_width": llm_width, "k": 5, "state_size": 4} | settings)


def project(projector: Projector, batch: Any, **arguments: Any) -> ProjectorOutput:
    return projector(batch.features, batch.cls_attention, batch.grids, **arguments)


@pytest.mark.parametrize("name", ["meteor", "meteor_37m"])
@pytest.mark.parametrize("settings", VARIANTS)
def test_a_mixed_batch_equals_each_sub_image_alone(
    name: str, settings: dict[str, Any], make_sub_images: Callable[..., Any]
) -> None:
    projector = make_projector(name, **settings)
    batch = make_sub_images(*GRIDS)
    together = project(projector, batch)
    for number, count in enumerate(batch.num_patches):
        alone = project(projector, batch.alone(number))
        num_kept = min(5, count)
        assert together.mask[number].sum() == num_kept
        assert together.indices[number, :num_kept].tolist() == alone.indices[0].tolist()
        torch.testing.assert_close(together.tokens[number, :num_kept], alone.tokens[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together.native_scores[number, :count], alone.native_scores[0], atol=1e-5, rtol=1e-5)
        assert (together.tokens[number, num_kept:] == 0).all()


@pytest.mark.parametrize("name", ["meteor", "meteor_37m"])
@pytest.mark.parametrize("settings", VARIANTS)
def test_what_stands_at_padding_changes_neither_results_nor_gradients(
    name: str, settings: dict[str, Any], make_sub_images: Callable[..., Any]
) -> None:
    projector = make_projector(name, **settings)
    batch = make_sub_images((2, 2), (3, 4), (1, 1), max_patches=15)
    results = []
    for value in (0.0, torch.nan, torch.inf):
        projector.zero_grad()
        output = project(projector, batch.with_padding(value))
        output.tokens.square().sum().backward()
        results.append([output.tokens, output.native_scores, *(parameter.grad for parameter in projector.parameters())])
    for other in results[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(results[0], other, strict=True))


@pytest.mark.parametrize("name", ["meteor", "meteor_37m"])
@pytest.mark.parametrize("settings", VARIANTS)
def test_every_parameter_gets_a_gradient(
    name: str, settings: dict[str, Any], make_sub_images: Callable[..., Any]
) -> None:
    projector = make_projector(name, **settings)
    project(projector, make_sub_images(*GRIDS)).tokens.square().sum().backward()
    without = [key for key, parameter in projector.named_parameters() if parameter.grad is None]
    zero = [key for key, parameter in projector.named_parameters() if not parameter.grad.any()]
    assert without == zero == []


@pytest.mark.parametrize("max_patches", [0, 6])
@pytest.mark.parametrize("name", ["meteor", "meteor_37m"])
@pytest.mark.parametrize("settings", VARIANTS)
def test_an_empty_batch_gives_every_parameter_a_zero_gradient(
    name: str, settings: dict[str, Any], max_patches: int
) -> None:
    projector = make_projector(name, **settings)
    output = projector(
        torch.zeros(0, max_patches, 16), torch.zeros(0, max_patches), torch.zeros(0, 2, dtype=torch.long)
    )
    assert output.tokens.shape == (0, min(5, max_patches), 24)
    assert output.mask.shape == output.indices.shape == output.tokens.shape[:2]
    assert output.native_scores.shape == (0, max_patches)
    output.tokens.sum().backward()
    assert all((parameter.grad == 0).all() for parameter in projector.parameters())


def test_one_sub_image_does_not_see_another(make_sub_images: Callable[..., Any]) -> None:
    projector = make_projector()
    batch = make_sub_images((3, 3), (3, 3))
    features = batch.features.requires_grad_()
    projector(features, batch.cls_attention, batch.grids).tokens[0].sum().backward()
    assert features.grad[0].abs().sum(dim=-1).gt(0).all()
    assert not features.grad[1].any()


def test_the_straight_through_gradient_changes_gradients_and_no_value(make_sub_images: Callable[..., Any]) -> None:
    batch = make_sub_images((3, 3), (3, 4))
    plain, through = make_projector(), make_projector(selection_gradient="straight_through")
    outputs = [project(projector, batch) for projector in (plain, through)]
    assert torch.equal(outputs[0].tokens, outputs[1].tokens)
    for output in outputs:
        output.tokens.square().sum().backward()
    assert not torch.allclose(plain.instruction.grad, through.instruction.grad)


@pytest.mark.parametrize("gradient", ["none", "straight_through"])
def test_only_the_straight_through_gradient_reaches_ins_by_way_of_the_scores(
    gradient: str, make_sub_images: Callable[..., Any]
) -> None:
    projector = make_projector(selection_gradient=gradient, experts="native")
    # With this gone the scan writes nothing, and INS can only be felt through the native scores.
    torch.nn.init.zeros_(projector.fusion.ssm.out_proj.weight)
    project(projector, make_sub_images((3, 3))).tokens.square().sum().backward()
    assert bool(projector.instruction.grad.any()) == (gradient == "straight_through")


def test_the_warm_ups_weight_reaches_the_selection(make_sub_images: Callable[..., Any]) -> None:
    batch = make_sub_images((5, 5))
    projector = make_projector()
    with torch.no_grad():
        projector.instruction.mul_(100)
    cold = project(projector, batch, native_weight=torch.tensor(0.0))
    assert torch.equal(cold.indices, project(make_projector(experts="visual"), batch).indices)
    full = project(projector, batch, native_weight=torch.tensor(0.2))
    assert torch.equal(full.indices, project(projector, batch).indices)
    assert not torch.equal(cold.indices, full.indices)


def test_the_native_scale_reaches_the_selection(make_sub_images: Callable[..., Any]) -> None:
    batch, (plain, scaled) = make_sub_images((5, 5)), (make_projector(), make_projector(native_scale=0.25))
    # NS ~ exp(<F, INS>): a quarter of the dot product is the fourth root, once normalised.
    roots = project(plain, batch).native_scores ** 0.25
    torch.testing.assert_close(project(scaled, batch).native_scores, roots / roots.sum())
    assert scaled.settings["native_scale"] == 0.25
    assert plain.settings["native_scale"] == 1


def test_a_native_scale_out_of_range_is_refused_when_building() -> None:
    with pytest.raises(SettingsError, match=r"native_scale is 0\.0; it must be a finite number above 0"):
        make_projector(native_scale=0.0)


@pytest.mark.parametrize("name", ["meteor", "meteor_37m"])
def test_values_that_are_not_finite_are_refused_with_their_sub_image(
    name: str, make_sub_images: Callable[..., Any]
) -> None:
    projector, batch = make_projector(name), make_sub_images(*GRIDS)
    batch.features[2, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"sub-image 2 of the batch .*not finite in fused"):
        project(projector, batch)
    batch = make_sub_images(*GRIDS)
    batch.cls_attention[1, 3] = -1
    with pytest.raises(ValueError, match=r"cls_attention is -1\.0 at patch 3 of sub-image 1"):
        project(projector, batch)


def test_scores_are_given_out_without_gradient(make_sub_images: Callable[..., Any]) -> None:
    output = project(make_projector(selection_gradient="straight_through"), make_sub_images((3, 3)))
    assert not output.visual_scores.requires_grad
    assert not output.native_scores.requires_grad
    assert output.aux_loss is None
    torch.testing.assert_close(output.native_scores.sum(dim=1), torch.ones(1))


@pytest.mark.parametrize("name", ["meteor", "meteor_37m"])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("features", [torch.bfloat16, torch.float16, torch.float32])
def test_features_of_any_dtype_give_finite_tokens_in_the_weights_dtype(
    name: str, weights: torch.dtype, features: torch.dtype, make_sub_images: Callable[..., Any]
) -> None:
    projector = make_projector(name).to(weights)
    output = project(projector, make_sub_images(*GRIDS, dtype=features))
    assert output.tokens.dtype == weights
    assert output.visual_scores.dtype == output.native_scores.dtype == torch.float32
    output.tokens.float().square().sum().backward()
    assert output.tokens.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in projector.parameters())


def test_autocast_gives_finite_tokens(make_sub_images: Callable[..., Any]) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = project(make_projector(scan="both"), make_sub_images(*GRIDS))
    assert output.tokens.isfinite().all()
    assert output.native_scores.dtype == torch.float32


def test_two_runs_give_the_same_tokens_and_gradients(make_sub_images: Callable[..., Any]) -> None:
    runs = []
    for _ in range(2):
        projector = make_projector(scan="both")
        output = project(projector, make_sub_images(*GRIDS))
        output.tokens.square().sum().backward()
        runs.append([output.tokens, *(parameter.grad for parameter in projector.parameters())])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))

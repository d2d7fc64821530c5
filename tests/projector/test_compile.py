"""torch.compile of the whole projector: one graph, a second one for any batch, and the numbers of the plain chunked scan."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from meteor.projector import build_projector
from meteor.projector.output import ProjectorOutput

SETTINGS = [
    {"name": "meteor", "scan_backend": "chunked"},
    pytest.param(
        {"name": "meteor_37m", "scan_backend": "chunked", "local": "conv", "native_scale": 0.25},
        marks=pytest.mark.slow,
    ),
    pytest.param(
        {"name": "meteor", "scan_backend": "triton", "selection_gradient": "straight_through"},
        marks=[pytest.mark.skipif(not find_spec("triton"), reason="triton is not installed"), pytest.mark.slow],
    ),
]
# The first batch's sizes are constants of the first graph, and variables of the second.
BATCHES = [((1, 3), (1, 1)), ((2, 2), (1, 2), (1, 3)), ((1, 5), (2, 1), (2, 2), (1, 1))]


def outputs_and_gradients(
    run: Callable[..., ProjectorOutput], batch: Any, parameters: dict[str, Tensor]
) -> dict[str, Tensor]:
    output = run(batch.features, batch.cls_attention, batch.grids, native_weight=torch.tensor(0.1))
    gradients = torch.autograd.grad(output.tokens.square().sum(), list(parameters.values()))
    outputs = {"tokens": output.tokens, "native": output.native_scores, "visual": output.visual_scores}
    return outputs | {"indices": output.indices} | dict(zip(parameters, gradients, strict=True))


def require_the_same(settings: dict[str, Any], make_sub_images: Callable[..., Any], backend: str) -> int:
    """The number of graphs that it took."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    projector, truth = (
        build_projector(vision_width=16, llm_width=24, k=2, state_size=4, **each)
        # Triton's kernels are interpreted on the CPU, where a second pass through them would take half of the test's time.
        for each in (settings, {**settings, "scan_backend": "chunked"})
    )
    truth.load_state_dict(projector.state_dict())
    graphs: list[torch.fx.GraphModule] = []

    def lower(graph: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, example_inputs)

    compiled = torch.compile(projector, fullgraph=True, backend=lower)
    for batch in (make_sub_images(*grids) for grids in BATCHES):
        got = outputs_and_gradients(compiled, batch, dict(projector.named_parameters()))
        for name, expected in outputs_and_gradients(truth, batch, dict(truth.named_parameters())).items():
            torch.testing.assert_close(
                got[name], expected, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )
    return len(graphs)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_projector_is_one_graph_for_any_batch_with_the_same_numbers(
    settings: dict[str, Any], make_sub_images: Callable[..., Any]
) -> None:
    # The graphs of forward and backward as they would be lowered, without generating code.
    assert require_the_same(settings, make_sub_images, "aot_eager") == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch's own, where it generates code
@pytest.mark.parametrize("settings", SETTINGS)
def test_generated_code_gives_the_same_numbers(settings: dict[str, Any], make_sub_images: Callable[..., Any]) -> None:
    # The generator itself tells apart a few ranges of sizes.
    assert require_the_same(settings, make_sub_images, "inductor") <= 3

"""Projector FLOPs: the scan by hand, the rest as torch counts it, whatever the backend."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from meteor.projector import build_projector
from meteor.projector.flops import count_projector_flops
from meteor.projector.registry import PROJECTORS

WIDTH, LLM_WIDTH, GRIDS = 16, 24, torch.tensor([[4, 6], [6, 4]])


def count(name, **settings):
    torch.manual_seed(0)
    projector = build_projector(name, vision_width=WIDTH, llm_width=LLM_WIDTH, **settings)
    return count_projector_flops(projector, torch.randn(2, 24, WIDTH), torch.rand(2, 24), GRIDS)


def test_the_mlp_has_two_matrices_per_patch():
    assert count("mlp") == 2 * 48 * (WIDTH * LLM_WIDTH + LLM_WIDTH**2)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_meteor_is_projections_scan_and_the_mlp_on_kept_tokens(backend):
    """The scan visits 24 summaries, 24 tokens and INS in each direction; Delta's rank is 1 and the state 2."""
    step = 2 * WIDTH * (2 * 4 + 2 * (1 + 2 * 2) + 2 * 1 + 9 * 2 + 2)
    fusion = 2 * (25 * 2 * (WIDTH * 2 * WIDTH + WIDTH * WIDTH) + 49 * step)
    head = 2 * 2 * 5 * (WIDTH * LLM_WIDTH + LLM_WIDTH**2)
    assert count("meteor", k=5, state_size=2, scan_backend=backend) == fusion + head


@pytest.mark.parametrize("name", [name for name in PROJECTORS if not name.startswith("meteor")])
def test_projectors_without_a_scan_count_as_torch_counts_them(name):
    projector = build_projector(name, vision_width=WIDTH, llm_width=LLM_WIDTH)
    features, attention = torch.randn(2, 24, WIDTH), torch.rand(2, 24)
    # torch does not count the CPU's fused attention.
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        projector(features, attention, GRIDS)
    assert count_projector_flops(projector, features, attention, GRIDS) == counter.get_total_flops() > 0

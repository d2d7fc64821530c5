"""The plan's arithmetic against torch's own count of operations, and costs worked by hand."""

from pathlib import Path

import pytest
import torch
from eager_towers import TINY, eager, make_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from meteor.config.settings import VisionSettings
from meteor.planning.cache_cost import FLOPS_PER_PARAMETER, CacheCost, StageCost, estimate_stage
from meteor.planning.survey import encoder_shape
from meteor.vision.flops import EncoderShape


@pytest.mark.parametrize("patches", [(4, 4), (2, 7)])
def test_encoder_operations_are_those_that_torch_counts(patches: tuple[int, int]) -> None:
    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=56, patch_size=14
    )
    # Attention spelled out: the count misses the fused kernel of the CPU.
    model = CLIPVisionModel._from_config(config, attn_implementation="eager").eval()
    pixels = torch.zeros(1, 3, *(14 * side for side in patches))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixels, interpolate_pos_encoding=True)
    shape = EncoderShape(width=32, mlp_width=48, num_blocks=3, patch_size=14)
    assert shape.flops(patches[0] * patches[1]) == counter.get_total_flops()


@pytest.mark.parametrize("name", ["siglip", "siglip2_naflex", "dinov2_registers", "dinov3", "dinov3_gated"])
def test_operations_of_other_encoders_are_those_that_torch_counts(name: str, tmp_path: Path) -> None:
    config_class, shape = TINY[name]
    # Without the pooling head, which the estimate leaves out.
    model = make_model(config_class(**shape, **({"vision_use_head": False} if "siglip" in name else {})))
    model.config.save_pretrained(tmp_path)
    with FlopCounterMode(display=False) as counter:
        eager(model, [torch.zeros(3, 2 * model.config.patch_size, 7 * model.config.patch_size)])
    layers = {"select_layer": -1, "attention_layers": (-1,), "importance": "attention_received"}
    assert encoder_shape(VisionSettings(path=str(tmp_path), **layers)).flops(14) == counter.get_total_flops()


def test_the_pooling_query_needs_the_blocks_after_the_selected_layer(tmp_path: Path) -> None:
    config_class, shape = TINY["siglip"]
    config_class(**shape).save_pretrained(tmp_path)
    assert encoder_shape(VisionSettings(path=str(tmp_path))).num_blocks == 4
    assert encoder_shape(VisionSettings(path=str(tmp_path), importance="attention_received")).num_blocks == 3


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_llm_operations_are_those_that_torch_counts_for_its_linear_layers(stage: str) -> None:
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).requires_grad_(stage == "finetune")
    num_parameters = (
        sum(p.numel() for p in model.parameters() if p.dim() == 2) - model.model.embed_tokens.weight.numel()
    )
    num_tokens = 11
    inputs = torch.zeros(1, num_tokens, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=inputs).logits.sum().backward()
    linear = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    plan = estimate_stage(
        stage,
        {(2, 2): 1},
        num_samples=1,
        encoder=EncoderShape(8, 8, 1, 14),
        epochs=3,
        flops_per_parameter=FLOPS_PER_PARAMETER[stage],
        num_llm_parameters=num_parameters,
        num_visual_tokens=4,
        num_text_tokens=7.0,
    )
    assert plan.llm_flops == 3 * linear


def test_a_stage_counts_an_image_as_often_as_samples_show_it() -> None:
    shape = EncoderShape(8, 16, 2, 14)
    stage = estimate_stage(
        "pretrain",
        {(2, 2): 3, (1, 3): 3},
        num_samples=3,
        encoder=shape,
        epochs=2,
        flops_per_parameter=FLOPS_PER_PARAMETER["pretrain"],
        num_llm_parameters=10,
        num_visual_tokens=21,
        num_text_tokens=9,
    )
    assert (stage.num_samples, stage.num_sub_images) == (3, 6)
    assert stage.encoder_flops == 2 * 3 * (shape.flops(4) + shape.flops(3))
    assert stage.encoder_share == stage.encoder_flops / (stage.encoder_flops + 2 * 4 * 10 * 30)


def make_plan(**changes: object) -> CacheCost:
    fields = {
        "num_images": 12,
        "num_distinct": 10,
        "num_unindexed": 0,
        "num_unusable": 1,
        "num_cached": 4,
        "num_sub_images": 50,
        "num_patches": 28_800,
        "encoder_flops": 2e12,
        "codec": "float16",
        "cache_uri": "/caches/0/float16",
        "size_bytes": {"float16": 2_000_000_000, "int8": 1_000_000_000},
        "stages": (StageCost("pretrain", 20, 100, 1, 4e12, 16e12), StageCost("finetune", 20, 100, 1, 4e12, 36e12)),
    }
    return CacheCost(**{**fields, **changes})


def test_costs_and_what_is_avoided_by_hand() -> None:
    content = make_plan().to_dict(rate=25.0, usd_per_gb=0.02, num_runs=3)
    assert content["encoder_seconds"] == 2.0
    assert content["usd_per_month"] == {"float16": 0.04, "int8": 0.02}
    # Three runs encode 8e12 each; encoding once costs 2e12.
    assert content["flops_avoided"] == 22e12
    assert content["share_avoided"] == 22e12 / 180e12
    assert [stage["encoder_share"] for stage in content["stages"]] == [0.2, 0.1]


def test_the_text_says_it_for_people() -> None:
    text = make_plan(num_unindexed=3).to_text(rate=25.0, usd_per_gb=0.02, num_runs=3)
    for part in (
        "12 named, 10 distinct (3 not indexed yet",
        "50 (5.00 per image)",
        "2 GB, 0.04 USD per month at 0.02 USD per GB, this run's codec",
        "2 TFLOP; 2 s at 25 sub-images/s",
        "encoding in the step would be 20.0% of its arithmetic",
        "the cache avoids 22 TFLOP, 12.2% of their total",
    ):
        assert part in text
    assert "--rate would give the time" in make_plan().to_text(rate=None, usd_per_gb=0.02, num_runs=3)


def test_a_plan_without_a_language_model_says_so_and_gives_no_shares() -> None:
    plan = make_plan(stages=(), note="training costs are missing: llm.path='x' cannot be read here")
    assert "share_avoided" not in plan.to_dict(rate=None, usd_per_gb=0.02, num_runs=3)
    assert "cannot be read" in plan.to_text(rate=None, usd_per_gb=0.02, num_runs=3)

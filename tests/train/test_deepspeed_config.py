"""What a run file may say to DeepSpeed, and what is refused with its reason."""

import pytest
import torch

from meteor.errors import SettingsError
from meteor.train.deepspeed_config import deepspeed_config, offloads_optimizer
from meteor.train.engine import make_engine


def configure(options, *, zero_stage=2, dtype=torch.bfloat16):
    return deepspeed_config(options, zero_stage=zero_stage, dtype=dtype, max_grad_norm=0.5)


def test_options_lie_over_ours_and_ours_stay():
    config = configure({"zero_optimization": {"overlap_comm": True}, "wall_clock_breakdown": True}, zero_stage=3)
    assert config["zero_optimization"] == {"overlap_comm": True, "stage": 3}
    assert config["wall_clock_breakdown"]
    assert (config["gradient_clipping"], config["bf16"]) == (0.5, {"enabled": True})
    assert configure({}, dtype=torch.float32)["bf16"] == {"enabled": False}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_batch_size": 8}, "deepspeed.train_batch_size cannot be set: the stage's global_batch_size"),
        ({"gradient_accumulation_steps": 2}, "training plan counts samples"),
        ({"gradient_clipping": 1.0}, "max_grad_norm"),
        ({"optimizer": {"type": "Adam"}}, "one parameter group and weight decay 0"),
        ({"scheduler": {}}, "function of the global step"),
        ({"fp16": {"enabled": True}}, "llm.dtype"),
        (
            {"zero_optimization": {"stage": 3}},
            r"deepspeed.zero_optimization.stage cannot be set: the stage's zero_stage",
        ),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, r"device=nvme: only cpu \(or none\)"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "offload_param needs zero_stage=3, but it is 2"),
    ],
)
def test_what_a_setting_of_ours_says_is_refused_with_the_reason(options, message):
    with pytest.raises(SettingsError, match=message):
        configure(options)


@pytest.mark.parametrize(("device", "offloads"), [("cpu", True), ("none", False)])
def test_offloading_is_recognised(device, offloads):
    assert offloads_optimizer(configure({"zero_optimization": {"offload_optimizer": {"device": device}}})) == offloads
    assert not offloads_optimizer(configure({}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float16}, "float16 is for answering"),
        ({"options": {"zero_optimization": {}}}, "needs zero_stage 1 to 3"),
    ],
)
def test_an_engine_that_would_not_train_is_refused(make_model, change, message):
    settings = {"zero_stage": 0, "dtype": torch.float32, "device": torch.device("cpu"), "max_grad_norm": 1.0}
    with pytest.raises(SettingsError, match=message):
        make_engine(make_model(), **{**settings, **change}, empty_inputs={})

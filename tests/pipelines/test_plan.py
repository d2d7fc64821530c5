"""The plan before a stage starts: what it says, what it refuses, what it advises; and that every run file fits its GPUs."""

from pathlib import Path

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, Qwen3Config, Siglip2VisionConfig, SiglipVisionConfig

from meteor.assembly import Inputs
from meteor.config import RunSettings, load_run
from meteor.errors import SettingsError
from meteor.planning import stage_memory as memory_plan
from meteor.planning.stage_memory import Needs, StageMemory
from pipelines import pretrain

RUNS = sorted(Path("jobs/runs").glob("*.yaml"))
SHAPES = {
    "lmsys/vicuna-7b-v1.5": (4096, 11008, 32, 32, 32),
    "lmsys/vicuna-13b-v1.5": (5120, 13824, 40, 40, 40),
    "TinyLlama/TinyLlama_v1.1": (2048, 5632, 22, 32, 4),
    "Qwen/Qwen3-4B": (2560, 9728, 36, 32, 8),
    "Qwen/Qwen3-0.6B": (1024, 3072, 28, 16, 8),
    # The demo's, small enough for any machine.
    "outputs/demo/models/llm": (64, 128, 2, 4, 4),
    "s3://meteor/models/demo/llm": (64, 128, 2, 4, 4),
}


@pytest.fixture
def from_the_hub(monkeypatch):
    """Configurations of the hub's models, which tests do not reach."""

    def llm(path):
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        shape = dict(zip(names, SHAPES[path], strict=True))
        if path.startswith("Qwen/"):
            return Qwen3Config(vocab_size=151936, head_dim=128, tie_word_embeddings=True, **shape)
        return LlamaConfig(vocab_size=32000, **shape)

    def encoder(path):
        if path == "google/siglip2-so400m-patch14-384":
            shape = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16}
            return SiglipVisionConfig(**shape, num_hidden_layers=27, image_size=384, patch_size=14)
        if path == "google/siglip2-base-patch16-naflex":
            return Siglip2VisionConfig()
        width, layers = (1024, 24) if path.startswith("openai/") else (64, 3)
        shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": 8}
        return CLIPVisionConfig(**shape, num_hidden_layers=layers, image_size=336, patch_size=14)

    monkeypatch.setattr(memory_plan, "read_llm_config", llm)
    monkeypatch.setattr(memory_plan, "read_vision_config", encoder)


def densest(settings):
    """Images and nothing else."""
    return Needs(sub_images=1 / settings.projector.settings.get("k", 576), answer_tokens=1.0)


def test_there_are_run_files_for_both_vicunas_at_all_three_token_counts():
    runs = [load_run(str(file)) for file in RUNS]
    paper = {(run.llm.path, run.projector.settings.get("k")) for run in runs if run.projector.name == "meteor"}
    assert {(f"lmsys/vicuna-{size}-v1.5", k) for size in ("7b", "13b") for k in (144, 64, 32)} < paper


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("file", RUNS, ids=lambda file: file.stem)
def test_every_run_file_fits_into_its_gpus_with_the_densest_samples(from_the_hub, file, stage):
    settings = load_run(str(file))
    memory = StageMemory.of(settings, stage, densest(settings))
    assert memory.fits
    assert not memory.is_tight
    assert (memory.gpu_bytes is not None) == (settings.runtime.gpus_per_worker > 0)
    # The recipe of the paper (section 4.1) where the language model is its own.
    if "vicuna" in settings.llm.path:
        assert (settings.pretrain.lr, settings.pretrain.global_batch_size) == (1e-3, 256)
        assert settings.finetune.global_batch_size == 128
        assert settings.finetune.warmup_ratio == settings.pretrain.warmup_ratio == 0.03


def make_run(**changes):
    content = {"runtime": {"gpus_per_worker": 1, "num_workers": 8, "gpu_memory_gb": 80}, **changes}
    return RunSettings.model_validate(content)


def advise(settings, gpu_memory_gb, stage="finetune"):
    settings = settings.model_copy(
        update={"runtime": settings.runtime.model_copy(update={"gpu_memory_gb": gpu_memory_gb})}
    )
    return StageMemory.of(settings, stage, densest(settings))


def test_the_mildest_changes_that_fit_are_advised(from_the_hub):
    settings = make_run(finetune={"micro_batch_size": 8, "zero_stage": 3})
    assert advise(settings, 80).remedies == ()
    assert advise(settings, 36).remedies == ("finetune.micro_batch_size=4",)
    plain = make_run(finetune={"micro_batch_size": 1, "zero_stage": 0})
    assert advise(plain, 80).remedies == ("finetune.zero_stage=2",)
    assert not advise(plain, 80).fits
    assert "this would fit: finetune.zero_stage=2" in advise(plain, 80).problem()
    (name,) = advise(make_run(finetune={"micro_batch_size": 1, "zero_stage": 3}), 18).remedies
    assert name == 'finetune.deepspeed={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}'
    hopeless = advise(plain, 4)
    assert hopeless.remedies == ()
    assert "no settings tried here make it fit" in hopeless.problem()


def test_the_advice_can_be_put_on_the_command_line(from_the_hub):
    for gpu_memory_gb in (15, 20, 30, 60):
        remedies = advise(make_run(finetune={"zero_stage": 0}), gpu_memory_gb).remedies
        assert remedies
        changed = load_run("jobs/runs/meteor_7b.yaml", ["finetune.zero_stage=0", *remedies])
        assert advise(changed, gpu_memory_gb).fits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("ray_once")
def test_a_dry_run_prints_the_memory_and_a_stage_that_will_not_fit_is_refused_before_it_starts(make_settings, encode):
    settings = make_settings()
    encode(settings)
    text = pretrain.plan(Inputs(settings))
    assert "each step          " in text
    assert "memory of a worker " in text
    assert "on the CPU" in text
    assert "a checkpoint       " in text
    small = make_settings(runtime={"gpus_per_worker": 1, "gpu_memory_gb": 2})
    for start in (pretrain.plan, pretrain.run):
        with pytest.raises(SettingsError, match=r"it will not fit: it needs 2\.\d+ GB on a GPU, which has 2 GB"):
            start(Inputs(small))

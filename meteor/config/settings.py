"""Every setting of a run with its default and its meaning; unknown keys and wrong types are refused.

A field marked `operational` says where or how fast something runs, not what is computed: it stays out of the run digest.
"""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from meteor.stages import TrainingStage


def operational(default: Any, description: str, **constraints: Any) -> Any:
    """A field that does not change the mathematics (see `meteor.config.digest`)."""
    return Field(default, description=description, json_schema_extra={"operational": True}, **constraints)


def setting(default: Any, description: str, **constraints: Any) -> Any:
    return Field(default, description=description, **constraints)


Dtype = Literal["float32", "bfloat16", "float16"]
Fraction = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(gt=0)]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class QuestionSetSettings(_Settings):
    """A benchmark's files, or questions of your own. What is computed is told by their content, not by where they are."""

    format: Literal[
        "llava",
        "textvqa",
        "vqav2",
        "vizwiz",
        "gqa",
        "docvqa",
        "infovqa",
        "chartqa",
        "mmbench",
        "mmvet",
        "mmmu",
        "pope",
        "seed",
        "nlvr",
    ] = setting("llava", "how its files are read, and how its answers are scored")
    path: str = operational(
        ..., "folder with the files as their owners publish them, or one LLaVA JSON / JSONL; local or s3://"
    )
    split: str | None = setting(None, "the benchmark's own offline split if not given")
    ocr: bool = setting(False, "TextVQA: OCR tokens in the prompt, as LLaVA does; about ten points")
    compat: bool = setting(True, "ChartQA: a target of 0 is compared as text, as the reference code does")
    verdicts: str | None = operational(
        None, "MM-Vet: the judge's file on this very model's answers; without it, answers are written for the judge"
    )


class DataSettings(_Settings):
    """Where samples and images are, and which images are refused."""

    roots: dict[str, str] = operational({"": "."}, "image folders: prefix of an image name -> folder or s3:// URI")
    pretrain: str | dict[str, Weight] | None = operational(
        None,
        "LLaVA JSON / JSONL of stage 1; or several, each with the passes over it in an epoch: {a.json: 1, b.json: 0.5}",
    )
    finetune: str | dict[str, Weight] | None = operational(None, "the same of stage 2")
    held_out: dict[TrainingStage, str] = operational(
        {}, "stage -> LLaVA JSON / JSONL whose loss is measured at each checkpoint; the best checkpoint is kept"
    )
    evaluate: dict[str, QuestionSetSettings] = operational(
        {}, "name -> questions to answer and score: {gqa: {format: gqa, path: /data/gqa}}, or the path of a LLaVA file"
    )
    max_aspect_ratio: float = setting(24.0, "an image longer than this, either way, is quarantined", ge=1)
    max_pixels: int = setting(178_956_970, "an image with more pixels is quarantined (a decompression bomb)", gt=0)
    max_bad_share: Fraction = operational(0.01, "the job fails, after publishing, above this share of bad images ...")
    min_bad_images: int = operational(10, "... if at least so many are bad", ge=0)

    @field_validator("evaluate", mode="before")
    @classmethod
    def _a_path_alone_is_a_llava_file(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: {"path": one} if isinstance(one, str) else one for name, one in value.items()}

    def sources(self, stage: TrainingStage) -> dict[str, float]:
        """Annotation file of the stage -> its weight; empty where the run names none."""
        named = getattr(self, stage)
        return dict(named) if isinstance(named, dict) else {named: 1.0} if named else {}


class SlicingSettings(_Settings):
    """LLaVA-UHD's slicing rule."""

    max_slices: int = setting(6, "most slices of an image, the global view not counted", ge=1)
    resolution: int = setting(336, "side in pixels of the square whose area a sub-image has", ge=14)
    patch_size: int = setting(14, "side of a patch in pixels; the encoder's", ge=1)


class VisionSettings(_Settings):
    """The frozen encoder."""

    path: str = operational("openai/clip-vit-large-patch14-336", "CLIP: local directory, s3:// folder or hub id")
    select_layer: int = setting(-2, "which hidden state is cached; LLaVA takes the last but one")
    attention_layers: tuple[int, ...] = setting((-2,), "hidden states whose block's class-token attention is cached")
    dtype: Dtype = setting("bfloat16", "type the encoder computes in")


class CacheSettings(_Settings):
    """The feature cache."""

    uri: str | None = operational(None, "root of the caches; <output>/cache if not given")
    codec: str = setting("float16", "how feature values are stored: float16, bfloat16, float32, int8")
    version: int | None = operational(
        None, "version of the cache to read; the newest when a run starts if not given", ge=1
    )
    index_version: int | None = operational(None, "the same of the dataset index", ge=1)
    rows_per_file: int = operational(
        32,
        "images encoded together and written as one Parquet file (several, of up to 128 MB, if they are large)",
        ge=1,
    )
    commit_every_s: float = operational(300, "seconds between publications while the cache is filled", gt=0)
    prefetch_threads: int = operational(8, "images that a training worker reads at the same time", ge=1)
    prefetch_mb: int = operational(512, "memory of a training worker for images read ahead of their batch", ge=1)
    disk_tier: str | None = operational(
        None, "folder on each node's own disk that keeps what was read from a cache on S3; a local cache needs none"
    )
    disk_tier_gb: float = operational(100, "what the disk tier may take; least recently used images go first", gt=0)


class ProjectorSettings(_Settings):
    """Which projector, and its own settings (`meteor.projector`)."""

    name: str = setting("meteor", "a name of meteor.projector.build_projector")
    settings: dict[str, Any] = setting({}, "arguments of that projector, for example {k: 64}")


class LLMSettings(_Settings):
    """The language model: any Hugging Face causal LM."""

    path: str = operational("lmsys/vicuna-7b-v1.5", "local directory, s3:// folder or hub id")
    dtype: Dtype = setting("bfloat16", "type of the weights while training and answering")
    attention: Literal["auto", "eager", "sdpa", "varlen"] = operational(
        "auto",
        "while training; varlen computes no padding (torch's FlashAttention on CUDA), auto takes it where it runs",
    )
    gradient_checkpointing: bool = operational(True, "recompute activations in the backward pass")
    compile: bool = operational(
        False,
        "torch.compile the decoder's layers while training (not under ZeRO-3); minutes at the start, and a resumed run "
        "agrees with an uninterrupted one to rounding, not bit for bit",
    )


class StageSettings(_Settings):
    """One training stage."""

    lr: float = setting(1e-3, "peak learning rate", gt=0)
    global_batch_size: int = setting(256, "samples per optimiser step, over all workers", ge=1)
    epochs: int = setting(1, "passes over the samples", ge=1)
    warmup_ratio: Fraction = setting(0.03, "share of the steps in which the learning rate rises linearly")
    weight_decay: Literal[0] = setting(0, "0 as in LLaVA; one parameter group under ZeRO-3 allows nothing else")
    max_grad_norm: float = setting(1.0, "gradients are clipped to this norm", gt=0)
    seed: int = setting(0, "seed of the order of samples and of new weights")
    template: Literal["plain", "vicuna_v1", "chat"] = setting("plain", "how turns become text")
    sub_images: Literal["all", "global"] = setting("all", "LLaVA-UHD pretrains on the global view alone: `global`")
    max_length: int = setting(2048, "tokens of a sample, visual ones included; text beyond is cut and counted", ge=8)
    native_warmup: Fraction = setting(0.0, "share of the steps in which the native expert's weight rises from 0")
    aux_loss_coefficient: float = setting(0.01, "weight of the projector's own loss where it has one", ge=0)
    batching: Literal["padded", "grouped", "packed"] = setting(
        "packed",
        "a sample a row (padded); the same with samples of similar length in a batch (grouped); several samples a row of up "
        "to max_length tokens (packed)",
    )
    fraction: float = setting(1.0, "share of the samples to train on: a rehearsal", gt=0, le=1)
    features: Literal["cache", "live"] = setting("cache", "from the cache, or from the encoder inside the worker")
    micro_batch_size: int = operational(
        16, "rows of one forward pass on one worker: samples, or with `packed` rows of max_length tokens", ge=1
    )
    zero_stage: Literal[0, 1, 2, 3] = operational(2, "DeepSpeed's ZeRO stage")
    deepspeed: dict[str, Any] = operational(
        {}, "part of DeepSpeed's own configuration: {zero_optimization: {offload_optimizer: {device: cpu}}}"
    )
    checkpoint_every_minutes: float = operational(30, "minutes between checkpoints; written beside the training", gt=0)
    checkpoint_every_steps: int | None = operational(None, "a checkpoint after so many steps as well", ge=1)
    keep_checkpoints: int = operational(2, "how many of the newest checkpoints stay, besides the best", ge=1)


class PretrainSettings(StageSettings):
    """Stage 1: the projector alone learns from captions (paper, section 4.1)."""

    native_warmup: Fraction = setting(0.3, "share of the steps in which the native expert's weight rises from 0")


class LoraSettings(_Settings):
    """Small matrices beside the language model's linear layers, trained in its place."""

    rank: int = setting(128, "of the matrices", ge=1)
    alpha: float = setting(256, "scale: what they add is multiplied by alpha / rank", gt=0)
    dropout: float = setting(
        0.05, "share of their inputs that a step leaves out; which, depends on the number of workers", ge=0, lt=1
    )


class TextSamplerSettings(_Settings):
    """FocusLLaVA-style: a middle layer of the language model drops visual tokens that the question does not look at."""

    layer: int | None = setting(
        None, "the layer whose attention decides, from 0; half of the layers if not given", ge=0
    )
    keep: float = setting(0.75, "share of each image's visual tokens that later layers see", gt=0, le=1)


class FinetuneSettings(StageSettings):
    """Stage 2: projector and language model learn from instructions (paper, section 4.1)."""

    lr: float = setting(2e-5, "peak learning rate", gt=0)
    global_batch_size: int = setting(128, "samples per optimiser step, over all workers", ge=1)
    template: Literal["plain", "vicuna_v1", "chat"] = setting("vicuna_v1", "how turns become text")
    micro_batch_size: int = operational(
        4, "rows of one forward pass on one worker: samples, or with `packed` rows of max_length tokens", ge=1
    )
    zero_stage: Literal[0, 1, 2, 3] = operational(3, "DeepSpeed's ZeRO stage")
    lora: LoraSettings | None = setting(
        None, "train adapters in place of the language model's weights; LLaVA's recipe is {} with lr=2e-4"
    )
    text_sampler: TextSamplerSettings | None = setting(
        None, "drop visual tokens inside the language model, in training and in answers: {} for FocusLLaVA-style"
    )
    pretrained: str | None = operational(None, "URI of the stage-1 projector; this run's own stage 1 if not given")


class EvaluateSettings(_Settings):
    """Answering and scoring."""

    max_new_tokens: int | None = setting(
        None,
        "longest answer; each benchmark's own if not given: 16 or 32 for short ones, 128 for MM-Vet and MMMU",
        ge=1,
    )
    long_side: int | None = setting(
        None,
        "LLaVA-UHD's released evaluation resizes images to a long side of 1024 first; as they are if not given",
        ge=14,
    )
    template: Literal["vicuna_v1", "chat"] = setting("vicuna_v1", "how the question becomes a prompt")
    limit: int | None = setting(None, "answer only so many questions of a set")
    batch_size: int = operational(16, "questions answered together", ge=1)
    model: str | None = operational(None, "a finished model directory; this run's own stage 2 if not given")
    features: Literal["cache", "live"] = setting("cache", "from the cache, or encoded on the fly")


class ReportSettings(_Settings):
    """What the report shows."""

    num_figures: int = operational(4, "images whose selection is drawn", ge=0)
    compare: tuple[str, ...] = operational((), "other run files whose results stand beside this run's")


class RuntimeSettings(_Settings):
    """How many processes, with what. Nothing here changes a result."""

    ray_address: str | None = operational(None, "an existing cluster; RAY_ADDRESS or a local Ray if not given")
    num_workers: int = operational(1, "training workers", ge=1)
    cpus_per_worker: float = operational(1, "CPU cores of a training worker", gt=0)
    gpus_per_worker: float = operational(0, "GPUs of a training worker", ge=0)
    gpu_memory_gb: float | None = operational(
        None,
        "memory of a GPU, with which the plan is compared before training starts; the one of the starting machine if not given",
        gt=0,
    )
    peak_tflops: float | None = operational(
        None, "TFLOP/s of a training worker's device, for the MFU; dense bfloat16 of the usual GPUs if not given", gt=0
    )
    wait_for_nodes_minutes: float = operational(
        15, "minutes that a stage waits for nodes if the cluster is too small for its workers; 0 stops at once", ge=0
    )
    max_failures: int = operational(2, "restarts of the worker group before a stage gives up", ge=0)
    num_encoders: int = operational(1, "encoder actors", ge=1)
    cpus_per_encoder: float = operational(1, "CPU cores of an encoder actor", gt=0)
    gpus_per_encoder: float = operational(0, "GPUs of an encoder actor; fractions share one", ge=0)
    batches_per_encoder: int = operational(
        3,
        "batches of cache.rows_per_file an encoder holds: one is encoded, the others written; more for a far store",
        ge=1,
    )
    encoder_max_tokens: int | None = operational(
        None, "patches that go through the encoder at once; by the device's free memory if not given", ge=1
    )
    num_evaluators: int = operational(1, "answering actors", ge=1)


class TrackingSettings(_Settings):
    """MLflow."""

    uri: str | None = operational(None, "tracking server; MLFLOW_TRACKING_URI or SQLite under <output> if not given")
    experiment: str = operational("llava-meteor", "experiment name")
    study: str | None = operational(None, "the study that this run is a variant of: its run in MLflow is the parent")
    used_by: tuple[str, ...] = operational(
        (), "variants of the study that share these stages: they are the study's own children then"
    )


class StudyTableSettings(_Settings):
    """A table of a study's report."""

    variants: tuple[str, ...] = operational((), "its rows, in this order; `*` stands for any letters; all if not given")
    control: str | None = operational(None, "the variant that differences are taken from; the first row if not given")
    paper: Literal[1, 2, 3, 4] | None = operational(None, "the paper's table whose rows stand beside ours")


class StudySettings(_Settings):
    """Variants of the run, for `python -m pipelines.ablate`."""

    variants: dict[str, dict[str, Any]] = operational(
        {}, "name -> changes, by dotted name: {single_scan: {projector.settings.scan: single}, as_it_is: {}}"
    )
    grid: dict[str, list[Any]] = operational({}, "setting -> values; every combination, of every named variant")
    seeds: tuple[int, ...] = operational((), "each variant is trained with each of them; the run's own if not given")
    tables: dict[str, StudyTableSettings] = operational({}, "title -> which variants, against which")
    parallel: int | None = operational(
        None, "variants that run at the same time; as many as there are CPUs and GPUs for if not given", ge=1
    )
    measure_questions: int = operational(
        16, "questions with which memory and the speed of answers are measured after training; 0 leaves it out", ge=0
    )


class RunSettings(_Settings):
    """A whole run: one YAML file under jobs/runs/."""

    name: str = operational("run", "name of the run and of its variant in reports", pattern=r"^[A-Za-z0-9._-]+$")
    output: str = operational("outputs", "root of everything the run writes: folder or s3:// URI")
    data: DataSettings = DataSettings()
    slicing: SlicingSettings = SlicingSettings()
    vision: VisionSettings = VisionSettings()
    cache: CacheSettings = CacheSettings()
    projector: ProjectorSettings = ProjectorSettings()
    llm: LLMSettings = LLMSettings()
    pretrain: PretrainSettings = PretrainSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    report: ReportSettings = ReportSettings()
    runtime: RuntimeSettings = RuntimeSettings()
    tracking: TrackingSettings = TrackingSettings()
    study: StudySettings | None = operational(None, "variants of this run")

    @field_validator("output")
    @classmethod
    def _no_trailing_slash(cls, value: str) -> str:
        return value.rstrip("/") or "/"

    @model_validator(mode="after")
    def _no_credentials(self) -> "RunSettings":
        # Run files are stored with results, logged to MLflow, and shown with a cluster's jobs.
        for value in _texts(self.model_dump(mode="json")):
            if found := re.search(r"(\w+://)[^/@\s]*:[^/@\s]*@", value):
                raise ValueError(
                    f"a URI with a password ({found[1]}...@) does not belong in a run: give it to the processes by "
                    "their environment (MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_URI; AWS_*)"
                )
        return self

    @model_validator(mode="after")
    def _layers_of_the_cache_serve_the_selection(self) -> "RunSettings":
        if self.vision.select_layer not in self.vision.attention_layers:
            raise ValueError(
                f"vision.attention_layers={list(self.vision.attention_layers)} must contain "
                f"vision.select_layer={self.vision.select_layer}: the projector reads that block's attention"
            )
        return self

    @model_validator(mode="after")
    def _question_sets_have_names_of_their_own(self) -> "RunSettings":
        taken = sorted({"pretrain", "finetune"} & self.data.evaluate.keys())
        if taken:
            raise ValueError(f"data.evaluate names a set {taken[0]!r}, which is a stage's: call it otherwise")
        return self

    def training(self, stage: TrainingStage) -> StageSettings:
        """The settings of a training stage."""
        return self.pretrain if stage == "pretrain" else self.finetune

    @property
    def cache_root(self) -> str:
        return self.cache.uri or f"{self.output}/cache"


def _texts(value: Any) -> Iterator[str]:
    """All strings in a tree of mappings and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in (*value.keys(), *value.values()):
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)

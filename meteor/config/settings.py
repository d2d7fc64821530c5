"""Every setting of a run with its type, default and meaning. Unknown keys and wrong types are refused.

A field made by `operational` says where or how fast something runs, not what is computed. It stays out of the run digest,
and a run that changes it continues from its checkpoint. Each description is shown alone, beside the setting's dotted name
(`meteor config explain`), and must be understood there.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from meteor.secrets import find_secrets
from meteor.stages import TrainingStage


def operational(default: Any, description: str, **constraints: Any) -> Any:
    """Make a field that does not change the mathematics (see `meteor.config.digest`)."""
    return Field(default, description=description, json_schema_extra={"operational": True}, **constraints)


def setting(default: Any, description: str, **constraints: Any) -> Any:
    """Make a field that changes what is computed, and with it the run digest."""
    return Field(default, description=description, **constraints)


Dtype = Literal["float32", "bfloat16", "float16"]
Fraction = Annotated[float, Field(ge=0, le=1)]
# Names become parts of paths, so that none may be "..", begin with a dot or hold a slash.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")]
Weight = Annotated[float, Field(gt=0)]
LongSide = Annotated[int, Field(ge=14)]


class _Settings(BaseModel):
    # Unknown keys are refused, because a misspelt setting would otherwise have no effect. Defaults are validated too.
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class QuestionSetSettings(_Settings):
    """Questions to answer and score: a benchmark's files, or your own.

    Paths are operational: the questions are identified by the content of the files.
    """

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
    ] = setting("llava", "file format of the questions, which also chooses the metric that scores the answers")
    path: str = operational(
        ..., "folder with the benchmark's published files, or a LLaVA JSON / JSONL file; a local path or s3:// URI"
    )
    split: str | None = setting(None, "split of the benchmark; omit for the split whose answers are public")
    ocr: bool | None = setting(
        None,
        "put TextVQA's OCR tokens into the prompt, as LLaVA's evaluation does, which adds about ten points; omit for the "
        "choice of evaluate.preset, or no tokens without a preset",
    )
    compat: bool = setting(True, "compare ChartQA's target 0 as text, as the reference code does")
    verdicts: str | None = operational(
        None, "MM-Vet: file with the judge's verdicts on this model's answers; omit to write the answers for the judge"
    )


class DataSettings(_Settings):
    """Locations of samples and images, and limits beyond which an image is refused."""

    roots: dict[str, str] = operational(
        {"": "."}, "image folders: prefix of the image names in a sample file -> folder or s3:// URI"
    )
    pretrain: str | dict[str, Weight] | None = operational(
        None,
        "samples of stage 1: a file, folder or pattern of files in LLaVA's JSON or another form (`docs/your-data.md`), or "
        "several with their number of passes per epoch: {a.json: 1, data/train-*.parquet: 0.5}",
    )
    finetune: str | dict[str, Weight] | None = operational(
        None,
        "samples of stage 2: a file, folder or pattern of files in LLaVA's JSON or another form (`docs/your-data.md`), or "
        "several with their number of passes per epoch: {a.json: 1, data/train-*.parquet: 0.5}",
    )
    held_out: dict[TrainingStage, str] = operational(
        {},
        "held-out samples: stage -> file, folder or pattern; their loss is measured at each checkpoint, and the checkpoint "
        "with the lowest loss is kept",
    )
    evaluate: dict[Name, QuestionSetSettings] = operational(
        {},
        "question sets to answer and score, by name: {gqa: {format: gqa, path: /data/gqa}}; a path alone means a LLaVA file, "
        "and null leaves out a set of the file that this one extends",
    )
    max_aspect_ratio: float = setting(
        24.0, "largest ratio of an image's longer to its shorter side; images beyond it are quarantined", ge=1
    )
    # Pillow refuses more than 2 x 89,478,485 pixels by default, this number.
    max_pixels: int = setting(
        178_956_970, "most pixels of an image; larger images (decompression bombs) are quarantined", gt=0
    )
    max_bad_share: Fraction = operational(
        0.01,
        "share of quarantined images, or of samples or questions that cannot be used, above which a stage fails "
        "(cache_features first publishes the good images); min_bad_images must be reached as well",
    )
    min_bad_images: int = operational(
        10,
        "number of quarantined images, or of samples or questions that cannot be used, below which no stage fails, whatever "
        "their share; 0 with max_bad_share 0: the first one fails the stage",
        ge=0,
    )

    @field_validator("evaluate", mode="before")
    @classmethod
    def _a_path_alone_is_a_llava_file(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        # With null, a run file leaves out a set of the file that it extends.
        return {
            name: {"path": questions} if isinstance(questions, str) else questions
            for name, questions in value.items()
            if questions is not None
        }

    def tolerates(self, num_bad: int, num_all: int) -> bool:
        """Return whether a stage goes on although some of its images, samples or questions cannot be used."""
        return not num_bad or num_bad < self.min_bad_images or num_bad <= self.max_bad_share * num_all

    def sources(self, stage: TrainingStage) -> dict[str, float]:
        """Return the stage's sample files with their passes per epoch; empty if the run names none."""
        named = getattr(self, stage)
        return dict(named) if isinstance(named, dict) else {named: 1.0} if named else {}


class SlicingSettings(_Settings):
    """Parameters of LLaVA-UHD's slicing rule."""

    max_slices: int = setting(6, "most slices of an image; the global view is not counted", ge=1)
    resolution: int | None = setting(
        None,
        "pixels: a sub-image has about the area of a square with this side; omit for the images on which the encoder was "
        "trained",
        ge=14,
    )
    patch_size: int | None = setting(
        None, "side of a patch in pixels; omit for the encoder's patch size, which it must be", ge=1
    )
    resample: Literal["bicubic", "bilinear", "lanczos"] | None = setting(
        None, "filter that resizes images; omit for the filter of the encoder's own image processor"
    )


class VisionSettings(_Settings):
    """The frozen vision encoder."""

    path: str = operational(
        "openai/clip-vit-large-patch14-336",
        "checkpoint of a CLIP, SigLIP, SigLIP 2, DINOv2 or DINOv3 encoder: local directory, s3:// folder or hub id",
    )
    select_layer: int = setting(
        -2, "index of the hidden state that is cached as features; -2, the last but one, is LLaVA's choice"
    )
    attention_layers: tuple[int, ...] = setting(
        (-2,), "indices of hidden states whose transformer block's importance row is cached"
    )
    importance: Literal["class_token", "pooling_query", "attention_received"] | None = setting(
        None,
        "importance row that the visual expert reads: attention of the class token or of the pooling head's query over the "
        "patches, or mean attention that a patch receives; omit for class_token, or pooling_query if the encoder has no class "
        "token",
    )
    dtype: Dtype = setting("bfloat16", "number type in which the encoder computes")


class CacheSettings(_Settings):
    """The feature cache."""

    uri: str | None = operational(None, "folder or s3:// URI that holds all feature caches; omit for <output>/cache")
    codec: str = setting("float16", "storage format of feature values: float16, bfloat16, float32 or int8")
    version: int | None = operational(
        None, "version of the cache to read; omit for the newest at the run's first start", ge=1
    )
    index_version: int | None = operational(
        None, "version of the dataset index to read; omit for the newest at the run's first start", ge=1
    )
    rows_per_file: int = operational(
        32,
        "images that are encoded together and written as one Parquet file; a batch above 128 MB becomes several files",
        ge=1,
    )
    commit_every_s: float = operational(300, "seconds between published versions while the cache is filled", gt=0)
    prefetch_threads: int = operational(8, "images that a training worker reads from the cache in parallel", ge=1)
    prefetch_mb: int = operational(
        512, "memory in MB that a training worker may fill with features read ahead of their batch", ge=1
    )
    disk_tier: str | None = operational(
        None, "folder on each node's own disk that keeps features read from a cache on S3; a local cache needs none"
    )
    disk_tier_gb: float = operational(
        100, "size limit of the disk tier in GB; the least recently used images are deleted first", gt=0
    )


class ProjectorSettings(_Settings):
    """Choice of the projector, and the arguments of its class in `meteor.projector`."""

    name: str = setting("meteor", "projector that turns patch features into visual tokens: meteor, mlp, resampler, ...")
    settings: dict[str, Any] = setting(
        {},
        "arguments of the projector's class, for example {k: 64}; k: [32, 64, 144] or k: {min: 16, max: 144} trains one model "
        "for several numbers of visual tokens, of which each step draws one (`docs/projectors.md`)",
    )


class LLMSettings(_Settings):
    """The language model, any causal LM of Hugging Face."""

    path: str = operational("lmsys/vicuna-7b-v1.5", "causal LM: local directory, s3:// folder or hub id")
    dtype: Dtype = setting("bfloat16", "number type of the language model's weights in training and answering")
    attention: Literal["auto", "eager", "sdpa", "varlen"] = operational(
        "auto",
        "attention kernel in training; varlen computes no padding (on CUDA with torch's FlashAttention); auto chooses the "
        "first of varlen, sdpa and eager that gives the language model's own logits, which is tried at the start",
    )
    gradient_checkpointing: bool = operational(
        True, "recompute activations in the backward pass: less memory, more computation"
    )
    compile: bool = operational(
        False,
        "compile the decoder's layers with torch.compile for training (not under ZeRO-3); compiling takes minutes, and a "
        "resumed run then equals an uninterrupted one up to rounding, not bit for bit",
    )


class StageSettings(_Settings):
    """One training stage."""

    # Learning rates, batch sizes and the warm-up ratio of both stages are LLaVA-1.5's.
    lr: float = setting(1e-3, "peak learning rate", gt=0)
    global_batch_size: int = setting(256, "samples per optimiser step, over all workers", ge=1)
    epochs: int = setting(1, "passes over the samples", ge=1)
    warmup_ratio: Fraction = setting(0.03, "share of the steps in which the learning rate rises linearly")
    weight_decay: Literal[0] = setting(
        0, "weight decay; only 0, LLaVA's value, because ZeRO-3 allows a single parameter group"
    )
    max_grad_norm: float = setting(1.0, "norm to which gradients are clipped", gt=0)
    seed: int = setting(0, "seed of the sample order and of newly initialised weights")
    template: Literal["plain", "vicuna_v1", "chat"] = setting(
        "plain",
        "prompt template: plain (image, then caption), vicuna_v1 (LLaVA's dialogue), chat (the tokenizer's own template)",
    )
    sub_images: Literal["all", "global"] = setting(
        "all", "sub-images to train on: all, or the global view alone (global), as LLaVA-UHD pretrains"
    )
    max_length: int = setting(
        2048,
        "most tokens of a sample, visual tokens included; text beyond the limit is cut, and the cut is counted",
        ge=8,
    )
    native_warmup: Fraction = setting(
        0.0, "share of the steps in which the native expert's weight rises linearly from 0 to its final value"
    )
    aux_loss_coefficient: float = setting(
        0.01,
        "weight of the projector's auxiliary loss; without effect on projectors that have none, as those of this library",
        ge=0,
    )
    batching: Literal["auto", "padded", "grouped", "packed"] = setting(
        "auto",
        "layout of a batch: padded (one sample per row), grouped (padded, with samples of similar length together), packed "
        "(several samples per row, up to max_length tokens), auto (packed, or grouped if the language model mixes tokens by "
        "more than attention)",
    )
    fraction: float = setting(1.0, "share of the samples to train on; below 1 for a rehearsal", gt=0, le=1)
    features: Literal["cache", "live"] = setting(
        "cache", "source of image features: the feature cache, or the encoder inside the training worker (live)"
    )
    micro_batch_size: int = operational(
        16,
        "rows of one forward pass on one worker: a row is one sample, or up to max_length tokens if samples are packed",
        ge=1,
    )
    zero_stage: Literal[0, 1, 2, 3] = operational(2, "stage of DeepSpeed's ZeRO optimiser")
    deepspeed: dict[str, Any] = operational(
        {}, "additions to DeepSpeed's configuration: {zero_optimization: {offload_optimizer: {device: cpu}}}"
    )
    checkpoint_every_minutes: float = operational(
        30, "minutes between checkpoints; training goes on while a checkpoint is written", gt=0
    )
    checkpoint_every_steps: int | None = operational(
        None, "steps between checkpoints, in addition to checkpoint_every_minutes", ge=1
    )
    keep_checkpoints: int = operational(2, "number of newest checkpoints to keep, besides the best", ge=1)


class PretrainSettings(StageSettings):
    """Stage 1: the projector alone learns from captions (paper, section 4.1)."""

    native_warmup: Fraction = setting(
        0.3, "share of the steps in which the native expert's weight rises linearly from 0 to its final value"
    )


class LoraSettings(_Settings):
    """LoRA: low-rank matrices beside the language model's linear layers, trained instead of its weights."""

    rank: int = setting(128, "rank of the adapters' low-rank matrices", ge=1)
    alpha: float = setting(256, "scale of the adapters: their output is multiplied by alpha / rank", gt=0)
    dropout: float = setting(
        0.05,
        "dropout rate of the adapters' inputs; which inputs are dropped depends on the number of workers",
        ge=0,
        lt=1,
    )


class TextSamplerSettings(_Settings):
    """FocusLLaVA-style sampler: a middle layer of the LLM drops visual tokens that the question does not attend to."""

    layer: int | None = setting(
        None, "index, from 0, of the layer whose attention ranks the visual tokens; omit for the middle layer", ge=0
    )
    keep: float = setting(0.75, "share of each image's visual tokens that the later layers see", gt=0, le=1)


class FinetuneSettings(StageSettings):
    """Stage 2: projector and language model learn from instructions (paper, section 4.1)."""

    lr: float = setting(2e-5, "peak learning rate", gt=0)
    global_batch_size: int = setting(128, "samples per optimiser step, over all workers", ge=1)
    template: Literal["plain", "vicuna_v1", "chat"] = setting(
        "vicuna_v1",
        "prompt template: plain (image, then caption), vicuna_v1 (LLaVA's dialogue), chat (the tokenizer's own template)",
    )
    micro_batch_size: int = operational(
        4,
        "rows of one forward pass on one worker: a row is one sample, or up to max_length tokens if samples are packed",
        ge=1,
    )
    zero_stage: Literal[0, 1, 2, 3] = operational(3, "stage of DeepSpeed's ZeRO optimiser")
    lora: LoraSettings | None = setting(
        None, "LoRA adapters to train instead of the language model's weights; LLaVA's recipe is {} with lr=2e-4"
    )
    text_sampler: TextSamplerSettings | None = setting(
        None,
        "sampler that drops visual tokens inside the language model, in training and answering; {} for FocusLLaVA's style",
    )
    pretrained: str | None = operational(None, "URI of a stage-1 projector; omit for this run's own stage 1")


class SelectionSettings(_Settings):
    """Token selection when answering, for one question set."""

    k: int | None = setting(None, "most visual tokens per sub-image when answering this set; omit for evaluate.k", ge=1)
    visual_weight: Fraction | None = setting(
        None, "weight of the class token's attention when answering this set; omit for evaluate.visual_weight"
    )
    sub_images: Literal["all", "global"] | None = setting(
        None, "sub-images when answering this set; omit for evaluate.sub_images"
    )


class EvaluateSettings(_Settings):
    """Answering and scoring."""

    k: int | None = setting(
        None,
        "most visual tokens per sub-image when answering, for projectors whose number of tokens may be chosen "
        "(`docs/projectors.md`); omit for the largest number of training",
        ge=1,
    )
    visual_weight: Fraction | None = setting(
        None,
        "weight of the class token's attention against the similarity to the instruction when answering, for meteor's "
        "projectors; omit for the weight of training",
    )
    sub_images: Literal["all", "global"] | None = setting(
        None,
        "sub-images when answering: all, or the global view alone (global); omit for those of stage 2. Other numbers of slices "
        "are other features: set slicing.max_slices and run cache_features",
    )
    sets: dict[Name, SelectionSettings] = setting(
        {}, "other values of k, visual_weight and sub_images for some question sets: {gqa: {visual_weight: 0.3}}"
    )
    long_prompts: Literal["wrong", "global"] = setting(
        "wrong",
        "treatment of a question whose prompt and answer need more positions than the language model has: count it as wrong "
        "(wrong), or show its images by their global views alone and count it in scores.json (global)",
    )
    max_new_tokens: int | None = setting(
        None,
        "most tokens of an answer; omit for each benchmark's limit: 16 or 32 for short answers, 128 for MM-Vet and MMMU",
        ge=1,
    )
    preset: Literal["llava_1_5", "llava_uhd"] | None = setting(
        None,
        "published evaluation that chooses prompts, TextVQA's OCR tokens and the size of images for each benchmark; "
        "data.evaluate.<name>.ocr and evaluate.long_side come before it; omit for images as they are, without OCR tokens",
    )
    long_side: LongSide | Literal["original"] | None = setting(
        None,
        "pixels of an image's longer side after resizing, before slicing, at least 14, or original to keep the size; omit for "
        "the choice of evaluate.preset, or the original size without a preset",
    )
    limit: int | None = setting(None, "most questions to answer per set; omit for all")
    batch_size: int = operational(16, "questions answered together", ge=1)
    model: str | None = operational(None, "directory of a finished model; omit for this run's own stage 2")
    features: Literal["cache", "live"] = setting(
        "cache", "source of image features: the feature cache, or the encoder during answering (live)"
    )


class ReportSettings(_Settings):
    """Content of the report."""

    num_figures: int = operational(4, "number of images on which the report draws the selected tokens", ge=0)
    compare: tuple[str, ...] = operational((), "run files whose results are shown beside this run's")


class RuntimeSettings(_Settings):
    """Numbers of processes and their resources. Nothing here changes a result."""

    ray_address: str | None = operational(
        None, "address of a running Ray cluster; omit for RAY_ADDRESS or, if unset, a local Ray"
    )
    num_workers: int = operational(1, "number of training workers", ge=1)
    cpus_per_worker: float = operational(1, "CPU cores of a training worker", gt=0)
    gpus_per_worker: float = operational(0, "GPUs of a training worker", ge=0)
    gpu_memory_gb: float | None = operational(
        None,
        "memory of a training GPU in GB, to check the memory plan before training starts; omit to ask the GPU of the "
        "machine that starts the stage",
        gt=0,
    )
    peak_tflops: float | None = operational(
        None,
        "peak TFLOP/s of a training worker's device, from which MFU is computed; omit for the dense bfloat16 peak of a known "
        "GPU",
        gt=0,
    )
    wait_for_nodes_minutes: float = operational(
        15, "minutes that a stage waits for nodes if the cluster is too small for its workers; 0 stops at once", ge=0
    )
    max_failures: int = operational(2, "number of restarts of the worker group before a stage gives up", ge=0)
    num_encoders: int = operational(1, "number of encoder actors", ge=1)
    cpus_per_encoder: float = operational(1, "CPU cores of an encoder actor", gt=0)
    gpus_per_encoder: float = operational(
        0, "GPUs of an encoder actor; with a fraction, several actors share a GPU", ge=0
    )
    batches_per_encoder: int = operational(
        3,
        "batches of cache.rows_per_file images that an encoder actor holds: the first is encoded while the others are "
        "written; increase for a slow object store",
        ge=1,
    )
    encoder_max_tokens: int | None = operational(
        None, "most patches in one forward pass of the encoder; omit to derive it from the device's free memory", ge=1
    )
    num_evaluators: int = operational(1, "number of actors that answer questions", ge=1)


class TrackingSettings(_Settings):
    """Experiment tracking in MLflow."""

    uri: str | None = operational(
        None, "URI of the MLflow server; omit for MLFLOW_TRACKING_URI or, if unset, a SQLite file under <output>"
    )
    experiment: str = operational("llava-meteor", "name of the MLflow experiment")
    study: str | None = operational(
        None, "name of the study that has this run as a variant; its MLflow run becomes this run's parent"
    )
    used_by: tuple[str, ...] = operational(
        (),
        "variants of the study that share this run's stages; shared stages become children of the study's MLflow run",
    )


class StudyTableSettings(_Settings):
    """A table of a study's report."""

    variants: tuple[str, ...] = operational(
        (), "variants of the table's rows, in this order; `*` matches any letters; omit for all variants"
    )
    control: str | None = operational(
        None, "variant with which the other rows are compared; omit for the table's first row"
    )
    paper: Literal[1, 2, 3, 4] | None = operational(
        None, "number of the paper's table whose rows are shown beside the study's"
    )
    losses: bool = operational(
        False, "whether to compare the loss of each step with the control's, and the time of steps and encoding"
    )


class StudySettings(_Settings):
    """Variants of the run, for `python -m pipelines.ablate`."""

    variants: dict[str, dict[str, Any]] = operational(
        {},
        "variants by name, each with its changed settings: {single_scan: {projector.settings.scan: single}, as_it_is: {}}",
    )
    grid: dict[str, list[Any]] = operational(
        {}, "dotted setting -> list of values; every combination of values is applied to every named variant"
    )
    seeds: tuple[int, ...] = operational(
        (), "seeds with which each variant is trained; omit for the run's own seed in each stage"
    )
    tables: dict[str, StudyTableSettings] = operational({}, "tables of the study's report, by title")
    parallel: int | None = operational(
        None, "most variants that run at the same time; omit for as many as CPUs and GPUs allow", ge=1
    )
    measure_questions: int = operational(
        16, "number of questions with which memory and answering speed are measured after training; 0 for none", ge=0
    )


class RunSettings(_Settings):
    """Settings of a whole run, as a YAML file under jobs/runs/ gives them."""

    name: Name = operational("run", "name of the run in folders, reports and MLflow")
    output: str = operational("outputs", "folder or s3:// URI under which the run writes everything")
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
    study: StudySettings | None = operational(
        None, "study of this run: its variants, seeds and tables, for pipelines.ablate"
    )

    @field_validator("output")
    @classmethod
    def _no_trailing_slash(cls, value: str) -> str:
        return value.rstrip("/") or "/"

    @model_validator(mode="after")
    def _no_credentials(self) -> "RunSettings":
        # Run files are stored with results, logged to MLflow, and shown with a cluster's jobs.
        if found := list(find_secrets(self.model_dump(mode="json"))):
            raise ValueError(
                f"{', '.join(found)}: a password, token or key does not belong in a run: pass credentials in environment "
                "variables (MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_URI; AWS_*)"
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
    def _selections_belong_to_question_sets(self) -> "RunSettings":
        if unknown := sorted(self.evaluate.sets.keys() - self.data.evaluate.keys()):
            raise ValueError(f"evaluate.sets names {unknown[0]!r}, but data.evaluate has {sorted(self.data.evaluate)}")
        return self

    @model_validator(mode="after")
    def _question_sets_have_names_of_their_own(self) -> "RunSettings":
        taken = sorted({"pretrain", "finetune"} & self.data.evaluate.keys())
        if taken:
            raise ValueError(f"data.evaluate names a set {taken[0]!r}, which is a stage's name: choose another name")
        return self

    def training(self, stage: TrainingStage) -> StageSettings:
        """Return the settings of a training stage."""
        return self.pretrain if stage == "pretrain" else self.finetune

    @property
    def cache_root(self) -> str:
        """Folder or s3:// URI that holds the feature caches, without the default left open."""
        return self.cache.uri or f"{self.output}/cache"

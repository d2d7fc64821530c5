"""Size, cost and benefit of a feature cache, computed from image sizes and the shapes of encoder and LLM."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from meteor.formatting import format_bytes, format_flops
from meteor.vision.flops import EncoderShape

# Multiplications and additions per LLM parameter and token. Both stages go forward and back through the activations; stage 2,
# whose LLM is trained, also goes back to the weights. Recomputation by activation checkpointing is not counted.
FLOPS_PER_PARAMETER = {"pretrain": 4, "finetune": 6}

# Defaults: the list price of storage on S3 per month, and a typical number of runs in an ablation study.
USD_PER_GB = 0.023
NUM_RUNS = 10


@dataclass(frozen=True)
class StageCost:
    """Cost of one training stage of a run, or of one of the stage's files.

    Attributes:
        name: name of the stage or file.
        num_samples: samples of an epoch.
        num_sub_images: sub-images of an epoch; an image counts as often as samples show it.
        epochs: passes over the samples.
        encoder_flops: FLOPs of encoding the images in the steps, over all epochs.
        llm_flops: FLOPs of the language model in the steps, over all epochs.
    """

    name: str
    num_samples: int
    num_sub_images: int
    epochs: float
    encoder_flops: float
    llm_flops: float

    @property
    def encoder_share(self) -> float:
        """Share of a step's arithmetic that the cache avoids, 0 to 1."""
        total = self.encoder_flops + self.llm_flops
        return self.encoder_flops / total if total else 0.0


@dataclass(frozen=True)
class CacheCost:
    """Sizes and costs of a run's cache.

    Attributes:
        num_images: image names in the samples.
        num_distinct: distinct images to hold, distinguished by content if they are indexed, else by name.
        num_unindexed: images that the index lacks; only their headers were read.
        num_unusable: images that are missing or refused.
        num_cached: distinct images that the cache holds already.
        num_sub_images, num_patches: sub-images and patches of the distinct images.
        encoder_flops: FLOPs of encoding each distinct image once.
        codec: codec that the run's settings choose.
        cache_uri: URI of the run's cache, which need not exist yet.
        size_bytes: codec -> bytes of all payloads.
        stages: training stages of the run; empty if the language model could not be read (`note` says why).
        note: parts that are missing here, and why; "" if none is.
    """

    num_images: int
    num_distinct: int
    num_unindexed: int
    num_unusable: int
    num_cached: int
    num_sub_images: int
    num_patches: int
    encoder_flops: float
    codec: str
    cache_uri: str
    size_bytes: dict[str, int]
    stages: tuple[StageCost, ...] = ()
    note: str = ""

    def to_dict(self, *, rate: float | None, usd_per_gb: float, num_runs: int) -> dict[str, Any]:
        """Return the costs as JSON values; for the arguments see `to_text`."""
        content = asdict(self) | {
            "stages": [{**asdict(stage), "encoder_share": stage.encoder_share} for stage in self.stages],
            "usd_per_month": {codec: size / 1e9 * usd_per_gb for codec, size in self.size_bytes.items()},
            "encoder_seconds": self.num_sub_images / rate if rate else None,
        }
        if self.stages:
            content |= {"num_runs": num_runs, "flops_avoided": self._avoided(num_runs)}
            content["share_avoided"] = self._avoided(num_runs) / self._without_cache(num_runs)
        return content

    def to_text(self, *, rate: float | None = None, usd_per_gb: float = USD_PER_GB, num_runs: int = NUM_RUNS) -> str:
        """Return the costs as aligned lines.

        Args:
            rate: sub-images per second that all GPUs of the cluster together encode; None if not known.
            usd_per_gb: price of storing a decimal gigabyte for a month.
            num_runs: training runs over the same cache, each with all stages.
        """
        images = f"{self.num_images:,} named, {self.num_distinct:,} distinct"
        if self.num_unindexed:
            images += f" ({self.num_unindexed:,} not indexed yet: distinct by name only)"
        rows = [
            ("images", images),
            ("unusable", f"{self.num_unusable:,}"),
            ("cached already", f"{self.num_cached:,}"),
            ("sub-images", f"{self.num_sub_images:,} ({_ratio(self.num_sub_images, self.num_distinct):.2f} per image)"),
        ]
        for codec, size in self.size_bytes.items():
            mark = ", this run's codec" if codec == self.codec else ""
            cost = f"{size / 1e9 * usd_per_gb:,.2f} USD per month at {usd_per_gb:g} USD per GB"
            rows.append((codec, f"{format_bytes(size)}, {cost}{mark}"))
        time = (
            f"{self.num_sub_images / rate:,.0f} s at {rate:,.0f} sub-images/s" if rate else "--rate would give the time"
        )
        rows.append(("encoding once", f"{format_flops(self.encoder_flops)}; {time}"))
        rows += [
            (stage.name, f"encoding in the step would be {stage.encoder_share:.1%} of its arithmetic")
            for stage in self.stages
        ]
        if self.stages:
            share = self._avoided(num_runs) / self._without_cache(num_runs)
            rows.append(
                (
                    f"{num_runs} runs",
                    f"the cache avoids {format_flops(self._avoided(num_runs))}, {share:.1%} of their total",
                )
            )
        if self.note:
            rows.append(("note", self.note))
        rows.append(("cache", self.cache_uri))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)

    def _without_cache(self, num_runs: int) -> float:
        return num_runs * sum(stage.encoder_flops + stage.llm_flops for stage in self.stages)

    def _avoided(self, num_runs: int) -> float:
        """Return the FLOPs of encoding in every step of every run, less those of encoding once.

        The number is negative if the runs together show fewer images than the cache encodes.
        """
        return num_runs * sum(stage.encoder_flops for stage in self.stages) - self.encoder_flops


def estimate_stage(
    name: str,
    grids: Mapping[tuple[int, int], int],
    *,
    num_samples: int,
    encoder: EncoderShape,
    epochs: float,
    flops_per_parameter: int,
    num_llm_parameters: int,
    num_visual_tokens: int,
    num_text_tokens: float,
) -> StageCost:
    """Count the arithmetic of a training stage or of one of its files.

    Args:
        name: name of the stage, or of one of its files.
        grids: patch grid (Hu, Wu) -> number of sub-images with this grid that the samples show.
        num_samples: number of samples.
        encoder: shape of the encoder.
        epochs: passes over the samples.
        flops_per_parameter: FLOPs of the language model per parameter and token (`FLOPS_PER_PARAMETER`).
        num_llm_parameters: parameters that multiply: all but the token embeddings.
        num_visual_tokens, num_text_tokens: tokens of all samples, in one pass.
    """
    encoder_flops = epochs * sum(count * encoder.flops(rows * columns) for (rows, columns), count in grids.items())
    num_tokens = num_visual_tokens + num_text_tokens
    llm_flops = epochs * flops_per_parameter * num_llm_parameters * num_tokens
    return StageCost(name, num_samples, sum(grids.values()), epochs, encoder_flops, llm_flops)


def _ratio(number: float, total: float) -> float:
    return number / total if total else 0.0

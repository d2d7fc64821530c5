"""Tables of cost: an answer by its parts, in time and FLOPs, and training with and without the encoder."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from meteor.formatting import format_bytes, format_duration, format_flops, format_number, format_share
from meteor.report.data import RunResult
from meteor.report.measures import step_seconds, training_seconds
from meteor.report.seeds import by_variant
from meteor.report.tables import NOT_RECORDED, NOT_RUN, Table, format_tokens, format_training_time

_STAGE = "finetune"


def answer_cost_table(runs: Sequence[RunResult]) -> Table:
    """Lay out time and FLOPs of a question per part, measured on the same hardware with the same questions."""
    columns = (
        *("Variant", "Tokens per image", "Prompt tokens", "Encoder", "Projector"),
        *("Prompt pass", "Each token", "Whole answer", "Encoder's share", "Answer tokens/s", "Memory while answering"),
    )
    rows = []
    for variant, run in _one_each(runs).items():
        tokens = format_tokens(run.num_visual_tokens_per_image)
        rows.append((variant, tokens, *(_answer_cells(run.efficiency) if run.efficiency else [NOT_RECORDED] * 9)))
    return Table(columns, tuple(rows))


def _answer_cells(measured: Mapping[str, Any]) -> list[str]:
    parts = answer_parts(measured)
    cells = [NOT_RECORDED] * 6
    if parts:
        whole = tuple(map(sum, zip(*parts.values(), strict=True)))
        shares = [part / total if total else 0.0 for part, total in zip(parts["encoder"], whole, strict=True)]
        token = (1 / measured["tokens_per_s"], measured["token_flops"])
        cells = [_both(part) for part in (parts["encoder"], parts["projector"], parts["prompt"], token, whole)]
        cells.append(f"{format_share(shares[0])}, {format_share(shares[1])}")
    return [
        f"{measured['num_prompt_tokens']:,.0f}",
        *cells,
        f"{measured['tokens_per_s']:.3g}",
        format_bytes(measured["memory_bytes"]),
    ]


def answer_parts(measured: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Return part -> (seconds, FLOPs) per question; empty for a measurement that an earlier release made.

    The parts are encoder, projector, prompt (the language model over the prompt) and later tokens.
    """
    if "encoder_s" not in measured:
        return {}
    num_later = measured["num_new_tokens"] - 1
    return {
        "encoder": (measured["encoder_s"], measured["encoder_flops"]),
        "projector": (measured["projector_s"], measured["projector_flops"]),
        "prompt": (max(measured["prefill_s"] - measured["projector_s"], 0.0), measured["prefill_flops"]),
        "later tokens": (num_later / measured["tokens_per_s"], num_later * measured["token_flops"]),
    }


def training_cost_table(runs: Sequence[RunResult]) -> Table:
    """Lay out the cost of stage 2 from the cache, and what it would be with the encoder in its steps."""
    columns = (
        *("Variant", "Training time", "Training tokens/s", "Encoder FLOPs", "Encoder's share"),
        *("Steps", "Steps with the encoder", "MFU", "MFU with the encoder"),
    )
    rows = []
    for variant, run in _one_each(runs).items():
        shares = ", ".join(f"{stage} {format_share(share)}" for stage, share in run.encoder_shares.items())
        flops = sum(run.encoder_flops.values())
        found = training_cost(run)
        rows.append(
            (
                variant,
                format_training_time(run),
                _training_rate(run),
                format_flops(flops) if flops else NOT_RECORDED,
                shares or NOT_RECORDED,
                *(format_duration(found[name]) if name in found else NOT_RECORDED for name in ("steps_s", "live_s")),
                *(format_share(found[name]) if name in found else NOT_RECORDED for name in ("mfu", "live_mfu")),
            )
        )
    return Table(columns, tuple(rows))


def training_cost(run: RunResult) -> dict[str, float]:
    """Return the cost of stage 2, without the numbers that cannot be known.

    Returns:
        ``steps_s``, seconds of all steps; ``live_s``, their seconds if every worker encoded its images in the steps, at the
        encoder's speed while answering; ``mfu``, the median over steps, which does not count the encoder's FLOPs; ``live_mfu``,
        the MFU of such steps with the encoder's FLOPs. For a stage that did encode in its steps, ``steps_s`` is missing,
        ``live_s`` is measured, and ``mfu`` is missing.
    """
    stage, measured = run.stages.get(_STAGE), run.efficiency or {}
    seconds = step_seconds(stage) if stage is not None and stage.finished else None
    if stage is None or not seconds:
        return {}
    values = [row["mfu"] for row in stage.metrics if row.get("mfu") is not None]
    mfu = median(values) if values else None
    share = _of_stage(run.encoder_shares, run.encoder_flops)
    if stage.settings.get(_STAGE, {}).get("features") == "live":
        found = {"live_s": seconds}
        return found if mfu is None else found | {"live_mfu": mfu / (1 - share)}
    found = {"steps_s": seconds} | ({} if mfu is None else {"mfu": mfu})
    if not measured.get("encoder_flops") or not share:
        return found
    num_workers = stage.settings.get("runtime", {}).get("num_workers", 1)
    flops = sum(value for name, value in run.encoder_flops.items() if name.startswith(_STAGE))
    found["live_s"] = seconds + flops * measured["encoder_s"] / measured["encoder_flops"] / num_workers
    if mfu is not None:
        found["live_mfu"] = mfu / (1 - share) * seconds / found["live_s"]
    return found


def _of_stage(shares: Mapping[str, float], flops: Mapping[str, float]) -> float:
    """Return the encoder's share of the stage's arithmetic over all its files."""
    mine = {
        name: flops[name] for name, share in shares.items() if name.startswith(_STAGE) and flops.get(name) and share
    }
    whole = sum(value / shares[name] for name, value in mine.items())
    return sum(mine.values()) / whole if whole else 0.0


def _one_each(runs: Sequence[RunResult]) -> dict[str, RunResult]:
    """Return variant -> the seed whose answers were measured, else the first."""
    return {
        variant: next((run for run in seeds if run.efficiency), seeds[0]) for variant, seeds in by_variant(runs).items()
    }


def _both(part: tuple[float, ...]) -> str:
    seconds, flops = part
    time = f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
    return f"{time}, {format_flops(flops)}"


def _training_rate(run: RunResult) -> str:
    stage = run.stages.get(_STAGE)
    seconds = training_seconds(run).get(_STAGE)
    if stage is None or not seconds:
        return NOT_RUN if stage is None else NOT_RECORDED
    tokens = sum(row.get("num_visual_tokens", 0) + row.get("num_text_tokens", 0) for row in stage.metrics)
    return format_number(tokens / seconds)

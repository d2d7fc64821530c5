"""Tables of cost: an answer by its parts, in time and FLOPs, and training with and without the encoder."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from meteor.formatting import format_bytes, format_duration, format_flops, format_number, format_share
from meteor.report.data import RunResult
from meteor.report.measures import step_seconds, training_seconds
from meteor.report.seeds import by_variant
from meteor.report.tables import NOT_RECORDED, NOT_RUN, Table, format_tokens, format_training_time

_STAGE = "finetune"
_PARTS = ("Encoder", "Projector", "Prompt pass", "Each token", "Whole answer", "Encoder's share")


def answer_time_table(runs: Sequence[RunResult]) -> Table:
    """Lay out the seconds of a question per part, measured on the same hardware with the same questions, and the memory."""
    rows = []
    for variant, run in _one_each(runs).items():
        measured = run.efficiency
        if measured is None:
            rows.append((variant, *[NOT_RECORDED] * (len(_PARTS) + 3)))
            continue
        others = (f"{measured['tokens_per_s']:.3g}", format_bytes(measured["memory_bytes"]))
        rows.append((variant, f"{measured['num_prompt_tokens']:,.0f}", *_part_cells(measured, 0, _time), *others))
    return Table(("Variant", "Prompt tokens", *_PARTS, "Answer tokens/s", "Memory"), tuple(rows))


def answer_flops_table(runs: Sequence[RunResult]) -> Table:
    """Lay out the FLOPs of a question per part."""
    rows = []
    for variant, run in _one_each(runs).items():
        cells = _part_cells(run.efficiency or {}, 1, format_flops)
        rows.append((variant, format_tokens(run.num_visual_tokens_per_image), *cells))
    return Table(("Variant", "Tokens per image", *_PARTS), tuple(rows))


def _part_cells(measured: Mapping[str, Any], number: int, layout: Callable[[float], str]) -> list[str]:
    """Lay out seconds (number 0) or FLOPs (1) of each part, of the whole answer, and the encoder's share of the whole."""
    parts = {name: both[number] for name, both in answer_parts(measured).items()}
    if not parts:
        return [NOT_RECORDED] * len(_PARTS)
    later = parts.pop("later tokens")
    token, whole = later / (measured["num_new_tokens"] - 1), sum(parts.values()) + later
    share = parts["encoder"] / whole if whole else 0.0
    return [*map(layout, (*parts.values(), token, whole)), format_share(share)]


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
        flops, share, found = _encoder_flops(run), _encoder_share(run), training_cost(run)
        rows.append(
            (
                variant,
                format_training_time(run),
                _training_rate(run),
                format_flops(flops) if flops else NOT_RECORDED,
                format_share(share) if share else NOT_RECORDED,
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
    share = _encoder_share(run)
    if stage.settings.get(_STAGE, {}).get("features") == "live":
        found = {"live_s": seconds}
        return found if mfu is None else found | {"live_mfu": mfu / (1 - share)}
    found = {"steps_s": seconds} | ({} if mfu is None else {"mfu": mfu})
    if not measured.get("encoder_flops") or not share:
        return found
    num_workers = stage.settings.get("runtime", {}).get("num_workers", 1)
    found["live_s"] = seconds + _encoder_flops(run) * measured["encoder_s"] / measured["encoder_flops"] / num_workers
    if mfu is not None:
        found["live_mfu"] = mfu / (1 - share) * seconds / found["live_s"]
    return found


def _encoder_flops(run: RunResult) -> float:
    return sum(value for name, value in run.encoder_flops.items() if name.startswith(_STAGE))


def _encoder_share(run: RunResult) -> float:
    """Return the encoder's share of the arithmetic of stage 2 over all its files; 0 if not known."""
    shares = {name: run.encoder_shares[name] for name in run.encoder_flops if run.encoder_shares.get(name)}
    whole = sum(run.encoder_flops[name] / share for name, share in shares.items() if name.startswith(_STAGE))
    return _encoder_flops(run) / whole if whole else 0.0


def _one_each(runs: Sequence[RunResult]) -> dict[str, RunResult]:
    """Return variant -> the seed whose answers were measured, else the first."""
    return {
        variant: next((run for run in seeds if run.efficiency), seeds[0]) for variant, seeds in by_variant(runs).items()
    }


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _training_rate(run: RunResult) -> str:
    stage = run.stages.get(_STAGE)
    seconds = training_seconds(run).get(_STAGE)
    if stage is None or not seconds:
        return NOT_RUN if stage is None else NOT_RECORDED
    tokens = sum(row.get("num_visual_tokens", 0) + row.get("num_text_tokens", 0) for row in stage.metrics)
    return format_number(tokens / seconds)

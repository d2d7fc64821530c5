"""Published evaluations as named presets: OCR tokens, image size and layout of the prompt, by benchmark.

Without a preset all benchmarks have the protocol `AS_IS`. The texts that request a form of answer are the same in all of them
(`meteor.evaluation.benchmarks.prompts`). A preset has no splits, no metrics, and nothing that belongs to the model, such as
slicing. It does not decode either: answers are greedy here, and LLaVA-UHD's scripts search with beams.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from meteor.evaluation.benchmarks.prompts import Protocol

AS_IS = Protocol()


@dataclass(frozen=True)
class Preset:
    """A published evaluation.

    Attributes:
        title: name in reports.
        usual: protocol of the benchmarks that ``others`` does not name.
        others: format of a benchmark -> its own protocol.
    """

    title: str
    usual: Protocol
    others: Mapping[str, Protocol]

    def protocol(self, format: str) -> Protocol:
        """Return the protocol of a benchmark; sets in LLaVA's own forms and NLVR belong to no published evaluation."""
        return AS_IS if format in ("llava", "nlvr") else self.others.get(format, self.usual)


# haotian-liu/LLaVA, docs/Evaluation.md and scripts/v1_5/eval: TextVQA's questions are llava_textvqa_val_v051_ocr.jsonl.
# It has no scripts for DocVQA, InfoVQA, ChartQA and MMMU, whose numbers come from lmms-eval (EvolvingLMMs-Lab/lmms-eval,
# lmms_eval/tasks/{docvqa,infovqa}/_default_template_*_yaml, chartqa/chartqa.yaml, mmmu/utils.py): MMMU alone has a blank line.
_LLAVA_1_5 = Preset("LLaVA-1.5", AS_IS, {"textvqa": Protocol(ocr=True), "mmmu": Protocol(blank_line=True)})

# thunlp/LLaVA-UHD, commit 30a3bc30: llava/eval/model_vqa_loader.py calls `resize_image_keep_ratio(image, max_size=1024)` for
# VQAv2, GQA, TextVQA, VizWiz, POPE and MM-Vet; the call is commented out in model_vqa_mmbench.py. Scripts of the second
# version (commit 48472b48) run DocVQA, InfoVQA and ChartQA with this loader, and SEED-Bench and MMMU with
# VLMEvalKit/vlmeval/vlm/llava_uhd.py, which resizes too.
_UHD = Protocol(long_side=1024)
_LLAVA_UHD = Preset("LLaVA-UHD", _UHD, {"textvqa": replace(_UHD, ocr=True), "mmbench": AS_IS})

PRESETS: dict[str, Preset] = {"llava_1_5": _LLAVA_1_5, "llava_uhd": _LLAVA_UHD}


def choose_protocol(
    format: str, preset: str | None, *, ocr: bool | None = None, long_side: int | Literal["original"] | None = None
) -> tuple[Protocol, dict[str, Any]]:
    """Return the protocol of a question set, and the settings in which it differs from its preset.

    Args:
        format: format of the set's files.
        preset: key of `PRESETS`; None for `AS_IS`.
        ocr: the set's own choice about OCR tokens; None for the preset's.
        long_side: the run's own longer side in pixels, or "original" for unchanged images; None for the preset's.

    Returns:
        The protocol, and name -> value of each setting that the preset has otherwise; empty without a preset.
    """
    published = PRESETS[preset].protocol(format) if preset else AS_IS
    own: dict[str, Any] = {} if ocr is None else {"ocr": ocr}
    own |= {} if long_side is None else {"long_side": None if long_side == "original" else long_side}
    changes = {name: value for name, value in own.items() if value != getattr(published, name)}
    return replace(published, **own), changes if preset else {}

"""Learning rate and native-expert weight as functions of the global step, so that a resumed run needs no state for them."""

import math


def learning_rate(step: int, num_steps: int, *, peak: float, warmup_ratio: float) -> float:
    """Linear warm-up from 0, then a cosine down to 0 (paper, section 4.1; the ratio is LLaVA-1.5's).

    Args:
        step: 0-based optimiser step.
        num_steps: of the whole stage.
        peak: largest rate.
        warmup_ratio: share of the steps that rise.
    """
    num_warmup = math.ceil(num_steps * warmup_ratio)
    if step < num_warmup:
        return peak * (step + 1) / (num_warmup + 1)
    progress = (step - num_warmup) / max(num_steps - num_warmup, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def native_weight(step: int, num_steps: int, *, full: float, warmup: float) -> float:
    """Weight of the native expert: rises linearly from 0 to ``full`` = 1 - lambda (paper, section 3.3, eq. 5).

    Args:
        step: 0-based optimiser step.
        num_steps: of the whole stage.
        full: weight after the warm-up.
        warmup: share of the steps in which it rises; 0 gives ``full`` at once.
    """
    num_warmup = round(num_steps * warmup)
    return full if step >= num_warmup else full * step / num_warmup

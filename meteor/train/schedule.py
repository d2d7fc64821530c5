"""Learning rate and native-expert weight as functions of the global step, so that resuming needs no state for them."""

import math


def learning_rate(step: int, num_steps: int, *, peak: float, warmup_ratio: float) -> float:
    """Return the learning rate: linear warm-up from 0, then a cosine to 0 (paper, section 4.1).

    The default warm-up ratio is LLaVA-1.5's.

    Args:
        step: optimiser step, from 0.
        num_steps: number of steps of the whole stage.
        peak: largest learning rate.
        warmup_ratio: share of the steps in which the rate rises, 0 to 1.
    """
    num_warmup = math.ceil(num_steps * warmup_ratio)
    if step < num_warmup:
        # The first step already has a rate above 0, and the first step after the warm-up has the peak.
        return peak * (step + 1) / (num_warmup + 1)
    progress = (step - num_warmup) / max(num_steps - num_warmup, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def native_weight(step: int, num_steps: int, *, full: float, warmup: float) -> float:
    """Return the native expert's weight, which rises linearly from 0 to ``full`` = 1 - lambda (section 3.3, equation 5).

    Args:
        step: optimiser step, from 0.
        num_steps: number of steps of the whole stage.
        full: weight after the warm-up.
        warmup: share of the steps in which the weight rises, 0 to 1; 0 gives ``full`` from the start.
    """
    num_warmup = round(num_steps * warmup)
    return full if step >= num_warmup else full * step / num_warmup

"""Learning-rate schedules: a factor that depends on the step alone, so that a resumed run needs no state of them."""

from __future__ import annotations

import math

from apt_train.config import ScheduleSettings


def learning_rate_factor(settings: ScheduleSettings, step: int, num_steps: int) -> float:
    """What the learning rate of a step, from 0 on, is multiplied by.

    Linear warm-up, then half a cosine (arXiv 1608.03983), or stable and a linear decay (WSD, arXiv 2404.06395).
    """
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    start = settings.warmup_steps
    match settings.kind:
        case "constant":
            return 1.0
        case "wsd":
            start = max(num_steps - round(settings.decay_share * num_steps), start)
    if step < start:
        return 1.0
    share = min((step - start + 1) / max(num_steps - start, 1), 1.0)
    falling = 1 - share if settings.kind == "wsd" else 0.5 * (1 + math.cos(math.pi * share))
    return settings.final_factor + (1 - settings.final_factor) * falling

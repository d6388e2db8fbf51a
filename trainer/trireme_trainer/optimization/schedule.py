"""The learning rate as a pure function of tokens (OPT, arXiv 2205.01068 §2.2)."""

from __future__ import annotations

from trireme_api.recipe import Recipe


def learning_rate(recipe: Recipe, tokens: float) -> float:
    """Rate of the step that completes `tokens` tokens of training.

    Linear from 0 to the peak over `warmupTokens`, then linear to `finalFraction` of the peak at `decayTokens` (left
    out: the end of training), then constant. A warm-up that outlasts the decay simply goes on to its end.
    """
    peak, schedule = recipe.optimizer.learning_rate, recipe.schedule
    warmup = schedule.warmup_tokens
    if tokens < warmup:
        return peak * tokens / warmup
    if schedule.decay == "constant":
        return peak
    end = max(schedule.decay_tokens or recipe.total_steps * recipe.batch.tokens, warmup)
    if tokens >= end:
        # A warm-up that ends where training ends has reached the peak, and there is no decay to speak of.
        return peak if end == warmup == tokens else peak * schedule.final_fraction
    share = (tokens - warmup) / (end - warmup)
    return peak * (1 - share * (1 - schedule.final_fraction))

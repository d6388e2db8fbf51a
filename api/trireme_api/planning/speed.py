"""Seconds of a step, by a model with two numbers for each kind of device; fitted to runs that others have published.

Products reach the share `best · width / (width + half)` of the device's peak, whatever else the layers do counted in.
Collectives hide behind the passes as far as these last; the first unit's gathering and the last one's reduction do not.
Sums of a tensor group hide behind nothing: what follows needs them. Then the optimiser goes through its state once, at
the speed of memory. Not fitted to this project's trainer: that was not measured on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass

from trireme_api.devices import Board
from trireme_api.families.memory import state_memory
from trireme_api.flops import TokenFlops
from trireme_api.planning import traffic
from trireme_api.planning.setting import Setting

TERA = 1e12
MODEL_ERROR = 1.3
"""A published run is within this factor of what the model says, either way (tests/unit/test_plan.py)."""


@dataclass(frozen=True)
class Efficiency:
    best: float
    """Of peak, at endless width."""
    half: float
    """Width at which half of that is reached."""
    source: str

    def at(self, width: int) -> float:
        return self.best * width / (width + self.half)


_AMPERE = Efficiency(0.52, 150, "fitted to runs on A100: llm-foundry, the FSDP paper, OPT-175B")
_HOPPER = Efficiency(0.43, 300, "fitted to runs on H100: llm-foundry, torchtitan, Llama 3")
EFFICIENCY = {
    "a100-80": _AMPERE,
    "a100-40": _AMPERE,
    "h100": _HOPPER,
    "h200": _HOPPER,
}
_OTHERS = Efficiency(_HOPPER.best, _HOPPER.half, "that of H100: no run on this device was found")
OPTIMIZER_TRAFFIC = 7 / 4
"""Weights, gradients and moments are read, all but gradients written: of the bytes of all four."""


@dataclass(frozen=True)
class Speed:
    step_seconds: float
    compute_seconds: float
    traffic_seconds: float
    """As long as collectives last, hidden or not."""
    tokens_per_second: float
    """All devices together."""
    model_tflops: float
    """Per device, as the trainer reports it."""
    mfu: float | None
    source: str


def expected(setting: Setting, tflops: float | None = None) -> Speed | None:
    """`tflops`: model TFLOPS per device that were measured, in place of the model. None where nothing can be said."""
    recipe, board = setting.recipe, setting.board
    flops = TokenFlops.of(setting.config, recipe)
    peak = board.peak.of(recipe.precision) if board is not None and board.peak is not None else None
    moved = summed = 0.0
    if board is not None:
        found = traffic.of(setting)
        moved = found.seconds(board)
        summed = found.seconds_of_sums(board, within=setting.spread.tensor <= setting.per_node)
    if tflops is not None:
        compute = recipe.batch.tokens / setting.ranks * flops.model / (tflops * TERA)
        step, source = compute, "model TFLOPS as given"
    elif peak is None or board is None:
        return None
    else:
        efficiency = EFFICIENCY.get(board.name, _OTHERS)
        tokens = setting.share.micro_batches * setting.micro_batch.tokens
        compute = tokens * flops.hardware / setting.spread.tensor / (peak * efficiency.at(setting.config.width))
        state = state_memory(setting.config, setting.shards).total * OPTIMIZER_TRAFFIC
        hidden = moved - summed
        exposed = summed + hidden / setting.passes / (setting.config.layers + 1)
        step = max(compute, hidden) + exposed + state / board.memory_bandwidth
        source = efficiency.source
    rate = recipe.batch.tokens / step
    model = rate / setting.ranks * flops.model
    return Speed(step, compute, moved, rate, model / TERA, model / peak if peak else None, source)


def of_board(board: Board) -> Efficiency:
    return EFFICIENCY.get(board.name, _OTHERS)

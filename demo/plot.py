"""The loss curve with the restart marked: as characters for the terminal, and as a PNG."""

from __future__ import annotations

import os
from pathlib import Path

from demo.curve import Curve

RESTART = "┊"


def terminal(curve: Curve, entropy: float, width: int = 72, height: int = 16) -> str:
    """Loss over steps; the dotted line is the unigram entropy, the bars are restarts."""
    losses = curve.newest()
    if not losses:
        return "(no step was written)"
    steps, values = list(losses), list(losses.values())
    low, high = min([*values, entropy]), max([*values, entropy])
    span = (high - low) or 1.0
    last = max(steps[-1], 2)
    grid = [[" "] * width for _ in range(height)]

    def column(step: int) -> int:
        return round((step - 1) / (last - 1) * (width - 1))

    def line(value: float) -> int:
        return round((high - value) / span * (height - 1))

    for x in range(0, width, 2):
        grid[line(entropy)][x] = "·"
    for row in curve.restarts():
        for y in range(height):
            grid[y][column(row.step)] = RESTART
    for step, value in losses.items():
        grid[line(value)][column(step)] = "•"
    lines = []
    for y, cells in enumerate(grid):
        value = high - span * y / (height - 1)
        label = f"{value:7.2f} " if y % 3 == 0 or y == height - 1 else " " * 8
        lines.append(label + "│" + "".join(cells).rstrip())
    lines.append(" " * 8 + "└" + "─" * width)
    lines.append(" " * 9 + "step 1" + f"step {steps[-1]}".rjust(width - 6))
    lines.append(f"         • loss   · unigram entropy {entropy:.2f}   {RESTART} restart from a checkpoint")
    return "\n".join(lines)


def picture(curve: Curve, entropy: float, target: Path, title: str) -> None:
    """The same as a PNG; steps that two attempts did are drawn twice, to show that they agree."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5), dpi=120)
    styles = ({"linewidth": 4.5, "alpha": 0.35}, {"linewidth": 1.6, "alpha": 1.0})
    for number, attempt in enumerate(curve.attempts()):
        rows = curve.of(attempt)
        axes.plot([r.step for r in rows], [r.loss for r in rows], label=f"attempt {attempt}", **styles[min(number, 1)])
    axes.axhline(entropy, color="grey", linestyle=":", label=f"unigram entropy {entropy:.2f}")
    for row in curve.restarts():
        axes.axvline(row.step, color="tab:red", linestyle="--", linewidth=1)
        axes.annotate("restart", (row.step, axes.get_ylim()[1]), color="tab:red", ha="left", va="top", fontsize=9)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title)
    axes.legend()
    axes.grid(alpha=0.2)
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
    pyplot.close(figure)

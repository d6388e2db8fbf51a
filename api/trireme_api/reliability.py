"""How often a gang fails, how often to save, and what is left of the time. Pure.

Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974: √(2·C·M), with C the seconds
of work a save costs and M the mean time between failures; Daly, FGCS 22(3), 2006, bounds its use to C < M/2. Before a
job has failures of its own, M is that of Meta's research cluster (arXiv 2410.21680): 7.9 h for 1,024 GPUs, 8 a node.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

PRIOR_NODE_SECONDS = 7.9 * 3600 * 128
"""Between failures of one node."""


@dataclass(frozen=True)
class FailureRate:
    """What a large run went through."""

    name: str
    gpu_hours: float
    """Between two interruptions of the job, per GPU of it."""
    source: str


FAILURE_RATES = (
    FailureRate("Meta RSC", 7.9 * 1024, "arXiv 2410.21680: 7.9 h between failures at 1,024 A100"),
    FailureRate(
        "OPT-175B",
        992 * 60 * 24 / 105,
        "2205.01068 §2.5: 35 manual and about 70 automatic restarts, 992 A100, 2 months",
    ),
    FailureRate(
        "Llama 3 405B", 16384 * 54 * 24 / 419, "2407.21783 §3.3: 419 unexpected interruptions in 54 days, 16,384 H100"
    ),
)
"""From the most failures to the fewest. The first is also what a job counts with before it has failures of its own."""


def mean_time_between_failures(nodes: int, failures: int, seconds: float) -> float:
    """Seconds for the whole gang: `failures` seen in `seconds` of running, and the prior counted as one more failure.

    The mean of a Poisson rate under a Gamma(1) prior: the prior fades as the job gathers experience.
    """
    return (PRIOR_NODE_SECONDS / max(nodes, 1) + max(seconds, 0.0)) / (1 + max(failures, 0))


def young(cost: float, mtbf: float) -> float:
    """Seconds between saves that lose least; `mtbf` where saves cost more than half of it (Daly)."""
    return math.sqrt(2 * cost * mtbf) if cost < mtbf / 2 else mtbf


def goodput(*, cost: float, every: float, recovery: float, mtbf: float) -> float:
    """Share of the time that makes progress: each interval is followed by a save, each failure costs its recovery and
    on average half an interval done again.

    >>> round(goodput(cost=5, every=600, recovery=250, mtbf=7.9 * 3600), 3)
    0.973
    """
    return max(0.0, (1 - (recovery + every / 2) / mtbf)) * every / (every + cost)

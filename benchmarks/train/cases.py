"""What is measured: model × sharding × precision × compile, with shapes that fit the device at hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VOCABULARY = 4096
"""Of the corpus; the models keep their own 50,272 rows."""


@dataclass(frozen=True)
class Case:
    preset: str
    ranks: int
    sequence: int
    micro: int
    """Sequences per micro-batch."""
    accumulate: int
    """Micro-batches per rank and step."""
    shard: str = "full"
    precision: str = "fp32"
    compile: bool = False
    recompute: bool = False
    steps: int = 8
    warm: int = 2
    """Steps at the beginning that are not timed."""

    @property
    def name(self) -> str:
        extra = ("+compile" if self.compile else "") + ("+recompute" if self.recompute else "")
        return f"{self.preset} {self.shard} {self.precision}{extra}"

    @property
    def shape(self) -> str:
        return f"{self.ranks} × {self.accumulate} × {self.micro} × {self.sequence}"

    @property
    def tokens(self) -> int:
        """Of one optimiser step."""
        return self.ranks * self.accumulate * self.micro * self.sequence

    @property
    def sequences(self) -> int:
        return self.tokens // self.sequence

    def recipe(self, corpus: Path) -> dict[str, Any]:
        """Constant learning rate and no dropout, so that both trainers must report the same losses."""
        overrides: dict[str, Any] = {"dropout": 0.0, "attentionDropout": 0.0}
        return {
            "model": {"preset": self.preset, "overrides": overrides},
            "data": {"sources": [{"path": str(corpus)}], "sequenceLength": self.sequence},
            "batch": {"tokens": self.tokens, "micro": self.micro},
            "optimizer": {"learningRate": 1e-4},
            "schedule": {"warmupTokens": 0, "finalFraction": 1.0},
            "precision": self.precision,
            "parallelism": {"shard": self.shard},
            "activationCheckpointing": self.recompute,
            "compile": self.compile,
            "until": {"steps": self.steps},
        }


def for_cpu() -> list[Case]:
    """About ten minutes on two cores."""
    small: dict[str, Any] = {"ranks": 2, "sequence": 256, "micro": 2, "accumulate": 1}
    return [
        Case("opt-8m", **small),
        Case("opt-8m", **small, shard="grad-op"),
        Case("opt-8m", **small, precision="bf16"),
        Case("opt-125m", ranks=2, sequence=128, micro=1, accumulate=1, steps=4, warm=1),
        Case("opt-8m", **small, compile=True),
    ]


def for_gpu(ranks: int) -> list[Case]:
    """One node. Batches grow with the model's own until the memory of an 80 GB device is well used."""
    cases = []
    for preset, micro in (("opt-125m", 16), ("opt-350m", 8), ("opt-1.3b", 4)):
        shape: dict[str, Any] = {"ranks": ranks, "sequence": 2048, "micro": micro, "accumulate": 2}
        shape |= {"precision": "bf16", "steps": 30, "warm": 10}
        cases += [Case(preset, **shape), Case(preset, **shape, compile=True)]
        if ranks > 1:
            cases.append(Case(preset, **shape, shard="grad-op"))
    cases.append(Case("opt-125m", ranks, 2048, 8, 2, steps=15, warm=5))
    cases.append(Case("opt-1.3b", ranks, 2048, 8, 2, precision="bf16", compile=True, recompute=True, steps=20, warm=5))
    return cases


def write_corpus(directory: Path, cases: Sequence[Case]) -> Path:
    """Enough made-up text for the longest case, as `trireme prepare` writes it. The same on every machine."""
    import numpy as np
    from trireme_trainer.data.prepare import Options, prepare

    samples = max(case.sequences * case.steps * (case.sequence + 1) for case in cases)
    generator = np.random.Generator(np.random.PCG64(1))
    letters = np.array(list("etaoinshrdlucmfw"))
    words = ["".join(generator.choice(letters, size=generator.integers(2, 9))) for _ in range(8000)]
    ranks = generator.zipf(1.2, size=math.ceil(samples * 1.2) + 20000) % len(words)
    text = directory / "text"
    text.mkdir(parents=True)
    lines = [" ".join(words[i] for i in row) for row in np.array_split(ranks, max(1, len(ranks) // 200))]
    (text / "words.txt").write_text("\n\n".join(lines))
    output = directory / "corpus"
    prepare([str(text)], str(output), Options(vocabulary=VOCABULARY, separator="blank-line", valid_fraction=0.0))
    return output

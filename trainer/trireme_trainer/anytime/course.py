"""Anytime learning inside a run (`recipe.anytime`): which session is in turn, what it trains on, growth before it.

A session is one attempt of the gang: its ranks save at its end and end with exit code 75. Whoever starts them again
(the operator, `trireme run`) does so when the next mega-batches are there. Everything follows from the newest good
checkpoint: its step says which session is in turn, its `meta` how large the model has grown. Growth is done before a
session's first step and is a function of (that checkpoint, the new mega-batches, seed): an attempt that is lost before
its first save grows the same way again. No counterpart in the released code, which knows no jobs; a reconstruction.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from trireme_api.anytime import Session, Stream, numbered
from trireme_api.families import ModelConfig
from trireme_api.protocol import CheckpointRef
from trireme_api.recipe import Recipe

from trireme_trainer.anytime.capacity import as_grown, difference, larger
from trireme_trainer.anytime.language import UNITS, carry_over
from trireme_trainer.checkpoint import CheckpointStore
from trireme_trainer.checkpoint.loader import load_newest
from trireme_trainer.checkpoint.ranks import Ranks
from trireme_trainer.checkpoint.state import model_state
from trireme_trainer.data.errors import DataError
from trireme_trainer.data.manifest import MANIFEST
from trireme_trainer.data.mixture import Mixture
from trireme_trainer.data.order import derive
from trireme_trainer.families import LanguageModel
from trireme_trainer.lifecycle.outcome import BadRecipe, CheckpointFailed
from trireme_trainer.optimization.optimizer import Optimizer
from trireme_trainer.parallel.initialise import initialise
from trireme_trainer.parallel.world import World
from trireme_trainer.settings import Settings
from trireme_trainer.storage import open_filesystem
from trireme_trainer.telemetry.heartbeat import Pulse
from trireme_trainer.telemetry.reporting import Reporter

log = logging.getLogger(__name__)
BLOCKS = 32
"""Held-out blocks of the new mega-batches that usage is measured on, as `trireme grow` does by default."""


class Course:
    """Where a run stands in its stream of mega-batches. The same on every rank."""

    def __init__(self, recipe: Recipe, config: ModelConfig, step: int, sessions: list[dict[str, Any]]) -> None:
        stream = recipe.stream
        assert stream is not None
        self._recipe = recipe
        self._stream: Stream = stream
        self._sessions = sessions
        self.step = step
        """Optimiser steps done when this attempt began."""
        self.config = config
        """The model as it was then."""
        self.session: Session = stream.at(step)
        data = recipe.of_session(self.session)
        if self.session.number:
            # Or replay would draw the same blocks of a mega-batch again and again.
            data = data.model_copy(update={"seed": derive(recipe.seed, self.session.number) & 0x7FFFFFFF})
        self.data: Recipe = data
        """The recipe with the data of this session, and their order's seed."""
        self.lacking: str = ""
        """The directory of a mega-batch that is not there; this attempt cannot train then."""

    @classmethod
    def open(cls, settings: Settings, base: ModelConfig, pulse: Pulse) -> Course | None:
        """From the newest good checkpoint; None for a recipe without `anytime`. Collective.

        Raises BadRecipe where the checkpoint is of another stream, CheckpointError where none is usable."""
        recipe = settings.recipe
        if recipe.anytime is None:
            return None
        if settings.checkpoint is None:
            raise BadRecipe("anytime: needs a checkpoint to go on from between its sessions; give checkpoint.uri")
        store, ranks = CheckpointStore(settings.checkpoint.uri), Ranks()
        config, step, sessions = base, 0, list[dict[str, Any]]()
        there = ranks.on_first(lambda: store.exists() and bool(store.candidates()))
        found = load_newest(store, ranks, {}, strict=False) if there else None
        if found is not None:
            step, sessions = found.step, list(found.meta.get("anytime", {}).get("sessions", []))
            config = as_grown(base, found.meta.get("model", {}))
            pulse.beat(step=step, checkpoint=CheckpointRef(step=step, path=found.path))
        course = cls(recipe, config, step, sessions)
        if found is not None and step:
            course._check(found.meta, found.path)
        if course.begins:
            course.lacking = ranks.on_first(course._missing)
        ranks.close()
        return course

    @property
    def begins(self) -> bool:
        """Whether this attempt makes the first step of its session."""
        return self.step == self.session.first_step

    @property
    def grows(self) -> bool:
        return self.begins and self.session.growths > self.config.growths - self._base_growths

    @property
    def _base_growths(self) -> int:
        """The preset may have grown before this run."""
        return int(self._sessions[0]["growths"]) if self._sessions else self.config.growths

    def _missing(self) -> str:
        for source in self.data.data.sources:
            filesystem, path = open_filesystem(source.path)
            if not filesystem.exists(f"{path.rstrip('/')}/{MANIFEST}"):
                return source.path
        return ""

    def _settings(self) -> dict[str, Any]:
        kept = self._stream.spec.model_dump(by_alias=True, exclude={"arrived"})
        return {**kept, "steps": self._stream.total_steps}

    def _check(self, meta: Mapping[str, Any], path: str) -> None:
        before = meta.get("anytime")
        if not isinstance(before, Mapping):
            raise BadRecipe(f"anytime: {path} is of a run without it; remove it, or use another checkpoint.uri")
        for name, value in self._settings().items():
            if before.get(name) != value:
                field = "until" if name == "steps" else f"anytime.{name}"
                raise BadRecipe(
                    f"{field}: was {before.get(name)} when {path} was written, is {value}: sessions would be others; "
                    "restore it, or use another checkpoint.uri"
                )

    def meta(self) -> dict[str, Any]:
        """What goes with every checkpoint."""
        return {**self._settings(), "session": self.session.number, "sessions": self._sessions}

    def resumed(self, step: int) -> None:
        """Raises CheckpointFailed where storage changed since this attempt looked which session is in turn."""
        if step != self.step:
            raise CheckpointFailed(f"resumed at step {step}, though step {self.step} was the newest a moment ago")

    def grow(
        self, model: LanguageModel, optimizer: Optimizer, samples: Mixture, world: World, reporter: Reporter,
        make: Callable[[ModelConfig], tuple[LanguageModel, Optimizer]],
    ) -> tuple[ModelConfig, LanguageModel, Optimizer]:  # fmt: skip
        """By an expert more in every layer, or a member more; what is trained is the same function, with its moments.
        Collective; for a moment both models lie sharded on the ranks."""
        how = larger(model, lambda: self._held_out(samples), world)
        grown, its_optimizer = make(how.config)
        initialise(grown, self._recipe.seed)
        before, after = optimizer.state_dict(), its_optimizer.state_dict()
        carry_over(model_state(model), how.parent, model_state(grown))
        for kind in ("exp_avg", "exp_avg_sq"):
            carry_over(before[kind], how.parent, after[kind])
        its_optimizer.loaded(before)
        some = torch.from_numpy(samples.sample(0)[:-1]).unsqueeze(0)
        changed = difference(model, grown, some.to(world.device))
        allowed = UNITS[self._recipe.precision]
        if changed > allowed:
            raise RuntimeError(f"growth changed a logit by {changed:.1e} of the largest, more than {allowed:.0e}")
        total = how.config.parameters().total
        reporter.event("grown", step=self.step, difference=changed, parameters=total, **how.told)
        log.info("grown to %s parameters, %s", f"{total:,}", how.size)
        self.config = how.config
        return how.config, grown, its_optimizer

    def _held_out(self, samples: Mixture) -> list[Tensor]:
        """Up to BLOCKS of them, [1, length] each, evenly from what the new mega-batches hold out."""
        new = {numbered(source.path, n) for source in self._recipe.data.sources for n in self.session.new}
        kept = [samples.valid_blocks(i) for i, source in enumerate(samples.sources) if source.path in new]
        rows = [(blocks, number) for blocks in kept for number in range(len(blocks))]
        if not rows:
            first, last = self.session.new.start, self.session.new.stop - 1
            raise DataError(
                f"data.sources: mega-batch {first}{f' to {last}' if last > first else ''} holds no block of "
                f"{samples.sequence_length + 1} tokens out, on which growth measures usage; prepare it with "
                "--valid-fraction above 0"
            )
        taken = min(BLOCKS, len(rows))
        picked = [rows[i * len(rows) // taken] for i in range(taken)]
        return [torch.from_numpy(blocks[number][:-1]).unsqueeze(0) for blocks, number in picked]

    def ended(self, evaluation: Mapping[str, Any], flops_per_token: float, reporter: Reporter) -> None:
        """Enters the session that ends into the course: what the model costs and, where evaluation.sources has a text
        that stays the same, how wrong it is. `flops_per_token`: of training."""
        trained = (self.session.end_step - self.session.first_step) * self._recipe.batch.tokens
        row: dict[str, Any] = {
            "megaBatches": self.session.new.stop - 1, "step": self.session.end_step, "growths": self.config.growths,
            "parameters": self.config.parameters().total, "flops": flops_per_token * trained,
        }  # fmt: skip
        fixed = len(self._recipe.evaluation.sources) if self._recipe.evaluation else 0
        texts = [text for text in evaluation.get("heldOut", []) if text["source"] is not None]
        if fixed:
            row["nats"] = round(sum(text["loss"] * text["tokens"] for text in texts[-fixed:]), 3)
        self._sessions.append(row)
        total = cumulative(self._sessions)
        reporter.event("session-ended", **row, cumulative=total)
        told = ", ".join(f"{name} {value:,.6g}" for name, value in total.items())
        log.info("session %d ended, %d mega-batches; cumulative: %s", self.session.number + 1, row["megaBatches"], told)


def cumulative(sessions: list[dict[str, Any]]) -> dict[str, float]:
    """The paper's three sums over the stream so far: after each mega-batch the newest model counts, so one that serves
    while the learner waits counts for each that has arrived meanwhile. From the first trained model on."""
    ends = [row["megaBatches"] for row in sessions]
    serves = [after - before for before, after in zip(ends, [*ends[1:], ends[-1] + 1], strict=True)]
    sums = {"parameters": 0.0, "flops": float(sum(row["flops"] for row in sessions))}
    for row, times in zip(sessions, serves, strict=True):
        sums["parameters"] += times * row["parameters"]
        if "nats" in row:
            sums["nats"] = sums.get("nats", 0.0) + times * row["nats"]
    return sums

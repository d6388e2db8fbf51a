"""When state is saved, what goes with it, and whether a checkpoint that was found belongs to this recipe."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from time import perf_counter
from typing import Any

from trireme_api.families import ModelConfig
from trireme_api.protocol import CheckpointRef
from trireme_api.recipe import CheckpointSpec, Recipe

from trireme_trainer.checkpoint import Checkpointer, CheckpointStore, model_state
from trireme_trainer.data.mixture import Mixture
from trireme_trainer.families import LanguageModel
from trireme_trainer.optim import Optimizer
from trireme_trainer.outcome import BadData, BadRecipe
from trireme_trainer.parallel.initialise import initialise
from trireme_trainer.reporting import Reporter
from trireme_trainer.settings import Settings

log = logging.getLogger(__name__)
MAY_CHANGE = frozenset({"dropout", "attention_dropout"})
"""Numbers of a model that another run of it may set otherwise: no weight depends on them."""


class Saver:
    """All checkpointing of one attempt; without a `checkpoint` spec it keeps nothing and every call is a no-op."""

    def __init__(
        self, settings: Settings, config: ModelConfig, mixture: Mixture, model: LanguageModel, optimizer: Optimizer
    ) -> None:
        self._recipe: Recipe = settings.recipe
        self._spec: CheckpointSpec | None = settings.checkpoint
        self._config = config
        self._mixture = mixture
        self._model = model
        self._optimizer = optimizer
        self._announced = settings.resume
        self._checkpointer: Checkpointer | None = None
        if settings.checkpoint:
            self._checkpointer = Checkpointer(
                CheckpointStore(settings.checkpoint.uri),
                attempt=settings.attempt,
                keep=settings.checkpoint.keep,
                owner=settings.owner,
            )

    @property
    def keeps(self) -> bool:
        return self._checkpointer is not None

    def resume(self, reporter: Reporter) -> int:
        """Weights and optimiser from the newest good checkpoint, or initial values. Returns optimiser steps done."""
        state = self._state()
        loaded = self._checkpointer.load(state, known=self._announced) if self._checkpointer else None
        for path in self._checkpointer.abandoned if self._checkpointer else ():
            reporter.event("checkpoint-abandoned", path=path, reason="cut short by the end of an earlier attempt")
        if loaded is None:
            initialise(self._model, self._recipe.seed)
            log.info("starting from initial values, seed %d", self._recipe.seed)
            return 0
        for path, reason in loaded.skipped:
            reporter.event("checkpoint-skipped", path=path, reason=reason)
        check_same_run(loaded.meta, self._recipe, self._config, self._mixture, loaded.path)
        self._optimizer.loaded(state["optimizer"])
        ref = CheckpointRef(step=loaded.step, path=loaded.path)
        reporter.pulse.beat(checkpoint=ref)
        reporter.event(
            "resumed", step=loaded.step, path=loaded.path, worldSizeThen=loaded.manifest.world_size,
            verifySeconds=round(loaded.verify_seconds, 4), readSeconds=round(loaded.read_seconds, 4),
        )
        log.info("resumed from %s, written by %d ranks", loaded.path, loaded.manifest.world_size)
        return loaded.step

    def due(self, step: int) -> bool:
        return self._spec is not None and step % self._spec.every_steps == 0

    def save(self, step: int, reporter: Reporter) -> None:
        """Takes a copy of the state after `step` steps; it is written while training goes on."""
        if self._checkpointer is None:
            return
        begin = perf_counter()
        with reporter.meter.outside("checkpoint-blocked"):
            reporter.pulse.beat("checkpoint")
            self._checkpointer.save(step, self._state(), self._meta(step))
        reporter.checkpoint_blocked(perf_counter() - begin)

    def poll(self, reporter: Reporter) -> None:
        """Announces what was committed meanwhile."""
        if self._checkpointer is None:
            return
        for ref in self._checkpointer.poll():
            timing = next((t for t in reversed(self._checkpointer.timings) if t.step == ref.step), None)
            times = {} if timing is None else {
                "blocked": timing.blocked, "staging": timing.staging, "writing": timing.writing,
                "committing": timing.committing, "total": timing.total,
            }
            reporter.committed(ref, times)
        for failure in self._checkpointer.failures():
            reporter.event("checkpoint-failed", reason=str(failure))

    def finish(self, step: int, reporter: Reporter) -> None:
        """Saves this step unless it is saved already, and returns when it is committed. Raises SaveFailed."""
        if self._checkpointer is None:
            return
        self.save(step, reporter)
        with reporter.meter.outside("checkpoint-blocked"):
            self._checkpointer.wait()
        self.poll(reporter)

    def drain(self, reporter: Reporter) -> None:
        """Lets a save in flight end; for ends that all ranks reach together."""
        if self._checkpointer is not None:
            self._checkpointer.wait()
            self.poll(reporter)

    def close(self) -> None:
        if self._checkpointer is not None:
            self._checkpointer.close()

    def _state(self) -> dict[str, Any]:
        return {"model": model_state(self._model), "optimizer": self._optimizer.state_dict()}

    def _meta(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "tokens": step * self._recipe.batch.tokens,
            "batchTokens": self._recipe.batch.tokens,
            "data": self._mixture.identity,
            "model": {"family": self._config.family, "preset": self._recipe.model.preset, **self._config.model_dump()},
        }


def check_same_run(meta: Mapping[str, Any], recipe: Recipe, config: ModelConfig, mixture: Mixture, path: str) -> None:
    """Raises BadRecipe or BadData, naming the fields, where going on from this checkpoint would not be the same run."""
    saved = meta.get("model", {})
    now = config.model_dump()
    changed = [
        f"{name} was {saved[name]}, is {value}"
        for name, value in now.items()
        if name not in MAY_CHANGE and name in saved and saved[name] != value
    ]
    if changed:
        raise BadRecipe(
            f"model: {path} is of another model ({'; '.join(changed)}); restore it, or use another checkpoint.uri"
        )
    if "imported" in meta:
        return  # weights alone: no batch was trained and no sample read yet
    if meta.get("batchTokens") != recipe.batch.tokens:
        raise BadRecipe(
            f"batch.tokens: was {meta.get('batchTokens')} when {path} was written, is {recipe.batch.tokens}: the "
            "position in the data would move; restore it, or use another checkpoint.uri"
        )
    moved = mixture.changes_since(meta.get("data", {}))
    if moved:
        raise BadData(
            f"data: {'; '.join(moved)} since {path} was written, so the order of samples is another; restore it, or "
            "use another checkpoint.uri"
        )

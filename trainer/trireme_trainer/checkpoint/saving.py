"""When state is saved, and what goes with it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from time import perf_counter
from typing import Any

from trireme_api.families import ModelConfig
from trireme_api.protocol import CheckpointRef
from trireme_api.recipe import CheckpointSpec, Recipe

from trireme_trainer.anytime.course import Course
from trireme_trainer.checkpoint import (
    Checkpointer,
    CheckpointStore,
    LoadedCheckpoint,
    NoUsableCheckpoint,
    flatten,
    model_state,
)
from trireme_trainer.checkpoint.interval import MAX_SECONDS, AutoInterval, Measured, Slowing
from trireme_trainer.checkpoint.memory_saver import MemorySaver
from trireme_trainer.checkpoint.same_run import check_same_run
from trireme_trainer.checkpoint.tiers import Restored
from trireme_trainer.families import LanguageModel
from trireme_trainer.objectives.base import Objective
from trireme_trainer.optimization.optimizer import Optimizer
from trireme_trainer.optimization.stability import RollBack, Stability
from trireme_trainer.parallel.initialise import initialise, local_bytes
from trireme_trainer.parallel.world import World
from trireme_trainer.settings import Settings
from trireme_trainer.telemetry.reporting import Reporter

log = logging.getLogger(__name__)


class Saver:
    """All checkpointing of one attempt; without a `checkpoint` spec it keeps nothing and every call is a no-op."""

    def __init__(
        self, settings: Settings, world: World, config: ModelConfig, objective: Objective, model: LanguageModel,
        optimizer: Optimizer, stability: Stability, course: Course | None = None,
    ) -> None:  # fmt: skip
        self._recipe: Recipe = settings.recipe
        self._spec: CheckpointSpec | None = settings.checkpoint
        self._settings = settings
        self._world = world
        self._config = config
        self._objective = objective
        self._samples = objective.samples
        self._model = model
        self._optimizer = optimizer
        self._stability = stability
        self._course = course
        self._announced = settings.resume
        self._auto: AutoInterval | None = None
        self._slowing = Slowing()
        self._measured: Measured | None = None
        self._began = self._mark = perf_counter()
        self._checkpointer: Checkpointer | None = None
        if settings.checkpoint:
            self._checkpointer = Checkpointer(
                CheckpointStore(settings.checkpoint.uri),
                attempt=settings.attempt,
                keep=settings.checkpoint.keep,
                owner=settings.owner,
            )
        self._memory = MemorySaver(settings)

    @property
    def keeps(self) -> bool:
        return self._checkpointer is not None

    def grown(self, config: ModelConfig, model: LanguageModel, optimizer: Optimizer) -> None:
        """From now on it is this model that is saved."""
        self._config, self._model, self._optimizer = config, model, optimizer

    def resume(self, reporter: Reporter) -> int:
        """Weights and optimiser from the newest good checkpoint, or initial values. Returns optimiser steps done."""
        done = self._resume(reporter)
        if self._spec is not None and self._spec.every_steps == "auto":
            told = self._settings.failures
            nodes = self._world.size // self._world.local_size
            self._auto = AutoInterval(done, nodes=nodes, failures=told.count, seconds=told.seconds)
        return done

    def _resume(self, reporter: Reporter) -> int:
        state = self._state()
        for path in self._checkpointer.abandoned if self._checkpointer else ():
            reporter.event("checkpoint-abandoned", path=path, reason="cut short by the end of an earlier attempt")
        loaded, restored = self._newest_good(state, reporter)
        self._memory.decided(restored, reporter)
        chosen, step = self._settings.resume_memory, restored.step if restored else loaded.step if loaded else 0
        if chosen is not None and (restored is None or step != chosen.step):
            log.warning("step %d in %s was reported and is not used; resuming at %d", chosen.step, chosen.path, step)
        if restored is not None:
            where = f"memory of attempt {restored.attempt}"
            check_same_run(restored.meta, self._recipe, self._config, self._samples, where)
            self._optimizer.loaded(state["optimizer"])
            self._went_on(restored.meta, reporter)
            reporter.event(
                "resumed", step=restored.step, path=where, tier="memory", fromPeers=restored.from_peers,
                worldSizeThen=self._world.size, verifySeconds=round(restored.verify_seconds, 4),
                moveSeconds=round(restored.move_seconds, 4), readSeconds=round(restored.read_seconds, 4),
            )  # fmt: skip
            log.info(
                "resumed step %d from %s, no storage read; %d of %d shards came from another node",
                restored.step, where, restored.from_peers, self._world.size,
            )  # fmt: skip
            return restored.step
        if loaded is None:
            initialise(self._model, self._recipe.seed)
            self._objective.reset()
            state_bytes, peak_bytes = local_bytes(self._model.parameters()), self._world.peak_memory()
            reporter.event("initialised", weightBytes=state_bytes, peakBytes=peak_bytes)
            log.info("starting from initial values, seed %d", self._recipe.seed)
            return 0
        for path, reason in loaded.skipped:
            reporter.event("checkpoint-skipped", path=path, reason=reason)
        new_data = self._course is not None and self._course.begins
        check_same_run(loaded.meta, self._recipe, self._config, self._samples, loaded.path, new_data=new_data)
        self._optimizer.loaded(state["optimizer"])
        self._went_on(loaded.meta, reporter)
        ref = CheckpointRef(step=loaded.step, path=loaded.path)
        reporter.pulse.beat(checkpoint=ref)
        reporter.event(
            "resumed", step=loaded.step, path=loaded.path, tier="storage", worldSizeThen=loaded.manifest.world_size,
            verifySeconds=round(loaded.verify_seconds, 4), readSeconds=round(loaded.read_seconds, 4),
        )
        log.info("resumed from %s, written by %d ranks", loaded.path, loaded.manifest.world_size)
        return loaded.step

    def roll_back(self, cause: RollBack, reporter: Reporter) -> int:
        """Goes back to the newest committed checkpoint before the spike, or to initial values where there is none, and
        leaves out the batches that led to it from then on. Returns optimiser steps done."""
        reporter.pulse.beat("load")
        with reporter.ledger.during("recovering"):
            self._memory.forget()
            state = self._state()
            loaded = self._checkpointer.rewind(state, cause.step - 1) if self._checkpointer else None
            self.poll(reporter)
            if loaded is None:
                initialise(self._model, self._recipe.seed)
                self._optimizer.reset()
                self._objective.reset()
            else:
                self._optimizer.loaded(state["optimizer"])
            self._stability.rewind(loaded.meta if loaded else {})
        done = loaded.step if loaded else 0
        reporter.ledger.rolled_back(done)
        window = self._stability.went_back(cause.step, done)
        reporter.rolled_back(
            cause, to=done, path=loaded.path if loaded else "", window=window, history=self._stability.history
        )
        return done

    def _went_on(self, meta: Mapping[str, Any], reporter: Reporter) -> None:
        self._stability.load(meta)
        reporter.rollbacks = self._stability.history.rollbacks

    def _newest_good(
        self, state: dict[str, Any], reporter: Reporter
    ) -> tuple[LoadedCheckpoint | None, Restored | None]:
        """Fills `state` from the newest checkpoint of either tier that is complete and intact. Collective.

        Storage is looked at by the names in its root; it is read only where it is newer, or memory is no use.
        """
        if self._checkpointer is None:
            return None, None
        kept = self._memory.newest()
        stored = self._checkpointer.newest() if kept is not None else None
        while kept is not None:
            if stored is not None and stored > kept:
                try:
                    loaded = self._checkpointer.load(state, newer_than=kept)
                    if loaded is not None:
                        return loaded, None
                except NoUsableCheckpoint as error:
                    stored = None
                    reporter.event("checkpoint-skipped", path=self._spec.uri if self._spec else "", reason=str(error))
            restored, kept = self._memory.restore(flatten(state))
            if restored is not None:
                return None, restored
        return self._checkpointer.load(state, known=self._announced), None

    def after_step(self, step: int, reporter: Reporter) -> None:
        """Saves what is due after `step` steps, in either tier."""
        if self._checkpointer is None or self._spec is None:
            return
        self._slowing.step(perf_counter() - self._mark, saving=self._checkpointer.saving)
        if self._memory.due(step):
            self._memory.save(step, flatten(self._state()), self._meta(step), reporter)
        if self._due(step, reporter):
            self.save(step, reporter)
        self._mark = perf_counter()

    def _due(self, step: int, reporter: Reporter) -> bool:
        assert self._spec is not None
        if self._spec.every_steps != "auto":
            return step % self._spec.every_steps == 0
        assert self._auto is not None
        before = self._auto.steps
        running = perf_counter() - self._began
        due = self._auto.due(step, running, self._measured, lambda v: self._world.mean(v).tolist())
        if self._auto.steps is not None and self._auto.steps != before:
            told = self._auto.figures()
            reporter.event("checkpoint-interval", **told)
            log.info(
                "checkpoint every %d steps (%.3g s): a save costs %.3g s of training, a failure is expected every "
                "%.3g h (%d seen); Young: √(2 · cost · time between failures), at most %d s",
                told["steps"], told["seconds"], told["costSeconds"], told["mtbfSeconds"] / 3600, told["failures"],
                MAX_SECONDS,
            )  # fmt: skip
        return due

    def save(self, step: int, reporter: Reporter) -> None:
        """Takes a copy of the state after `step` steps; it is written while training goes on."""
        if self._checkpointer is None:
            return
        begin = perf_counter()
        self._measured = None
        with reporter.ledger.during("checkpoint-blocked"):
            reporter.ledger.saving(step)
            reporter.pulse.beat("checkpoint")
            self._checkpointer.save(step, self._state(), self._meta(step))
        reporter.pulse.beat("step")
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
            if timing is not None:
                cost = timing.blocked + self._slowing.saved()
                self._measured = Measured(cost, timing.total, self._slowing.step_seconds)
        for failure in self._checkpointer.failures():
            reporter.event("checkpoint-failed", reason=str(failure))
            # Tried again after the interval that was right before.
            self._measured = self._auto.measured if self._auto else None
        self._memory.poll(reporter)

    def finish(self, step: int, reporter: Reporter) -> None:
        """Saves this step unless it is saved already, and returns when it is committed. Raises SaveFailed."""
        if self._checkpointer is None:
            return
        self.save(step, reporter)
        reporter.pulse.beat("checkpoint")
        with reporter.ledger.during("checkpoint-blocked"):
            self._checkpointer.wait()
        self.poll(reporter)

    def drain(self, reporter: Reporter) -> None:
        """Lets a save in flight end; for ends that all ranks reach together."""
        if self._checkpointer is not None:
            reporter.pulse.beat("checkpoint")
            self._checkpointer.wait()
            self.poll(reporter)

    def close(self) -> None:
        self._memory.close()
        if self._checkpointer is not None:
            self._checkpointer.close()

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"model": model_state(self._model), "optimizer": self._optimizer.state_dict()}
        learned = self._objective.state_dict()
        return {**state, "objective": learned} if learned else state

    def _meta(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "tokens": step * self._recipe.batch.tokens,
            "batchTokens": self._recipe.batch.tokens,
            "data": self._samples.identity,
            "stability": self._stability.saved(),
            **self._objective.described(),
            **({"anytime": self._course.meta()} if self._course else {}),
            "model": {"family": self._config.family, "preset": self._recipe.model.preset, **self._config.model_dump()},
        }

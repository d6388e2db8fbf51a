"""The training loop, readable top to bottom. One code path: CUDA and NCCL where there is a GPU, else CPU and gloo."""

from __future__ import annotations

import gc
import logging
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo  # optimisers and FSDP import it at their first call, where it would delay the gang
from torch import Tensor
from trireme_api.devices import device_peak
from trireme_api.families import ModelConfig, check_recipe
from trireme_api.protocol import ExitCode
from trireme_api.recipe import Recipe

from trireme_trainer.anytime.course import Course
from trireme_trainer.checkpoint.checkpointer import versions
from trireme_trainer.checkpoint.saving import Saver
from trireme_trainer.data.batches import Batch, Batches
from trireme_trainer.data.mixture import Mixture
from trireme_trainer.data.order import derive
from trireme_trainer.families import LanguageModel, build
from trireme_trainer.lifecycle.hang import Board, HangWatch
from trireme_trainer.lifecycle.outcome import BadData, NonFinite, Stopped
from trireme_trainer.lifecycle.stop import StopRequest
from trireme_trainer.objectives import Objective, build_objective
from trireme_trainer.objectives.base import Samples
from trireme_trainer.objectives.causal_lm import IGNORED
from trireme_trainer.optimization.optimizer import Optimizer
from trireme_trainer.optimization.schedule import learning_rate
from trireme_trainer.optimization.stability import RollBack, Stability, Verdict
from trireme_trainer.parallel.collectives import CollectiveLog
from trireme_trainer.parallel.mesh import build_expert_mesh, build_mesh, build_tensor_mesh, groups
from trireme_trainer.parallel.shard import Accumulation, shard_model
from trireme_trainer.parallel.world import World
from trireme_trainer.settings import Settings
from trireme_trainer.telemetry.heartbeat import Pulse
from trireme_trainer.telemetry.ledger import Ledger
from trireme_trainer.telemetry.logbook import Logbook
from trireme_trainer.telemetry.metering import Arithmetic, Meter
from trireme_trainer.telemetry.metrics import TrainMetrics
from trireme_trainer.telemetry.pace import Pace
from trireme_trainer.telemetry.reporting import Reporter

log = logging.getLogger(__name__)
COLLECT_EVERY = 50
"""Steps between garbage collections: at the same step on every rank, or each would wait for the others' in turn."""


def train(settings: Settings, pulse: Pulse) -> ExitCode:
    """Trains until the recipe's end, or until all ranks agree to stop. Raises what `outcome.describe` can name."""
    recipe = settings.recipe
    config = check_recipe(recipe)
    stop = StopRequest(settings.stop_file).listen()
    pulse.beat("rendezvous")
    world = World.join(settings)
    pulse.reached("rendezvous")
    pulse.beat("init")
    with ExitStack() as closing:
        closing.callback(world.leave)
        closing.enter_context(_hang_watch(settings, pulse, world))
        course = Course.open(settings, config, pulse)
        if course and course.lacking:
            log.info("saved at step %d; %s is not there: waits for its mega-batch", course.step, course.lacking)
            return ExitCode.SAVED_AND_STOPPED
        config = course.config if course else config
        data = course.data if course else recipe
        reporter = closing.enter_context(_reporting(settings, config, pulse, world))
        objective = build_objective(data, config, world, settings.compile_backend if recipe.compile else None)
        _check_vocabulary(objective.samples, config)
        reporter.data(objective.told())
        mesh = build_mesh(recipe.parallelism, world)
        expert_mesh = build_expert_mesh(recipe.parallelism, world)
        tensor_mesh = build_tensor_mesh(recipe.parallelism, world)

        def make(config: ModelConfig, compiled: bool = True) -> tuple[LanguageModel, Optimizer]:
            with torch.device("meta"):
                model = build(config)
            how = recipe if compiled else recipe.model_copy(update={"compile": False})
            shard_model(model, how, mesh, world.device, settings.compile_backend, expert_mesh, tensor_mesh)
            return model, Optimizer(model, recipe.optimizer)

        grows = course is not None and course.grows
        model, optimizer = make(config, compiled=not grows)
        stability = Stability(recipe, world.device)
        saver = Saver(settings, world, config, objective, model, optimizer, stability, course)
        pulse.reached("initialised")
        pulse.beat("load")
        done = saver.resume(reporter)
        if course:
            course.resumed(done)
            if grows:
                assert isinstance(objective.samples, Mixture)
                config, model, optimizer = course.grow(model, optimizer, objective.samples, world, reporter, make)
                saver.grown(config, model, optimizer)
                reporter.meter.counts(_arithmetic(config, recipe, world))
        pulse.reached("loaded")
        logged = recipe.parallelism.log_collectives
        collectives = CollectiveLog(model, replicated=mesh.ndim > 1) if logged else None
        end = course.session.end_step if course else recipe.total_steps
        on_gpu = world.device.type == "cuda"
        batches = closing.enter_context(objective.batches(world.data_rank, world.data_size, on_gpu))
        first = course.session.first_step if course else 0
        stepper = Stepper(recipe, world, model, optimizer, batches, stop, objective, stability, pulse.ledger, first)
        pulse.beat("compile" if recipe.compile else "step", step=done)
        gc.collect()
        gc.freeze()
        gc.disable()
        pulse.ledger.resumed(done)
        reporter.meter.begin()
        unread: deque[Outcome] = deque()
        behind = steps_behind(world.device)
        started = stopping = False
        while done < end and not stopping:
            unread.append(stepper.step(done))
            done += 1
            last = done == end
            try:
                while len(unread) > (0 if last or stopping or not started else behind):
                    stopping |= settle(unread.popleft(), reporter, stability, saver, objective)
            except RollBack as cause:
                unread.clear()
                done = saver.roll_back(cause, reporter)
                continue
            if not started:
                started = True
                pulse.reached("first_step")
                spent = pulse.startup_seconds()
                reporter.event("started", step=done, peakMemoryBytes=world.peak_memory(), **spent)
                parts = ", ".join(f"{name.replace('_', ' ')} {seconds:.2f}" for name, seconds in spent.items())
                log.info("first step %.2f s after the start (%s)", sum(spent.values()), parts)
                if collectives:
                    check_order(collectives, done, reporter)
                world.limit_waiting(settings.step_timeout, groups(mesh, expert_mesh, tensor_mesh))
            if not last:
                saver.after_step(done, reporter)
            saver.poll(reporter)
            told: dict[str, Any] = {}
            if objective.due(done, last):
                with pulse.ledger.during("eval"):
                    pulse.beat("eval")
                    told = objective.evaluate(model, lambda: pulse.beat("eval"))
                    reporter.event("evaluation", step=done, **told)
                pulse.beat("step", step=done)
            if course and last:
                course.ended(told, _arithmetic(config, recipe, world).model, reporter)
            if done % COLLECT_EVERY == 0:
                gc.collect(1)
        saver.finish(done, reporter)
        pulse.ledger.enter("init")
        saver.close()
        pulse.beat("done", step=done)
        reporter.ended(done, world.peak_memory())
        if done >= recipe.total_steps:
            return ExitCode.DONE
        if not saver.keeps:
            raise Stopped(f"stopped on request after step {done}; nothing is kept, because no checkpoint is configured")
        # At the end of a session whoever started this attempt starts the next, when its data are there.
        why = "at the end of its session" if done >= end else "on request"
        log.info("saved and stopped %s after step %d", why, done)
        return ExitCode.SAVED_AND_STOPPED


def steps_behind(device: torch.device) -> int:
    """On a GPU the numbers of a step are read while the next one is computed, so that the device never waits for us."""
    return 1 if device.type == "cuda" else 0


@dataclass(frozen=True)
class Outcome:
    """One step, already on its way to the host."""

    step: int
    """Optimiser steps done after it."""
    learning_rate: float
    numbers: Readback
    """valid tokens, ranks asked to stop, loss, gradient norm, verdict, mean of recent losses, figures, loss scale."""
    figures: tuple[str, ...]
    """Names of what the model's layers tell."""


class Stepper:
    """What one optimiser step is made of."""

    def __init__(
        self, recipe: Recipe, world: World, model: LanguageModel, optimizer: Optimizer, batches: Batches,
        stop: StopRequest, objective: Objective, stability: Stability, ledger: Ledger, first: int = 0,
    ) -> None:  # fmt: skip
        """`first`: the step that the data begin with."""
        self._first = first
        self._recipe = recipe
        self._world = world
        self._model = model
        self._optimizer = optimizer
        self._batches = batches
        self._stop = stop
        self._stability = stability
        self._ledger = ledger
        self._accumulation = Accumulation(model, recipe)
        self._objective = objective
        model.train()

    def step(self, index: int) -> Outcome:
        """Step `index` (from 0). Without rollbacks: on the global batch of samples [index·S, (index+1)·S)."""
        world, device = self._world, self._world.device
        stability = self._stability
        scale = stability.scale
        with self._ledger.during("data-wait"):
            micro_batches = self._batches.micro_batches(stability.history.batch_of(index) - self._first)
        # Known before the first backward pass, so that each micro-batch divides by the tokens of the whole global step.
        agreed = world.sum([count_valid(micro_batches), float(self._stop.requested)])
        valid = agreed[0].clamp(min=1).to(torch.float32)
        loss = torch.zeros((), dtype=torch.float32, device=device)
        turn = self._accumulation.turns(len(micro_batches) * self._objective.passes)
        for number, batch in enumerate(micro_batches):
            torch.manual_seed(derive(self._recipe.seed, index, world.data_rank, number))
            loss += self._objective.learn(self._model, batch.on(device), valid, scale, turn)
        norm = self._optimizer.clip(scale)
        told_by = self._model.figures()
        mean, *sums = world.sum([loss, *told_by.values()])
        judged = stability.judge(mean, norm)
        rate = learning_rate(self._recipe, (index + 1) * self._recipe.batch.tokens)
        rate *= stability.history.learning_rate_factor
        self._optimizer.step(rate, judged.skip)
        self._objective.after_step(judged.skip)
        told = [agreed[0], agreed[1], mean, norm.double(), judged.verdict, judged.expected]
        told += [value / world.data_size for value in sums]
        numbers = torch.stack(told if scale is None else [*told, scale])
        return Outcome(index + 1, rate, Readback(numbers), tuple(told_by))


def check_order(collectives: CollectiveLog, step: int, reporter: Reporter) -> None:
    """Writes down the first step's collectives. Raises RuntimeError where a rank began them in another order."""
    collectives.stop()
    strays = collectives.ranks_in_another_order()
    reporter.event("collectives", step=step, order=collectives.lines(), ranksInAnotherOrder=strays)
    if strays:
        raise RuntimeError(f"ranks {strays} began the collectives of step {step} in another order than rank 0")


class Readback:
    """A few numbers copied to the host behind the computation; reading waits for them, not for what came after."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._values = values
        if values.is_cuda:
            host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values = host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def read(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        values: list[float] = self._values.tolist()
        return values


def settle(
    outcome: Outcome, reporter: Reporter, stability: Stability, saver: Saver, objective: Objective
) -> bool:
    """Reports a step. Returns whether any rank was asked to stop. Raises RollBack or NonFinite where the recipe's
    stability says so."""
    valid, stops, loss, norm, code, expected, *more = outcome.numbers.read()
    figures, scale = more[: len(outcome.figures)], more[len(outcome.figures) :]
    verdict = Verdict(int(code))
    reporter.step(
        outcome.step, loss=loss, gradient_norm=norm, learning_rate=outcome.learning_rate,
        valid=objective.trained_tokens(valid),
        skipped=stability.skips(verdict), spike=verdict is Verdict.SPIKE,
        loss_scale=scale[0] if scale else None, figures=dict(zip(outcome.figures, figures, strict=True)),
    )  # fmt: skip
    try:
        stability.observe(outcome.step, verdict, loss=loss, gradient_norm=norm, expected=expected)
    except NonFinite:
        saver.drain(reporter)
        raise
    return stops > 0


def count_valid(micro_batches: Sequence[Batch]) -> float:
    """Targets of this rank that count."""
    return float(sum(int((batch.targets != IGNORED).sum()) for batch in micro_batches))


def _reporting(settings: Settings, config: ModelConfig, pulse: Pulse, world: World) -> Reporter:
    recipe = settings.recipe
    name = _device_name(world)
    meter = Meter(_arithmetic(config, recipe, world), world.size, pulse.ledger)
    if world.rank != 0:
        return Reporter(recipe, pulse, meter, None, None)
    if device_peak(name) is None:
        log.warning("no MFU: the peak of device %r is not known", name)
    directory = str(settings.log_dir) if settings.log_dir else None
    if settings.checkpoint:
        directory = settings.checkpoint.uri
    metrics = TrainMetrics(attempt=settings.attempt)
    if settings.metrics_port:
        metrics.serve(settings.metrics_port)
    log.info("%s on %d ranks, %s, %s", recipe.model.preset, world.size, name, recipe.precision)
    logbook = Logbook(directory, settings.attempt)
    logbook.event("environment", device=name, ranks=world.size, precision=recipe.precision, **versions())
    return Reporter(recipe, pulse, meter, logbook, metrics)


def _device_name(world: World) -> str:
    return torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu"


def _arithmetic(config: ModelConfig, recipe: Recipe, world: World) -> Arithmetic:
    return Arithmetic.of(config, recipe, device_peak(_device_name(world)))


def _hang_watch(settings: Settings, pulse: Pulse, world: World) -> HangWatch:
    on_host = world.device.type == "cpu" and world.size > 1
    return HangWatch(
        pulse, settings.hang_policy, board=Board.of_world(world.rank, world.size), pace=Pace() if on_host else None,
        directory=settings.heartbeat_dir, local_rank=settings.local_rank,
    )  # fmt: skip


def _check_vocabulary(samples: Samples, config: ModelConfig) -> None:
    if samples.vocabulary_size > config.vocabulary_size:
        raise BadData(
            f"data.sources: tokenised with {samples.vocabulary_size} entries, the model has {config.vocabulary_size}; "
            f"set model.overrides.vocabularySize to at least {samples.vocabulary_size}, or prepare a smaller vocabulary"
        )

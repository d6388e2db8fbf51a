"""What to train: the recipe, the same in a TrainingJob and in `trireme run recipe.yaml`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from trireme_api.anytime import NUMBER, AnytimeSpec, Session, Stream, numbered
from trireme_api.evaluation import EvaluationSpec
from trireme_api.fewshot import FewShotSpec, tasks_of
from trireme_api.masking import SHORTEST, MaskingSpec
from trireme_api.mixture import Language, MixtureSpec, check_languages
from trireme_api.parallelism import ParallelismSpec
from trireme_api.quantity import parse_quantity
from trireme_api.schema import Fraction, PositiveFloat, PositiveInt, Spec
from trireme_api.share import Share


class ModelSpec(Spec):
    preset: str = Field(min_length=1, max_length=63)
    """Name of a preset; `trireme models` lists them with exact parameter counts."""
    overrides: dict[str, int | float | bool | str] = Field(default_factory=dict, max_length=32)
    """Single numbers of the preset replaced, e.g. {layers: 2, dropout: 0.0, vocabularySize: 8192}."""


class DataSource(Spec):
    path: str = Field(min_length=1, max_length=1024)
    """Shards made by `trireme prepare`: pvc://claim/dir, an fsspec URL, or a local path under `trireme run`. For the
    objective few-shot: tasks://NAME, generated tasks (classification, transduction, path-finding)."""
    weight: PositiveFloat = 1.0
    """Share of the blocks drawn from this source, relative to the other weights."""
    language: Language | None = None
    """Left out: what `trireme prepare --language` wrote beside the shards, if anything."""


class DataSpec(Spec):
    sources: list[DataSource] = Field(min_length=1, max_length=256)
    mixture: MixtureSpec | None = None
    """Left out: sources are mixed by their weights."""
    sequence_length: PositiveInt = 2048
    """Tokens per block; a block of the paper is this plus one (inputs and shifted targets). With objective masked-lm
    the first of them is the token that begins a block (`<s>`)."""


class BatchSpec(Spec):
    tokens: PositiveInt
    """Global batch in tokens per optimiser step; a multiple of sequenceLength."""
    micro: PositiveInt = 1
    """Sequences one rank (a group of `parallelism.tensor`) takes through the model at once; the rest is gradient
    accumulation."""


class OptimizerSpec(Spec):
    name: Literal["adamw"] = "adamw"
    learning_rate: PositiveFloat = 6.0e-4
    """Peak, reached after warm-up."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: PositiveFloat = 1.0e-8
    weight_decay: float = Field(default=0.1, ge=0)
    """On every parameter, as OPT did (2205.01068 §2.2; metaseq has no exclusion list)."""
    clip: float = Field(default=1.0, ge=0)
    """Global L2 gradient norm; 0 switches clipping off."""


class ScheduleSpec(Spec):
    warmup_tokens: float = Field(default=375e6, ge=0)
    """Linear from zero."""
    decay: Literal["linear", "constant"] = "linear"
    final_fraction: Fraction = 0.1
    """Learning rate at the end, as a share of the peak (OPT: 10 %)."""
    decay_tokens: float | None = Field(default=None, gt=0)
    """Where the decay ends; left out: where training ends."""


class LossScaleSpec(Spec):
    """The dynamic loss scaler of precision fp16; defaults of OPT's code (2205.01068 §2.5, metaseq)."""

    initial: PositiveFloat = 4.0
    factor: float = Field(default=2.0, gt=1)
    """What the scale and its window are multiplied or divided by."""
    window: PositiveInt = 256
    """Good steps before the scale grows, at first; the window grows and shrinks with the scale."""
    tolerance: Fraction = 0.0
    """Share of overflows since the scale last changed from which it is lowered; 0: by each one."""
    threshold: float | None = Field(default=None, gt=0)
    """The scale is never set below this (OPT-175B: 0.25)."""
    minimum: PositiveFloat = 2.0**-5
    """A scale that would fall below this stays where it is."""


class StabilitySpec(Spec):
    on_spike: Literal["log", "skip", "rollback"] = "log"
    """What a loss spike does. log: it is told, and trained on. skip: the step leaves the weights alone. rollback: that
    too, and training goes back in place to the newest checkpoint before it, leaves out a window of data and lowers the
    learning rate (OPT's procedure, 2205.01068 §2.5)."""
    spike_ratio: float = Field(default=1.5, gt=1)
    """A spike is a loss above this times its exponentially weighted mean."""
    spike_span: PositiveInt = 9
    """Span of that mean in steps (metaseq's); also how many steps are looked at before any is judged."""
    skip_window: PositiveInt = 100
    """Batches a rollback leaves out: those that led to the spike and its own, as far as they come after the checkpoint,
    then those that follow."""
    lr_factor: float = Field(default=0.8, gt=0, le=1)
    """The learning rate of all later steps is multiplied by this at each rollback."""
    budget: int = Field(default=3, ge=0)
    """Rollbacks a run may make in all; the spike after the last ends it with exit code 70."""
    on_non_finite: Literal["skip", "stop", "rollback"] = "skip"
    """A step with a non-finite loss or gradient norm never touches the weights. skip: that is all. stop: it ends the
    run with exit code 70. rollback: `maxSkippedInARow` of them roll back, as a spike would."""
    max_skipped_in_a_row: PositiveInt = 10
    """So many skipped steps in a row end the run with exit code 70, or roll back. In fp16 an overflow that lowers the
    loss scale does not count."""
    loss_scale: LossScaleSpec = LossScaleSpec()
    """Of precision fp16."""


class UntilSpec(Spec):
    tokens: float | None = Field(default=None, gt=0)
    steps: PositiveInt | None = None

    @model_validator(mode="after")
    def _one(self) -> UntilSpec:
        if (self.tokens is None) == (self.steps is None):
            raise ValueError("give either tokens or steps")
        return self


class Recipe(Spec):
    model: ModelSpec
    objective: Literal["causal-lm", "masked-lm", "few-shot"] = "causal-lm"
    """causal-lm: each token from those before it. masked-lm: hidden tokens from both sides, for models that see both
    (see `masking`). few-shot: a task's embedding and the weights are optimised in turn (TAM, 2012.09543; see
    `fewShot`)."""
    masking: MaskingSpec | None = None
    """Of the objective masked-lm alone; left out, its defaults."""
    few_shot: FewShotSpec | None = None
    """Of the objective few-shot alone; left out, its defaults."""
    data: DataSpec
    anytime: AnytimeSpec | None = None
    """Of the objective causal-lm alone; left out, all data are there from the start."""
    batch: BatchSpec
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """bf16, fp16: parameters and activations in it for compute, fp32 master shards, fp32 gradient reduction. fp16 with
    OPT's dynamic loss scaler (stability.lossScale)."""
    parallelism: ParallelismSpec = ParallelismSpec()
    activation_checkpointing: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""
    compile: bool = False
    """torch.compile each block."""
    stability: StabilitySpec = StabilitySpec()
    evaluation: EvaluationSpec | None = None
    """Of the objectives causal-lm and masked-lm, of the latter only what data.sources hold out; left out, nothing is
    evaluated."""
    until: UntilSpec
    seed: int = Field(default=1, ge=0, le=2**31 - 1)
    """Initial values are a function of (seed, parameter name), data order of (seed, global sample index)."""

    @model_validator(mode="after")
    def _whole_blocks(self) -> Recipe:
        if self.batch.tokens % self.data.sequence_length:
            raise ValueError(
                f"batch.tokens must be a multiple of data.sequenceLength; {self.batch.tokens} is not a multiple of "
                f"{self.data.sequence_length}"
            )
        return self

    @model_validator(mode="after")
    def _tasks_for_few_shot(self) -> Recipe:
        few_shot = self.objective == "few-shot"
        if self.few_shot is not None and not few_shot:
            raise ValueError("fewShot goes with objective: few-shot; set that, or remove fewShot")
        for source in self.data.sources:
            if (tasks_of(source.path) is not None) != few_shot:
                want = "tasks://NAME with" if few_shot else "shards, not tasks://, without"
                raise ValueError(f"data.sources: must be {want} objective: few-shot; got {source.path!r}")
        if few_shot and len(self.data.sources) != 1:
            raise ValueError("data.sources: few-shot learns from one family of tasks; give one source")
        if few_shot and self.sequences_per_step % self.episodes.examples:
            raise ValueError(
                "batch.tokens must be whole tasks of fewShot.examples × data.sequenceLength tokens; "
                f"{self.batch.tokens} is not a multiple of {self.episodes.examples * self.data.sequence_length}"
            )
        return self

    @model_validator(mode="after")
    def _mixed(self) -> Recipe:
        data, mixture = self.data, self.data.mixture
        if mixture is None:
            return self
        if self.objective == "few-shot":
            raise ValueError("data.mixture is of text, not of generated tasks; remove it")
        for i, source in enumerate(data.sources):
            if source.weight != 1:
                raise ValueError(
                    f"data.sources[{i}].weight: data.mixture sets the shares; remove one (got {source.weight:g})"
                )
        languages = [source.language for source in data.sources]
        if None not in languages:
            check_languages(mixture, languages)
        return self

    @model_validator(mode="after")
    def _masks_for_masked_lm(self) -> Recipe:
        masked = self.objective == "masked-lm"
        if self.masking is not None and not masked:
            raise ValueError("masking goes with objective: masked-lm; set that, or remove masking")
        if masked and self.data.sequence_length < SHORTEST:
            raise ValueError(
                f"data.sequenceLength must be at least {SHORTEST} with objective: masked-lm; "
                f"got {self.data.sequence_length}"
            )
        return self

    @model_validator(mode="after")
    def _evaluated(self) -> Recipe:
        spec = self.evaluation
        if spec is None:
            return self
        if self.objective == "few-shot":
            raise ValueError("evaluation goes with causal-lm or masked-lm, not with few-shot; remove it")
        if self.objective == "masked-lm" and (spec.sources or spec.tasks or not spec.held_out):
            raise ValueError(
                "evaluation: with objective: masked-lm only what data.sources hold out is measured; remove sources and "
                "tasks, leave heldOut true"
            )
        if min(spec.shots) < 0:
            raise ValueError(f"evaluation.shots: must be 0 or more; got {min(spec.shots)}")
        if not (spec.held_out or spec.sources or spec.tasks):
            raise ValueError("evaluation: nothing to evaluate; give sources or tasks, or leave heldOut true")
        trained = {source.path for source in self.data.sources}
        for i, source in enumerate(spec.sources):
            if source.split == "train" and source.path in trained:
                raise ValueError(
                    f"evaluation.sources[{i}]: {source.path!r} is trained on; give split: valid, or another directory"
                )
        return self

    @model_validator(mode="after")
    def _streamed(self) -> Recipe:
        spec = self.anytime
        if spec is None:
            return self
        if self.objective != "causal-lm":
            raise ValueError("anytime goes with objective: causal-lm; set that, or remove anytime")
        if self.data.mixture is not None:
            raise ValueError("data.mixture goes not with anytime, which sets the shares of mega-batches; remove one")
        for i, source in enumerate(self.data.sources):
            if NUMBER not in source.path:
                raise ValueError(
                    f"data.sources[{i}].path: with anytime, write {NUMBER} where the number of the mega-batch stands, "
                    f"e.g. pvc://stream/mega-batch-{NUMBER}; got {source.path!r}"
                )
        if spec.arrived > spec.mega_batches:
            raise ValueError(f"anytime.arrived must be at most megaBatches, {spec.mega_batches}; got {spec.arrived}")
        if self.total_steps < spec.mega_batches:
            raise ValueError(
                f"until must be at least one step for each of the {spec.mega_batches} of anytime.megaBatches; "
                f"got {self.total_steps}"
            )
        if "rollback" in (self.stability.on_spike, self.stability.on_non_finite):
            raise ValueError("stability: rollback goes not with anytime, whose data change on the way; set skip or log")
        return self

    @property
    def stream(self) -> Stream | None:
        """The sessions of `anytime`."""
        return Stream(self.anytime, self.total_steps) if self.anytime is not None else None

    def of_session(self, session: Session) -> Recipe:
        """The same with the data of one session: its new mega-batches, and earlier ones by `anytime.replay`."""
        assert self.anytime is not None
        replay = self.anytime.replay if session.seen else 0.0
        shares = {n: (1 - replay) / len(session.new) for n in session.new}
        shares |= {n: replay / len(session.seen) for n in session.seen if replay}
        sources = [
            source.model_copy(update={"path": numbered(source.path, n), "weight": source.weight * shares[n]})
            for n in sorted(shares)
            for source in self.data.sources
        ]
        return self.model_copy(update={"data": self.data.model_copy(update={"sources": sources})})

    @property
    def masks(self) -> MaskingSpec:
        """`masking` with its defaults."""
        return self.masking or MaskingSpec()

    @property
    def episodes(self) -> FewShotSpec:
        """`fewShot` with its defaults."""
        return self.few_shot or FewShotSpec()

    @property
    def sequences_per_step(self) -> int:
        return self.batch.tokens // self.data.sequence_length

    @property
    def together(self) -> int:
        """Sequences that one rank takes whole: the examples of a task, else one."""
        return self.episodes.examples if self.objective == "few-shot" else 1

    def dealt(self, readers: int) -> Share:
        """How a step is dealt to the ranks that read data, in units of `together` sequences."""
        whole = self.together
        return Share(self.sequences_per_step // whole, readers, max(1, self.batch.micro // whole))

    @property
    def total_steps(self) -> int:
        """Optimiser steps until the end, rounded up to a whole batch."""
        if self.until.steps is not None:
            return self.until.steps
        assert self.until.tokens is not None
        return max(1, -(-int(self.until.tokens) // self.batch.tokens))


class MemorySpec(Spec):
    """Shards kept in the pods' memory between checkpoints: a restart that reads no storage."""

    every_steps: PositiveInt = 10
    replicas: int = Field(default=1, ge=0, le=3)
    """Copies on other nodes: 0 survives the end of a process, 1 also the loss of any one pod."""
    size: str | None = Field(default=None, max_length=32)
    """Most memory one pod may take for it, as a quantity (8Gi); left out: what the model needs. It counts towards the
    pod's memory limit."""

    @field_validator("size")
    @classmethod
    def _quantity(cls, size: str | None) -> str | None:
        if size is not None and parse_quantity(size) <= 0:
            raise ValueError("must be above 0, e.g. 8Gi")
        return size


class CheckpointSpec(Spec):
    """Beside the recipe, because your own script can use it too."""

    uri: str = Field(min_length=1, max_length=1024)
    """Where checkpoints go: pvc://claim/dir or any fsspec URL (a local path under `trireme run`)."""
    every_steps: PositiveInt | Literal["auto"] = 500
    """auto: Young's interval √(2 · cost of a save · mean time between failures), from what both are measured to be."""
    memory: MemorySpec | None = None
    keep: PositiveInt = 3
    """Committed checkpoints kept; older ones are removed only after a newer one is committed."""

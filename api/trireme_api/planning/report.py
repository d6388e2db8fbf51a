"""The whole plan of one recipe."""

from __future__ import annotations

from dataclasses import dataclass

from trireme_api.carbon.policy import CarbonPolicy
from trireme_api.families.memory import Moment
from trireme_api.flops import TokenFlops
from trireme_api.planning import costs, fitting, speed, traffic
from trireme_api.planning.setting import USABLE, Setting
from trireme_api.reliability import FAILURE_RATES


@dataclass(frozen=True)
class Row:
    """One way to spread the recipe."""

    name: str
    own: bool
    memory: Moment
    fits: bool | None
    traffic: traffic.Traffic
    speed: speed.Speed | None


@dataclass(frozen=True)
class Plan:
    setting: Setting
    flops: TokenFlops
    """Of a token, in the mean over the run."""
    rows: list[Row]
    """The recipe's own first."""
    remedies: list[str]
    """Where its own does not fit: what would."""
    training_seconds: float | None
    """Without failures and saves."""
    checkpoint: costs.Checkpoint
    failures: list[costs.Failures]
    """From the highest rate to the lowest."""
    wall_seconds: float | None
    """With them, at the highest rate."""
    footprint: costs.Footprint | None
    assumptions: list[str]

    @property
    def own(self) -> Row:
        return self.rows[0]

    @property
    def tokens(self) -> int:
        return self.setting.recipe.total_steps * self.setting.recipe.batch.tokens


def make(
    setting: Setting, *, tflops: float | None = None, storage: float = costs.STORAGE, policy: CarbonPolicy | None = None
) -> Plan:
    """`tflops`: model TFLOPS per device that were measured; `storage`: bytes per second and node. Raises
    carbon.UnknownZone."""
    rows = [
        Row(
            way.name, way.own, way.setting.memory(), way.setting.fits(), traffic.of(way.setting),
            # What was measured was measured of the recipe as it is.
            speed.expected(way.setting, tflops) if way.own or tflops is None else None,
        )
        for way in fitting.ways(setting)
    ]  # fmt: skip
    own = rows[0]
    seconds = _training_seconds(setting, tflops)
    saved = costs.checkpoint(setting, storage)
    failures = costs.failures(setting, saved, seconds, storage)
    wall = seconds / failures[0].goodput if seconds is not None and failures[0].goodput else None
    board = setting.board
    tokens = float(setting.recipe.total_steps * setting.recipe.batch.tokens)
    footprint = costs.footprint(setting, board, wall, tokens, policy) if board and wall is not None else None
    return Plan(
        setting, _flops(setting), rows,
        fitting.remedies(setting) if own.fits is False else [],
        seconds, saved, failures, wall, footprint, _assumptions(setting, own, footprint, storage, tflops),
    )  # fmt: skip


def _training_seconds(setting: Setting, tflops: float | None) -> float | None:
    total = 0.0
    for session, steps in setting.sessions:
        found = speed.expected(session, tflops)
        if found is None:
            return None
        total += found.step_seconds * steps
    return total


def _flops(setting: Setting) -> TokenFlops:
    """Of a token, in the mean over the run."""
    parts = [(TokenFlops.of(session.config, setting.recipe), steps) for session, steps in setting.sessions]
    whole = sum(steps for _, steps in parts)
    return TokenFlops(
        *(sum(getattr(one, name) * steps for one, steps in parts) / whole for name in ("model", "hardware", "palm"))
    )


def _assumptions(
    setting: Setting, own: Row, footprint: costs.Footprint | None, storage: float, tflops: float | None
) -> list[str]:
    board, found = setting.board, []
    if board is not None:
        found += [
            f"{board.name}: {board.gibibytes:g} GiB, of which a run may use {USABLE:.0%}; {board.watts:g} W "
            f"({board.source})",
            f"links: {board.link / 1e9:g} GB/s inside a machine of {setting.per_node}, {board.network / 1e9:g} GB/s a "
            f"device between machines, {traffic.LINK_SHARE:.0%} of both reached",
        ]
    if own.speed is not None and tflops is None and board is not None:
        share = speed.of_board(board).at(setting.config.width)
        found.append(
            f"speed: products at {share:.0%} of peak for width {setting.config.width}, {own.speed.source}; those runs "
            f"lie within a factor {speed.MODEL_ERROR:g} of the model. Trireme itself was not measured on a GPU yet"
        )
    if own.speed is None:
        found.append("speed: no peak known for this device and precision; give a measured --tflops")
    found.append(
        f"storage: {storage / 1e9:g} GB/s a node; copy to the host {costs.HOST_COPY / 1e9:g} GB/s a device; recovery "
        f"{costs.RECOVERY_SECONDS:g} s and loading"
    )
    found += [f"failures, {one.name}: {one.source}" for one in FAILURE_RATES]
    if footprint is not None:
        found.append(f"power: {costs.POWER_SOURCE}")
        found.append(
            f"carbon: PUE {footprint.pue:g}, {footprint.intensity.grams_per_kilowatt_hour:g} g/kWh "
            f"({footprint.intensity.source}); hardware by calendar, 4 years"
        )
    if setting.recipe.objective == "few-shot":
        found.append("few-shot: FLOPs are of the blocks, in every pass; the output layer's, of answers alone, are out")
    if setting.recipe.objective == "few-shot" or setting.recipe.evaluation is not None:
        found.append("evaluation: in no figure here; it comes on top")
    if setting.recipe.stream is not None:
        found.append("stream: waiting for data takes no nodes, and is in no figure here")
    if len(setting.sessions) > 1:
        found.append("growth: the table and the checkpoint are of the model in the end; FLOPs and time of each size")
    if setting.recipe.compile:
        found.append("compile: memory is counted without it; compiled blocks keep less, and run faster than said here")
    return found

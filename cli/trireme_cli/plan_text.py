"""A plan as people read it."""

from __future__ import annotations

from collections.abc import Iterator

from trireme_api.carbon import Range, mass
from trireme_api.planning import Plan
from trireme_api.planning.report import Row

GIB = 2**30


def lines(plan: Plan) -> Iterator[str]:
    setting, count = plan.setting, plan.setting.config.parameters()
    device = setting.board.name if setting.board else "cpu"
    activated = f", {quantity(count.activated)} activated" if count.activated != count.total else ""
    sizes = [session.config.parameters().total for session, _ in setting.sessions]
    grows = f", grown from {quantity(sizes[0])} in {len(sizes) - 1} growths" if len(sizes) > 1 else ""
    yield f"{setting.recipe.model.preset}: {quantity(count.total)} parameters{activated}{grows}"
    share = setting.share
    tensor = setting.spread.tensor
    each = setting.passes // share.micro_batches
    often = f", {each} passes each" if each > 1 else ""
    reader = "on each device" if tensor == 1 else f"in each group of {tensor} devices"
    yield (
        f"{setting.ranks} x {device} on {setting.nodes} {'node' if setting.nodes == 1 else 'nodes'}, "
        f"{setting.recipe.precision}; a step is {setting.recipe.batch.tokens:,} tokens, {reader} "
        f"{share.micro_batches} x {setting.micro_sequences} sequences of {setting.recipe.data.sequence_length}{often}"
    )
    padding = 1 - share.sequences / (share.world * share.micro_batches * share.micro_sequences)
    if padding > 0.01:
        what = "sequences" if setting.recipe.together == 1 else "tasks"
        yield f"{padding:.0%} of each step is padding: {share.sequences} {what} do not divide evenly"
    yield ""
    yield from _table(plan)
    yield ""
    yield from _verdict(plan)
    yield from _time(plan)
    yield from _checkpoint(plan)
    yield from _failures(plan)
    yield from _footprint(plan)
    yield ""
    yield "Assumed:"
    yield from (f"  - {one}" for one in plan.assumptions)


def _table(plan: Plan) -> Iterator[str]:
    head = ("GiB A DEVICE", "WEIGHTS", "OPTIMISER", "GRADIENTS", "ACTIVATIONS", "UNSHARDED", "PEAK", "FITS",
            "GB MOVED", "S/STEP", "TFLOPS", "MFU")  # fmt: skip
    rows = [head, *(_row(row) for row in plan.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        yield "  ".join(cells).rstrip()
    yield f"* the recipe's own; its fullest moment: {plan.own.memory.when}"


def _row(row: Row) -> tuple[str, ...]:
    memory, speed = row.memory, row.speed
    parts = (memory.weights, memory.optimizer, memory.gradients, memory.activations, memory.unsharded, memory.total)
    return (
        ("* " if row.own else "  ") + row.name,
        *(number(part / GIB) for part in parts),
        {True: "yes", False: "no", None: "?"}[row.fits],
        number(row.traffic.total / 1e9),
        number(speed.step_seconds) if speed else "-",
        number(speed.model_tflops) if speed else "-",
        f"{speed.mfu:.0%}" if speed and speed.mfu is not None else "-",
    )


def _verdict(plan: Plan) -> Iterator[str]:
    room, board = plan.setting.room, plan.setting.board
    if room is None or board is None:
        return
    need = f"{plan.own.memory.total / GIB:,.1f} of {room / GIB:,.1f} GiB"
    if plan.own.fits:
        yield f"fits       {need} of {board.name}"
    else:
        yield f"DOES NOT FIT  {need} of {board.name}; what would:"
        yield from (f"             {one}" for one in plan.remedies)


def _time(plan: Plan) -> Iterator[str]:
    flops, steps = plan.flops, plan.setting.recipe.total_steps
    again = f", {flops.hardware / 1e9:,.4g} with recomputation" if flops.hardware > flops.model else ""
    total = flops.model * plan.tokens
    yield f"FLOPs      {flops.model / 1e9:,.4g} G a token{again}; {total:.3g} for {quantity(plan.tokens)} tokens"
    if plan.own.speed is None or plan.training_seconds is None or plan.wall_seconds is None:
        return
    speed, rate = plan.own.speed, plan.tokens / plan.training_seconds
    bound = "products" if speed.compute_seconds >= speed.traffic_seconds else "the network"
    yield (
        f"time       {duration(plan.training_seconds)} for {steps:,} steps, {quantity(rate)} "
        f"tokens/s, bound by {bound}; {duration(plan.wall_seconds)} with saves and failures"
    )


def _checkpoint(plan: Plan) -> Iterator[str]:
    saved = plan.checkpoint
    yield (
        f"checkpoint {saved.bytes / 1e9:,.4g} GB, {duration(saved.write_seconds)} to write beside training, which "
        f"waits {duration(saved.blocked_seconds)} for it"
    )


def _failures(plan: Plan) -> Iterator[str]:
    for number_, one in enumerate(plan.failures):
        count = f"{one.expected:,.1f} failures, " if plan.wall_seconds is not None else ""
        yield (
            f"{'failures' if number_ == 0 else '':10} {count}one in {duration(one.hours_between * 3600)}, goodput "
            f"{one.goodput:.2%}, a save each {duration(one.save_every_seconds)} ({one.name})"
        )


def _footprint(plan: Plan) -> Iterator[str]:
    found = plan.footprint
    if found is None:
        return

    def grams(value: Range) -> str:
        return f"{mass(value.mid)} ({mass(value.low)} to {mass(value.high)})"

    energy = found.kilowatt_hours
    yield (
        f"energy     {number(energy.mid)} kWh ({number(energy.low)} to {number(energy.high)}), "
        f"{found.watts.mid:,.0f} W a device"
    )
    yield (
        f"carbon     {grams(found.operational_grams)} CO2e from use, {grams(found.embodied_grams)} from making; "
        f"{found.grams_per_million_tokens:,.3g} g a million tokens"
    )


def quantity(value: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def duration(seconds: float) -> str:
    for unit, size in (("years", 365 * 86400.0), ("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"



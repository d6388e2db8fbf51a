"""`trireme models`: what can be trained, with exact numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import click
from trireme_api.families import PRESETS, Preset
from trireme_api.families.memory import state_memory


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print everything known of each preset as JSON.")
def models(as_json: bool) -> None:
    """List the model presets: exact parameter counts, FLOPs per token, and how the paper trained them.

    FLOPs are of training (forward and backward) at the preset's sequence length, causal attention counted exactly.
    ACTIVATED are the parameters that one token passes through: fewer than all where there are experts.
    STATE is fp32 weights and gradients and both AdamW moments, to be divided by the ranks that share them.
    """
    described = [describe(preset) for preset in PRESETS.values()]
    if as_json:
        click.echo(json.dumps(described, indent=2, ensure_ascii=False))
        return
    header = (
        "PRESET", "PARAMETERS", "ACTIVATED", "LAYERS", "WIDTH", "GFLOP/TOKEN", "STATE GB", "PEAK LR", "BATCH", "NOTE",
    )  # fmt: skip
    _table([header, *(_row(preset) for preset in described)], left={0, len(header) - 1})


def describe(preset: Preset) -> dict[str, Any]:
    """One preset as plain data, names as in YAML. Bytes, tokens, FLOPs per token."""
    config, recipe = preset.config, preset.recipe
    count, length = config.parameters(), recipe.sequence_length
    state = state_memory(config)
    return {
        "name": preset.name,
        "family": config.family,
        "parameters": {"total": count.total, "activated": count.activated},
        "config": config.model_dump(by_alias=True),
        "flopsPerToken": {
            "sequenceLength": length,
            "forward": config.forward_flops_per_token(length),
            "train": config.train_flops_per_token(length),
            "palm": config.palm_flops_per_token(length),
        },
        "stateBytes": {"weights": state.weights, "gradients": state.gradients, "optimizer": state.optimizer},
        "paper": {
            "learningRate": recipe.peak_learning_rate,
            "batchTokens": recipe.batch_tokens,
            "warmupTokens": recipe.warmup_tokens,
            "decayTokens": recipe.decay_tokens,
            "sequenceLength": length,
            "finalFraction": recipe.final_fraction,
            "clip": recipe.clip,
            "betas": list(recipe.betas),
            "weightDecay": recipe.weight_decay,
            "source": recipe.source,
        },
        "note": preset.note,
    }


def _row(preset: dict[str, Any]) -> tuple[str, ...]:
    return (
        preset["name"],
        f"{preset['parameters']['total']:,}",
        f"{preset['parameters']['activated']:,}",
        str(preset["config"]["layers"]),
        str(preset["config"]["width"]),
        f"{preset['flopsPerToken']['train'] / 1e9:,.4g}",
        f"{sum(preset['stateBytes'].values()) / 1e9:,.4g}",
        f"{preset['paper']['learningRate']:.1e}",
        f"{preset['paper']['batchTokens']:,}",
        preset["note"],
    )


def _table(rows: Sequence[tuple[str, ...]], left: set[int]) -> None:
    """Columns as wide as their content, on a pipe as on a terminal; those in `left` are set flush left."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        click.echo("  ".join(cells).rstrip())

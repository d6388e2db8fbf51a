"""gMLP and sparse all-MLP: nothing sees ahead, and what the layers are."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from trireme_api.families import PRESETS, resolve
from trireme_api.recipe import ModelSpec
from trireme_trainer import families
from trireme_trainer.layers.auxiliary import set_share
from trireme_trainer.layers.routing import Router
from trireme_trainer.layers.spatial import SpatialGating

POSITIONS, WIDTH, INNER, LENGTH = 32, 8, 24, 32
SMALL = {"dropout": 0.0, "maximumPositions": POSITIONS}
RULES = ("top-2", "top-1", "hash", "base")
PARTIAL = {"spatialRouting": "partial"}


def _model(preset: str, **overrides: Any) -> families.LanguageModel:
    """Weights so large that whatever can be seen shows."""
    model = families.build(resolve(ModelSpec(preset=preset, overrides={**SMALL, **overrides})))
    generator = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3, generator=generator)
    return model.eval()


def _gating(experts: int = 1, prefix: int = 0, std: float = 0.3) -> SpatialGating:
    layer = SpatialGating(WIDTH, INNER, POSITIONS, experts, prefix=prefix)
    generator = torch.Generator().manual_seed(0)
    for weight in layer.parameters():
        nn.init.normal_(weight, std=std, generator=generator)
    return layer


def _tokens(length: int = LENGTH, rows: int = 1) -> Tensor:
    return torch.randint(4, 500, (rows, length), generator=torch.Generator().manual_seed(7))


def _seen_ahead(model: families.LanguageModel, changed_at: int, length: int = LENGTH) -> float:
    """How much the logits before a position change with the token there."""
    tokens = _tokens(length)
    other = tokens.clone()
    other[0, changed_at] = (other[0, changed_at] + 1) % 500
    with torch.no_grad():
        before, after = model(tokens), model(other)
    assert (before - after)[:, changed_at:].abs().max() > 1e-3, "the change shows nowhere: this test is blind"
    return float((before - after)[:, :changed_at].abs().max())


CAUSAL: dict[str, dict[str, Any]] = {f"deterministic, {rule}": {"router": rule} for rule in RULES}
CAUSAL |= {f"partial, {rule}": {"router": rule, **PARTIAL} for rule in RULES}


# Within the prefix (7 of 32 positions), at its edge on either side, behind it, and the last one.
@pytest.mark.parametrize("at", [1, 6, 7, 20, 31])
@pytest.mark.parametrize("variant", CAUSAL)
def test_no_position_sees_ahead(variant: str, at: int) -> None:
    assert _seen_ahead(_model("smlp-tiny", **CAUSAL[variant]), at) <= 1e-5


@pytest.mark.parametrize("at", [1, 31])
def test_no_position_of_the_dense_model_sees_ahead(at: int) -> None:
    assert _seen_ahead(_model("gmlp-tiny"), at) <= 1e-5


@pytest.mark.parametrize("rule", ["top-1", "hash"])
def test_nor_in_training_where_a_token_is_routed_by_itself(rule: str) -> None:
    model = _model("smlp-tiny", router=rule, capacity="dropless", **PARTIAL).train()
    assert _seen_ahead(model, 20) <= 1e-5


def test_a_gate_that_sees_the_whole_sequence_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the naive way of routing channels, which both routing strategies are there to avoid."""
    monkeypatch.setattr(SpatialGating, "_seen", lambda self, chunks_BTEC: chunks_BTEC.mean(dim=1))
    assert _seen_ahead(_model("smlp-tiny", **PARTIAL), 31) > 1e-3


def test_a_prefix_that_uses_its_own_gate_is_caught() -> None:
    """Negative control: without the deterministic way for the prefix, its positions see the rest of it."""
    model = _model("smlp-tiny", **PARTIAL)
    for layer in model.modules():
        if isinstance(layer, SpatialGating) and layer.prefix:
            layer._seen = lambda chunks: chunks[:, :7].mean(dim=1)  # type: ignore[method-assign]
            layer.prefix = 1
    assert _seen_ahead(model, 6) > 1e-3


def test_a_full_matrix_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "tril", lambda self: self)
    assert _seen_ahead(_model("gmlp-tiny"), 31) > 1e-3


def test_balanced_assignment_sees_ahead_in_training_as_the_docs_say() -> None:
    """BASE's, not of this family: known, and gone at evaluation (above)."""
    model = _model("smlp-tiny", router="base").train()
    assert max(_seen_ahead(model, at) for at in range(20, 32)) > 1e-3


# --- the spatial layer ---


def _initialised(**overrides: Any) -> families.LanguageModel:
    from trireme_trainer.parallel.initialise import initialise

    model = families.build(resolve(ModelSpec(preset="smlp-tiny", overrides={**SMALL, **overrides})))
    initialise(model, seed=1)
    return model


@pytest.mark.parametrize("overrides", [{}, PARTIAL], ids=["deterministic", "partial"])
def test_gating_starts_as_a_plain_layer(overrides: dict[str, Any]) -> None:
    """W next to 0 and b = 1: what is kept goes through as it is."""
    hidden = torch.randn(2, LENGTH, 64, generator=torch.Generator().manual_seed(1))
    for block in _initialised(**overrides).blocks:
        layer = block.gating
        kept = nn.functional.gelu(layer.fc1(hidden)).chunk(2, dim=-1)[0]
        torch.testing.assert_close(layer(hidden), layer.fc2(kept), rtol=0, atol=1e-3)


def _by_hand(layer: SpatialGating, x: Tensor) -> Tensor:
    """Deterministic routing as the papers' equations have it, one chunk and position at a time."""
    kept, gated = nn.functional.gelu(layer.fc1(x)).chunk(2, dim=-1)
    normed = nn.functional.layer_norm(gated, gated.shape[-1:], layer.spatial_norm.weight, layer.spatial_norm.bias)
    gate = torch.empty_like(normed)
    size = normed.shape[-1] // layer.experts
    for e in range(layer.experts):
        W = layer.spatial_weight[e * POSITIONS : (e + 1) * POSITIONS]
        b = layer.spatial_bias[e * POSITIONS : (e + 1) * POSITIONS]
        chunk = slice(e * size, (e + 1) * size)
        for t in range(x.shape[1]):
            gate[:, t, chunk] = torch.einsum("s,bsc->bc", W[t, : t + 1], normed[:, : t + 1, chunk]) + b[t]
    return layer.fc2(kept * gate)


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("length", [1, 11, POSITIONS])
def test_the_layer_is_its_equations(experts: int, length: int) -> None:
    layer, x = _gating(experts), torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), _by_hand(layer, x), rtol=1e-4, atol=1e-5)


def test_experts_that_are_equal_are_one() -> None:
    one, four = _gating(1), _gating(4)
    state = one.state_dict()
    for name in ("spatial_weight", "spatial_bias"):
        state[name] = torch.cat([state[name]] * 4)
    four.load_state_dict(state)
    x = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(four(x), one(x), rtol=1e-5, atol=1e-5)
    # Chosen or not, with certainty of the gate left out.
    chosen = _gating(4, prefix=7)
    chosen.load_state_dict({**chosen.state_dict(), **state})
    with torch.no_grad():
        torch.testing.assert_close(chosen(x)[:, :7], one(x)[:, :7], rtol=1e-5, atol=1e-5)


def test_the_prefix_decides_and_nothing_else_does() -> None:
    """Partial prediction: the gate's weight matters behind the prefix alone, and is chosen by the prefix alone."""
    layer = _gating(4, prefix=7)
    assert layer.spatial_gate is not None
    x = torch.randn(1, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    routed = []
    layer.spatial_gate.register_forward_hook(lambda module, inputs, out: routed.append(out))
    with torch.no_grad():
        out = layer(x)
        behind = x.clone()
        behind[:, 7:] += 1.0
        layer(behind)
        torch.testing.assert_close(routed[1].weight, routed[0].weight, rtol=0, atol=0)
        before = x.clone()
        before[:, 6] += 1.0
        layer(before)
        assert not torch.equal(routed[2].weight, routed[0].weight)
        layer.spatial_gate.weight.mul_(-1.0)
        turned = layer(x)
    torch.testing.assert_close(turned[:, :7], out[:, :7], rtol=0, atol=0)
    assert (turned[:, 7:] - out[:, 7:]).abs().amax(dim=(0, 2)).min() > 0
    assert layer(x[:, :7]).shape == (1, 7, WIDTH)
    assert len(routed) == 4, "a sequence within the prefix needs no gate"


def test_a_shorter_sequence_is_the_beginning_of_a_longer_one() -> None:
    for overrides in ({}, PARTIAL):
        model = _model("smlp-tiny", **overrides)
        with torch.no_grad():
            whole = model(_tokens())
            for length in (1, 5, 7, 8, 20):
                torch.testing.assert_close(model(_tokens()[:, :length]), whole[:, :length], rtol=1e-4, atol=1e-4)


def test_a_sequence_longer_than_the_matrices_is_refused() -> None:
    with pytest.raises(ValueError, match="longer than the model's 32 positions"):
        _model("gmlp-tiny")(_tokens(POSITIONS + 1))


def test_the_gate_of_chunks_learns_from_its_weights_and_its_balance() -> None:
    model = _model("smlp-tiny", **PARTIAL).train()
    set_share(model, torch.tensor(1.0))
    gates = [part for part in model.modules() if isinstance(part, Router) and part.rule == "top-1"]
    assert len(gates) == 1
    model(_tokens(rows=3)).square().mean().backward()
    with_loss = gates[0].weight.grad.clone()
    model.zero_grad()
    set_share(model, torch.tensor(0.0))
    model(_tokens(rows=3)).square().mean().backward()
    assert gates[0].weight.grad.abs().max() > 0
    assert not torch.equal(with_loss, gates[0].weight.grad)


# --- its arithmetic ---


@pytest.mark.parametrize("variant", CAUSAL)
def test_parameters_of_every_variant(variant: str) -> None:
    overrides = CAUSAL[variant]
    config = resolve(ModelSpec(preset="smlp-tiny", overrides={**SMALL, "experts": 2, **overrides}))
    with torch.device("meta"):
        model = families.build(config).eval()
    assert sum(weight.numel() for weight in model.parameters()) == config.parameters().total
    assert max(sum(w.numel() for w in block.parameters()) for block in model.blocks) == config.block_parameters()


def test_spatial_experts_cost_parameters_and_no_flops() -> None:
    def of(experts: int) -> tuple[int, float]:
        config = resolve(ModelSpec(preset="smlp-1.7b", overrides={"spatialExperts": experts}))
        return config.parameters().total, config.forward_flops_per_token(1024)

    (few, flops), (many, same) = of(1), of(16)
    assert many - few == 5 * 15 * (1024**2 + 1024)
    assert same == flops


def _recomputing_flops(preset: str, overrides: dict[str, Any]) -> tuple[float, float]:
    """(counted, stated) FLOPs that recomputing adds, of one sequence."""
    config = resolve(ModelSpec(preset=preset, overrides={**SMALL, **overrides}))
    counts = []
    for again in (False, True):
        model = _model(preset, **overrides).train()
        for block in model.blocks if again else ():
            forward = block.forward
            block.forward = lambda *x, forward=forward: checkpoint(forward, *x, use_reentrant=False)
        with FlopCounterMode(display=False) as counter:
            model(_tokens()).sum().backward()
        counts.append(counter.get_total_flops())
    return counts[1] - counts[0], LENGTH * config.recomputed_flops_per_token(LENGTH, causal=False)


@pytest.mark.parametrize("rule", RULES)
def test_what_is_recomputed_is_what_is_stated(rule: str) -> None:
    # Room for exactly the tokens there are, so that padding of experts' places counts nothing.
    overrides = {"router": rule, "capacity": "dropless", "width": 16, "innerWidth": 32, "spatialExperts": 2}
    counted, stated = _recomputing_flops("smlp-tiny", overrides)
    assert counted == pytest.approx(stated, rel=1e-12)
    if rule == "hash":
        counted, stated = _recomputing_flops("gmlp-tiny", {})
        assert counted == pytest.approx(stated, rel=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("preset", ["smlp-tiny", "moe-tiny"])
def test_forward_and_backward_flops_of_every_router(preset: str, rule: str) -> None:
    """With just as many places as choices: what is executed has no padding."""
    overrides: dict[str, Any] = {"router": rule, "capacityFactor": 2.0 if rule == "top-2" else 1.0}
    if preset == "smlp-tiny":
        overrides |= PARTIAL
    config = resolve(ModelSpec(preset=preset, overrides={**SMALL, **overrides}))
    with torch.device("meta"):
        model, tokens = families.build(config).train(), torch.zeros(2, LENGTH, dtype=torch.long)
        with FlopCounterMode(display=False) as forward:
            logits = model(tokens)
        with FlopCounterMode(display=False) as backward:
            logits.sum().backward()
    stated = 2 * LENGTH * config.forward_flops_per_token(LENGTH, causal=False)
    assert forward.get_total_flops() == pytest.approx(stated, rel=1e-12)
    assert backward.get_total_flops() == pytest.approx(2 * stated, rel=1e-12)


# --- compiled ---


# Dense blocks are in every variant.
@pytest.mark.parametrize("variant", ["deterministic, base", "deterministic, hash", "partial, top-1"])
def test_blocks_compile_as_one_graph(variant: str) -> None:
    model = _model("smlp-tiny", **CAUSAL[variant])
    plain = model.train()(_tokens())
    for block in model.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(_tokens()), plain, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"sparseLayers": 3}, "sparseLayers 3 is more than the 2 layers"),
        ({"spatialExperts": 7}, "spatialExperts must divide half of innerWidth, 192; got 7"),
        ({"innerWidth": 33}, "innerWidth must be even"),
        ({"router": "nearest"}, "'top-2', 'top-1', 'hash' or 'base'"),
        ({"router": "top-2", "experts": 1}, "experts must be at least 2"),
    ],
)
def test_shapes_that_cannot_be_are_refused_in_one_line(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        resolve(ModelSpec(preset="smlp-tiny", overrides=overrides))
    assert "\n" not in str(caught.value)
    assert PRESETS["smlp-tiny"].config.causal

"""A mixture of experts that grows by splitting one of them, without a change of what it computes (gMoE, 2106.09563).

An expert becomes a branch: copies of it under a new random softmax gate. The copies are equal and a gate's shares sum
to one, so outputs stay; the gate's shares differ by input, so the copies drift apart from the next step on. Splits
nest: the result is a tree whose gates multiply.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from trireme_trainer.layers.mode import evaluating

Path = tuple[int, ...]
"""Which expert: the choice at each gate from the root on; () while there is no gate."""


class Branch(nn.Module):
    """y = Σ_k softmax(G x)_k · expert_k(x), of inputs [..., features]."""

    def __init__(self, experts: Iterable[nn.Module], gate: nn.Linear) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.gate = gate

    def shares(self, x: Tensor) -> Tensor:
        """[..., features] → [..., experts]."""
        logits: Tensor = self.gate(x)
        return logits.softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        shares = self.shares(x)
        # Not a product of matrices: mixing is then no FLOP of the model's, as in its closed form.
        out: Tensor = sum(shares[..., k, None] * expert(x) for k, expert in enumerate(self.experts))
        return out


class Mixture(nn.Module):
    """A layer that can grow: one expert at first (ours: the released code begins with two)."""

    def __init__(self, expert: nn.Module, features: int) -> None:
        super().__init__()
        self.tree = expert
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.tree(x)
        return out

    def leaves(self) -> list[Path]:
        return [path for path, _ in _walk(self.tree, ())]

    def usage(self, x: Tensor) -> dict[Path, float]:
        """The weight that each expert has in the outputs of `x`, summed over all of them; together their number."""
        return dict(_usage(self.tree, x, torch.ones(x.shape[:-1], device=x.device), ()))

    def split(
        self, path: Path, generator: torch.Generator, optimizer: torch.optim.Optimizer | None = None, copies: int = 2
    ) -> None:
        """Splits the expert at `path` into `copies`. The first copy is the expert itself.

        Copies take over the expert's optimiser state and parameter group, the new gate begins without state, as a new
        parameter does. Adds (copies − 1) experts and copies · (features + 1) parameters.

        Raises:
            ValueError: no expert at `path`, or fewer than two copies.
        """
        if copies < 2:
            raise ValueError(f"copies: {copies}; a split makes at least 2")
        found = dict(_walk(self.tree, ()))
        if path not in found:
            raise ValueError(f"path: no expert at {path}; there are {sorted(found)}")
        expert = found[path]
        like = next(expert.parameters())
        gate = nn.Linear(self.features, copies, device=like.device, dtype=like.dtype)
        bound = self.features**-0.5
        with torch.no_grad():
            for parameter in gate.parameters():
                # Drawn where the generator is: the same numbers whatever device the model lives on.
                drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                parameter.copy_(drawn)
        twins = [copy.deepcopy(expert) for _ in range(copies - 1)]
        for twin in twins:
            for parameter in twin.parameters():
                parameter.grad = None
        branch = Branch([expert, *twins], gate)
        self._replace(path, branch)
        branch.train(self.training)
        if optimizer is not None:
            for twin in twins:
                for old, new in zip(expert.parameters(), twin.parameters(), strict=True):
                    carry(optimizer, old, new, state=True)
            for parameter in gate.parameters():
                carry(optimizer, like, parameter, state=False)

    def _replace(self, path: Path, branch: Branch) -> None:
        if not path:
            self.tree = branch
            return
        at: Any = self.tree
        for choice in path[:-1]:
            at = at.experts[choice]
        at.experts[path[-1]] = branch


def carry(optimizer: torch.optim.Optimizer, old: nn.Parameter | Tensor, new: nn.Parameter, *, state: bool) -> None:
    """Puts `new` into the parameter group of `old`; with `state`, with a copy of its optimiser state.

    Raises:
        ValueError: `old` is not the optimiser's.
    """
    for group in optimizer.param_groups:
        if any(parameter is old for parameter in group["params"]):
            group["params"].append(new)
            if state and old in optimizer.state:
                optimizer.state[new] = copy.deepcopy(optimizer.state[old])
            return
    raise ValueError("optimizer: it does not hold the parameters of the expert that is split")


def mixtures(model: nn.Module) -> dict[str, Mixture]:
    """Layers that can grow, by name, in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Mixture)}


@torch.no_grad()
def most_used(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Path]:
    """Of each layer that can grow, the expert whose weight over all `batches` is greatest; the first of equals."""
    totals: dict[str, dict[Path, float]] = {name: dict.fromkeys(m.leaves(), 0.0) for name, m in mixtures(model).items()}

    def note(name: str, layer: Mixture, x: Tensor) -> None:
        for path, used in layer.usage(x).items():
            totals[name][path] += used

    hooks = [
        layer.register_forward_pre_hook(lambda module, args, name=name: note(name, module, args[0]))
        for name, layer in mixtures(model).items()
    ]
    try:
        with evaluating(model):
            for inputs in batches:
                model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: max(used, key=lambda path: used[path]) for name, used in totals.items()}


def grow(
    model: nn.Module, batches: Iterable[Tensor], generator: torch.Generator,
    optimizer: torch.optim.Optimizer | None = None,
) -> dict[str, Path]:  # fmt: skip
    """Splits the most used expert of every layer that can grow; which ones it were."""
    chosen = most_used(model, batches)
    layers = mixtures(model)
    for name, path in chosen.items():
        layers[name].split(path, generator, optimizer)
    return chosen


def _walk(node: nn.Module, path: Path) -> Iterator[tuple[Path, nn.Module]]:
    if not isinstance(node, Branch):
        yield path, node
        return
    for k, expert in enumerate(node.experts):
        yield from _walk(expert, (*path, k))


def _usage(node: nn.Module, x: Tensor, reached: Tensor, path: Path) -> Iterator[tuple[Path, float]]:
    if not isinstance(node, Branch):
        yield path, float(reached.sum())
        return
    shares = node.shares(x)
    for k, expert in enumerate(node.experts):
        yield from _usage(expert, x, reached * shares[..., k], (*path, k))

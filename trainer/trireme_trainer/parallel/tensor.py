"""Tensor parallelism: each rank of a group computes its part of every layer, on the same tokens.

After Megatron-LM (1909.08053 §3): projections to heads and to the feed-forward layer's inner width are cut by rows of
their weights, those back by columns. So heads and inner channels lie on one rank each, and a sub-layer needs one sum
over the group forward, of what the ranks give, and one backward, of the gradients of what it was given.

A layer changes its class for one that computes its part; names of parameters stay, and each is a DTensor, which FSDP
shards further, as it does with any parameter that is one already. What is not cut (norms, biases added after the sum)
is the same on all ranks of a group, and so is its gradient. B batch, T time, D width, F inner width, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from trireme_trainer.families import LanguageModel
from trireme_trainer.layers.attention import SelfAttention
from trireme_trainer.layers.experts import Experts
from trireme_trainer.layers.feed_forward import FeedForward

Watch = Callable[[Tensor], None]
"""Told of each sum before it begins."""


def divide_layers(model: LanguageModel, mesh: DeviceMesh) -> None:
    """Leaves each rank of `mesh` (one dimension) its part of every layer in the blocks. Before FSDP, on the meta
    device."""
    model.shared_positions = SharedPositions(Peers(mesh))
    for module in list(model.blocks.modules()):
        peers = Peers(mesh)
        match module:
            case SelfAttention():
                for projection in (module.q_proj, module.k_proj, module.v_proj):
                    _columns(projection, mesh)
                _rows(module.out_proj, mesh, peers)
                if module.head_scale is not None and not module.scale_after:
                    _cut(module, "head_scale", mesh, 0)
                _become(module, _Attention, peers)
            case FeedForward():
                _columns(module.fc1, mesh)
                _rows(module.fc2, mesh, peers)
                if module.inner_norm is not None:
                    _cut(module.inner_norm, "weight", mesh, 0)
                    _cut(module.inner_norm, "bias", mesh, 0)
                    _become(module.inner_norm, _Norm, peers)
                _become(module, _FeedForward, peers)
            case Experts():
                for name, _ in list(module.named_parameters(recurse=False)):
                    _cut(module, name, mesh, 0)
                module.exchange = Divided(peers)


def peers_of(model: nn.Module) -> dict[str, Peers]:
    """Who computes which layer together, by the name of the layer, not of the parts within."""
    found: dict[Peers, str] = {}
    for name, module in model.named_modules():
        for holder in (getattr(module, "shared_positions", None), getattr(module, "exchange", None), module):
            if isinstance(peers := getattr(holder, "peers", None), Peers):
                found.setdefault(peers, name or "root")
    return {name: peers for peers, name in found.items()}


class Peers:
    """The ranks that compute one layer together."""

    def __init__(self, mesh: DeviceMesh) -> None:
        group = mesh.get_group()
        self.rank, self.size, self._name = group.rank(), group.size(), group.group_name
        self.watch: Watch | None = None

    def sum(self, x: Tensor) -> Tensor:
        if self.watch is not None and not torch.compiler.is_compiling():
            self.watch(x)
        # As operators, not by torch.distributed's functions: these can be in a compiled graph.
        pending = torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", self._name)
        out: Tensor = torch.ops._c10d_functional.wait_tensor(pending)
        return out

    def spread(self, x: Tensor) -> Tensor:
        """`x`, the same on all ranks, for each to compute its part with: the parts' gradients are summed."""
        out: Tensor = _Spread.apply(x, self)  # type: ignore[no-untyped-call]
        return out

    def merge(self, part: Tensor) -> Tensor:
        """The sum of all ranks' parts, for what follows on all of them alike: each part has its gradient."""
        out: Tensor = _Merge.apply(part, self)  # type: ignore[no-untyped-call]
        return out

    @contextmanager
    def own_draws(self, device: torch.device) -> Iterator[None]:
        """Random numbers that differ between the ranks; afterwards all go on alike."""
        seed = int(torch.randint(2**62, ()))
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed + self.rank)
            yield


class _Spread(torch.autograd.Function):
    """Megatron's f."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        ctx.peers = peers
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.peers.sum(gradients[0]), None


class _Merge(torch.autograd.Function):
    """Megatron's g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, peers: Peers) -> Tensor:
        return peers.sum(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Columns(nn.Linear):
    """Its own output channels."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, _own(self.weight), _own(self.bias))


class _Rows(nn.Linear):
    """From its own input channels; the bias is added to the sum, once."""

    peers: Peers

    def forward(self, input: Tensor) -> Tensor:
        return self.peers.merge(F.linear(input, _own(self.weight))) + self.bias


class _Norm(nn.LayerNorm):
    """Over channels that lie on all ranks."""

    peers: Peers

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = _Normed.apply(input, _own(self.weight), _own(self.bias), self.eps, self.peers)  # type: ignore[no-untyped-call]
        return out


class _Normed(torch.autograd.Function):
    """Keeps its input and two numbers a token, as the fused LayerNorm does; statistics in fp32."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, eps: float, peers: Peers) -> Tensor:
        channels = input.shape[-1] * peers.size
        mean = peers.sum(input.sum(-1, keepdim=True, dtype=torch.float32)) / channels
        # From the distances to the mean: a difference of two large sums would lose what matters.
        scale = torch.rsqrt(peers.sum((input - mean).square_().sum(-1, keepdim=True)) / channels + eps)
        ctx.save_for_backward(input, weight, mean, scale)
        ctx.peers, ctx.channels = peers, channels
        return torch.addcmul(bias, (input - mean).mul_(scale).to(input.dtype), weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        input, weight, mean, scale = ctx.saved_tensors
        out, normed = gradients[0], (input - mean).mul_(scale)
        tokens = tuple(range(out.dim() - 1))
        of_bias = out.sum(tokens, dtype=torch.float32).to(weight.dtype)
        of_weight = (out * normed).sum(tokens).to(weight.dtype)
        weighted = out * weight.float()
        both = torch.stack([weighted.sum(-1), (weighted * normed).sum(-1)], dim=-1)
        plain, along = (ctx.peers.sum(both) / ctx.channels).split(1, dim=-1)
        inner = weighted.sub_(plain).sub_(normed.mul_(along)).mul_(scale)
        return inner.to(input.dtype), of_weight, of_bias, None, None


class _Attention(SelfAttention):
    """With its own heads."""

    peers: Peers

    def forward(self, hidden_BTD: Tensor, attend_B1TT: Tensor | None = None) -> Tensor:
        hidden_BTD = self.peers.spread(hidden_BTD)
        if self.training and self.dropout > 0:
            # Dropout falls on the heads alone here. Heads of different ranks must not lose the same.
            with self.peers.own_draws(hidden_BTD.device):
                return super().forward(hidden_BTD, attend_B1TT)
        return super().forward(hidden_BTD, attend_B1TT)

    def scales(self) -> Tensor | None:
        return None if self.head_scale is None else _own(self.head_scale)


class _FeedForward(FeedForward):
    """With its own inner channels."""

    peers: Peers

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return super().forward(self.peers.spread(hidden_BTD))


class SharedPositions:
    """`families.base.Positions`: an equal number for each rank, in order, the last ones fewer."""

    def __init__(self, peers: Peers) -> None:
        self.peers, self.ranks = peers, peers.size

    def own(self, rows: Tensor) -> Tensor:
        first, last = self._bounds(len(rows))
        return rows[first:last]

    def all(self, own: Tensor, count: int) -> Tensor:
        first, last = self._bounds(count)
        return self.peers.sum(F.pad(own, [0, 0] * (own.dim() - 1) + [first, count - last]))

    def sum(self, part: Tensor) -> Tensor:
        return self.peers.sum(part)

    def _bounds(self, count: int) -> tuple[int, int]:
        each = -(-count // self.ranks)
        return min(count, self.peers.rank * each), min(count, (self.peers.rank + 1) * each)


class Divided:
    """`layers.experts.Exchange` among ranks with the same tokens: each takes the rows of its own experts, and none
    travel but the results."""

    def __init__(self, peers: Peers) -> None:
        self.peers = peers

    def own(self, weight: Tensor) -> Tensor:
        return _own(weight)

    def slotted(self, rows_ECD: Tensor, run: Callable[[Tensor], Tensor], *, alike: bool) -> Tensor:
        own = len(rows_ECD) // self.peers.size
        return self._part(rows_ECD, self.peers.rank * own, own, run)

    def grouped(self, rows_ND: Tensor, counts: list[int], run: Callable[[Tensor, list[int]], Tensor]) -> Tensor:
        own = len(counts) // self.peers.size
        first = self.peers.rank * own
        here = counts[first : first + own]
        return self._part(rows_ND, sum(counts[:first]), sum(here), lambda rows: run(rows, here))

    def _part(self, rows: Tensor, start: int, length: int, run: Callable[[Tensor], Tensor]) -> Tensor:
        done = run(self.peers.spread(rows).narrow(0, start, length))
        around = [0, 0] * (rows.dim() - 1) + [start, len(rows) - start - length]
        return self.peers.merge(F.pad(done, around))


def _columns(layer: nn.Linear, mesh: DeviceMesh) -> None:
    _cut(layer, "weight", mesh, 0)
    _cut(layer, "bias", mesh, 0)
    layer.__class__ = _Columns


def _rows(layer: nn.Linear, mesh: DeviceMesh, peers: Peers) -> None:
    _cut(layer, "weight", mesh, 1)
    _become(layer, _Rows, peers)


def _become(module: Any, kind: type[nn.Module], peers: Peers) -> None:
    module.__class__ = kind
    module.peers = peers


def _cut(module: nn.Module, name: str, mesh: DeviceMesh, dimension: int) -> None:
    whole, ranks = module.get_parameter(name), mesh.size()
    if whole.shape[dimension] % ranks:
        raise ValueError(f"{name}: {whole.shape[dimension]} cannot be divided among {ranks} ranks")
    shape = list(whole.shape)
    shape[dimension] //= ranks
    own = torch.empty(shape, dtype=whole.dtype, device=whole.device)
    spread = DTensor.from_local(own, mesh, [Shard(dimension)], run_check=False)
    module.register_parameter(name, nn.Parameter(spread))


def _own(weight: Tensor) -> Tensor:
    """This rank's part, differentiable."""
    return weight.to_local() if isinstance(weight, DTensor) else weight

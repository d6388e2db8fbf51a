"""Which unit is gathered when: before its turn, so that the gathering hides behind another unit's computation.

FSDP paper (2304.11277) §3.3.2–3.3.3 on order, §3.4.2 on the limit of what is under way at once.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.distributed.fsdp import FSDPModule
from trireme_api.parallelism import PrefetchSpec


def set_prefetch(root: FSDPModule, blocks: Sequence[Sequence[FSDPModule]], spec: PrefetchSpec) -> None:
    """`blocks` in the order of the forward pass, each with the units inside it; the root unit is gathered before them
    and stays. A block that is asked for comes with the units inside it.

    So many blocks ahead and no more are ever gathered: FSDP2 has no other limit, and needs none, because it frees what
    it gathered at a known place in the stream instead of leaving it to the allocator.
    """
    order = [[root], *blocks]
    for index, (unit, *inner) in enumerate(order):
        if spec.forward:
            unit.set_modules_to_forward_prefetch([*inner, *_flat(order[index + 1 : index + 1 + spec.forward])])
        if spec.backward != 1:
            following = blocks if unit is root else blocks[: index - 1]
            ahead = _flat(list(reversed(following))[: spec.backward])
            # Nothing listed means FSDP's default, one ahead; a unit that is there already is gathered no second time.
            unit.set_modules_to_backward_prefetch([*(inner if spec.backward else []), *ahead] or [unit])
            for within in inner:
                within.set_modules_to_backward_prefetch([within])


def _flat(blocks: Sequence[Sequence[FSDPModule]]) -> list[FSDPModule]:
    return [unit for block in blocks for unit in block]

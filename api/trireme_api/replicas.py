"""How many nodes a job has, may have and holds in reserve."""

from __future__ import annotations

from pydantic import Field, model_validator

from trireme_api.schema import PositiveInt, Spec

MAX_NODES = 10_000


class Replicas(Spec):
    """How many nodes; all of it may be changed while the job runs (`kubectl scale` sets `desired`)."""

    desired: PositiveInt = Field(default=1, le=MAX_NODES)
    """Nodes (pods) in the gang."""
    min: PositiveInt | None = Field(default=None, le=MAX_NODES)
    """Fewest nodes the job may go on with when some are lost or no room is found. Left out: the smallest of `allowed`,
    or `desired` (never shrinks by itself)."""
    max: PositiveInt | None = Field(default=None, le=MAX_NODES)
    """Upper bound of `desired`, for whoever scales the job."""
    allowed: tuple[PositiveInt, ...] = Field(default=(), max_length=64)
    """The only sizes the gang may have. Left out: every size from `min` to `desired`."""
    spares: int = Field(default=0, ge=0, le=1000)
    """Pods beyond the gang, placed and waiting to take the place of lost ones. Fewer are held where room is short."""

    @model_validator(mode="after")
    def _consistent(self) -> Replicas:
        if self.min is not None and self.min > self.desired:
            raise ValueError(f"min: {self.min} is more than desired: {self.desired}; lower min or raise desired")
        if self.max is not None and self.max < self.desired:
            raise ValueError(f"max: {self.max} is less than desired: {self.desired}; raise max or lower desired")
        if self.allowed and self.desired not in self.allowed:
            sizes = ", ".join(map(str, sorted(self.allowed)))
            raise ValueError(f"desired: {self.desired} is not one of allowed: {sizes}; choose one of them or add it")
        return self

    @property
    def least(self) -> int:
        """Fewest nodes the gang may have."""
        if self.min is None:
            return min(self.allowed, default=self.desired)
        return min((size for size in self.allowed if size >= self.min), default=self.min)

    def fit(self, nodes: int) -> int | None:
        """The largest permitted size, at most `desired`, of a gang that has so many nodes to choose from."""
        most = min(nodes, self.desired)
        if self.allowed:
            return max((size for size in self.allowed if self.least <= size <= most), default=None)
        return most if most >= self.least else None

"""Times as they stand in status: RFC 3339 in UTC, and back to Unix seconds."""

from __future__ import annotations

from datetime import UTC, datetime


def stamp(now: float) -> str:
    """Milliseconds, because the parts of a recovery are shorter than seconds."""
    return datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def seconds(text: str | None) -> float | None:
    """Unix seconds of an RFC 3339 time; None for none and for what is not one (status is a cache, never trusted)."""
    if not text:
        return None
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()
    except ValueError:
        return None


def duration(length: float) -> str:
    """A duration for people: 42s, 3m10s, 5h02m, 12d3h."""
    total = max(0, round(length))
    minutes, rest = divmod(total, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def microtime(now: float) -> str:
    """Kubernetes' MicroTime, as Leases have it."""
    return datetime.fromtimestamp(now, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")

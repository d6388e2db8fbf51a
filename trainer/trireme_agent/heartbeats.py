"""What ranks say about themselves: one small file each, aged by this process's own monotonic clock.

A rank's own timestamps are never compared with anything: clocks of containers and nodes differ and jump.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Callable, Deque, Dict, List, Optional

from trireme_api.heartbeat import Heartbeat, heartbeat_name
from trireme_api.protocol import CheckpointRef, PhaseTime, Progress, ProtocolError, Reached, Spent

MAX_BYTES = 64 * 1024
STEPS_TO_LEARN = 3
PACE_WINDOW = 20
UNEASY_SECONDS = 4.0
"""A rank that stands still for so long, and half as long again as a step usually takes, is told of more often."""
UNEASY_UNLEARNT_SECONDS = 15.0


@dataclass
class Seen:
    content: bytes
    changed: float
    """Monotonic seconds."""
    beat: Optional[Heartbeat] = None
    problem: str = ""
    stepped: Optional[float] = None
    """When its step last rose."""
    pace: Deque[float] = field(default_factory=lambda: deque(maxlen=PACE_WINDOW))
    """Seconds per step, newest last."""


    def step_to(self, beat: Heartbeat) -> None:
        gained = beat.step - (self.beat.step if self.beat else 0)
        if gained > 0:
            if self.stepped is not None:
                self.pace.append((self.changed - self.stepped) / gained)
            self.stepped = self.changed
        elif gained < 0:
            self.stepped = None
        self.beat = beat

    def step_seconds(self) -> Optional[float]:
        return statistics.median(self.pace) if len(self.pace) >= STEPS_TO_LEARN else None


class Heartbeats:
    """The ranks' files of one attempt, in a folder of their own: a late rank of an older attempt writes elsewhere."""

    def __init__(
        self, folder: str, ranks: int, attempt: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.folder = folder
        self.attempt = attempt
        self._ranks = ranks
        self._clock = clock
        self._seen: Dict[int, Seen] = {}

    def prepare(self) -> None:
        """An empty folder. Raises OSError."""
        os.makedirs(self.folder, exist_ok=True)
        for local_rank in range(self._ranks):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self.folder, heartbeat_name(local_rank)))

    def poll(self) -> bool:
        """Reads the files; True when any of them changed."""
        changed = False
        for local_rank in range(self._ranks):
            content = self._read(local_rank)
            before = self._seen.get(local_rank)
            if content is None or (before is not None and before.content == content):
                continue
            changed = True
            seen = Seen(content, self._clock(), before.beat if before else None)
            if before is not None:
                seen.stepped, seen.pace = before.stepped, before.pace
            try:
                beat = Heartbeat.from_json(json.loads(content.decode("utf-8")))
                if beat.attempt in (0, self.attempt):
                    seen.step_to(beat)
            except (ValueError, ProtocolError) as error:
                seen.problem = f"{heartbeat_name(local_rank)}: {error}"
            self._seen[local_rank] = seen
        return changed

    def _read(self, local_rank: int) -> Optional[bytes]:
        try:
            with open(os.path.join(self.folder, heartbeat_name(local_rank)), "rb") as file:
                return file.read(MAX_BYTES)
        except OSError:
            return None

    def beat(self, local_rank: int) -> Optional[Heartbeat]:
        seen = self._seen.get(local_rank)
        return seen.beat if seen else None

    def age(self, local_rank: int) -> Optional[float]:
        """Seconds since the content last changed; None for a rank that writes no heartbeats."""
        seen = self._seen.get(local_rank)
        return max(0.0, self._clock() - seen.changed) if seen else None

    def step_seconds(self, local_rank: int) -> Optional[float]:
        """Median seconds per step; None until a few were seen."""
        seen = self._seen.get(local_rank)
        return seen.step_seconds() if seen else None

    def unease(self) -> int:
        """0 while all ranks keep their pace; else a number that rises each time the coordinator should hear of it.

        What usually takes a second is told of every second; a rank whose pace is not known, now and then.
        """
        worst = 0
        for seen in self._seen.values():
            age, usual = self._clock() - seen.changed, seen.step_seconds()
            if usual is None:
                first = every = UNEASY_UNLEARNT_SECONDS
            else:
                first, every = max(UNEASY_SECONDS, 1.5 * usual), max(1.0, usual / 4)
            if age >= first:
                worst = max(worst, 1 + int((age - first) / every))
        return worst

    def problems(self) -> List[str]:
        return [seen.problem for seen in self._seen.values() if seen.problem]

    def _beats(self) -> List[Heartbeat]:
        found = (self.beat(local_rank) for local_rank in range(self._ranks))
        return [beat for beat in found if beat is not None]

    def progress(self) -> Optional[Progress]:
        """Of the first local rank that knows it."""
        return next((beat.progress for beat in self._beats() if beat.progress is not None), None)

    def spent(self) -> Optional[Spent]:
        """Of the first local rank that tells: ranks of a gang move in step."""
        return next((beat.spent for beat in self._beats() if beat.spent is not None), None)

    def reached(self) -> Optional[Reached]:
        """Steps done by the local rank that came furthest; None where none of them tells."""
        steps = [beat.spent.step for beat in self._beats() if beat.spent is not None and beat.spent.step is not None]
        return Reached(self.attempt, max(steps)) if steps else None

    def checkpoint(self) -> Optional[CheckpointRef]:
        """The newest one any rank here has seen committed."""
        refs = [beat.checkpoint for beat in self._beats() if beat.checkpoint is not None]
        return max(refs, key=lambda ref: ref.step) if refs else None

    def phases(self) -> PhaseTime:
        """When the last local rank reached each phase; a phase that not all heartbeating ranks reached is absent."""
        known = [beat.phases for beat in self._beats()]
        merged = PhaseTime()
        for one in dataclasses.fields(PhaseTime):
            times: List[Optional[float]] = [getattr(phases, one.name) if phases else None for phases in known]
            reached = [time_of for time_of in times if time_of is not None]
            if reached and len(reached) == len(times):
                setattr(merged, one.name, max(reached))
        return merged

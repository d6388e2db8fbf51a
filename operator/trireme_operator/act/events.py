"""Events for `kubectl describe`: the same event again raises a count instead of making another object."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict

from trireme_api.job import API_VERSION, KIND

from trireme_operator.act.api import Api, ApiError, Json
from trireme_operator.decide.actions import Note
from trireme_operator.decide.clock import stamp
from trireme_operator.decide.views import Job

AGGREGATE_SECONDS = 600.0
REMEMBERED = 4096
MAX_MESSAGE = 1000


class Recorder:
    def __init__(self, api: Api, component: str) -> None:
        self._api, self._component = api, component
        self._recent: OrderedDict[tuple[str, str, str], tuple[str, int, float]] = OrderedDict()

    async def post(self, job: Job, note: Note) -> None:
        """Raises ApiError."""
        now = time.time()
        identity = job.uid, note.reason, note.message
        path = f"/api/v1/namespaces/{job.namespace}/events"
        name, count, at = self._recent.get(identity, ("", 0, 0.0))
        if name and now - at < AGGREGATE_SECONDS:
            try:
                await self._api.patch(f"{path}/{name}", {"count": count + 1, "lastTimestamp": _second(now)})
                self._remember(identity, name, count + 1, now)
                return
            except ApiError as error:
                if not error.not_found:
                    raise
        digest = hashlib.sha256("\0".join([*identity, str(now)]).encode()).hexdigest()[:16]
        name = f"{job.name}.{digest}"
        await self._api.create(path, self._event(job, note, name, now))
        self._remember(identity, name, 1, now)

    def _event(self, job: Job, note: Note, name: str, now: float) -> Json:
        message = note.message if len(note.message) <= MAX_MESSAGE else note.message[: MAX_MESSAGE - 1] + "…"
        return {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": job.namespace},
            "involvedObject": {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "namespace": job.namespace,
                "name": job.name,
                "uid": job.uid,
                "resourceVersion": job.resource_version,
            },
            "reason": note.reason,
            "message": message,
            "type": "Warning" if note.warning else "Normal",
            "source": {"component": "trireme-operator", "host": self._component},
            "reportingComponent": "trireme-operator",
            "reportingInstance": self._component,
            "firstTimestamp": _second(now),
            "lastTimestamp": _second(now),
            "count": 1,
        }

    def _remember(self, identity: tuple[str, str, str], name: str, count: int, now: float) -> None:
        self._recent[identity] = name, count, now
        self._recent.move_to_end(identity)
        while len(self._recent) > REMEMBERED:
            self._recent.popitem(last=False)


def _second(now: float) -> str:
    return stamp(now)[:19] + "Z"

"""The loop around reconcile: take a job from the queue, observe it, decide, act. Workers may run many jobs at once."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from trireme_api.job import TERMINAL, TrainingJobStatus
from trireme_api.layout import claim_fields

from trireme_operator.act.api import ApiError, Json
from trireme_operator.act.cluster import Cluster, NameTaken, NotLeader
from trireme_operator.decide import figures
from trireme_operator.decide.actions import CreatePod, Decision, DeleteJob, DeletePod, Note
from trireme_operator.decide.clock import seconds
from trireme_operator.decide.frozen import effective
from trireme_operator.decide.gang import HOLDING
from trireme_operator.decide.grid import Grid
from trireme_operator.decide.pods import Images, pod_manifest
from trireme_operator.decide.reconcile import reconcile
from trireme_operator.decide.views import Job, Key, Limits, Observed
from trireme_operator.observe.desk import Desk
from trireme_operator.observe.store import Store
from trireme_operator.queue import Queue
from trireme_operator.tracing import Off, Tracing

log = logging.getLogger(__name__)
MAX_STEPS = 8
"""Decisions that follow from one another in one go (write status, then act on it); the rest waits its turn."""

PACE_SECONDS = 5.0
"""Between two counts of the jobs that have figures to write."""

UNDECIDED_SECONDS = 0.1
"""The admission desk will have looked by then."""


class Controller:
    def __init__(
        self,
        store: Store,
        queue: Queue,
        desk: Desk,
        cluster: Cluster,
        images: Images,
        *,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.time,
        written: Callable[[Job, Job], None] = lambda before, after: None,
        grid: Callable[[], Grid] = Grid,
        tracing: Tracing | None = None,
    ) -> None:
        self.store, self.queue, self.desk, self.cluster, self.images = store, queue, desk, cluster, images
        self.limits = limits or Limits()
        self._pace, self._paced_at = self.limits.progress_seconds, 0.0
        self.clock = clock
        self.tracing: Tracing = tracing or Off()
        self.written = written
        """Called after each status write with the job before and after: assignments and metrics follow."""
        self.grid = grid
        self._errors: dict[Key, str] = {}

    async def work(self, observe: Callable[[str, float], None] = lambda result, seconds: None) -> None:
        """One worker: endless."""
        while True:
            key = await self.queue.get()
            began = time.perf_counter()
            result = "error"
            try:
                result = await self.settle(key)
            except asyncio.CancelledError:
                raise
            except Exception:
                # One job's trouble must never stop the others'; it comes again with back-off.
                log.exception("reconcile failed", extra={"namespace": key[0], "job": key[1]})
                self.queue.retry(key)
            finally:
                self.queue.done(key)
                observe(result, time.perf_counter() - began)

    async def settle(self, key: Key) -> str:
        """Looks at one job until nothing follows any more. Returns how it went, for metrics."""
        try:
            fresh = False
            for _ in range(MAX_STEPS):
                again, fresh = await self.step(key, fresh)
                if again is None:
                    break
                if again > 0:
                    self.queue.add(key, again)
                    break
            else:
                self.queue.add(key)
        except NotLeader:
            return "not-leader"
        except ApiError as error:
            if error.conflict or error.not_found:
                # Somebody wrote or deleted in between: look again with what is there now.
                await self.refresh(key)
                self.queue.retry(key)
                return "conflict"
            log.warning("%s", error, extra={"namespace": key[0], "job": key[1]})
            self.queue.retry(key)
            return "error"
        if key not in self._errors:
            self.queue.forget(key)
        return "ok"

    async def step(self, key: Key, fresh: bool) -> tuple[float | None, bool]:
        """One decision, carried out. `fresh`: the view was confirmed by the API server in this very look.

        Returns the seconds after which to take the next (None: when something happens), and whether the view is fresh.
        """
        job = self.store.jobs.get(key)
        if job is not None and self.desk.undecided(job):
            return UNDECIDED_SECONDS, fresh
        decision = await self._decide(key, job)
        if job is None or (not fresh and _rests_on_pods(job, decision)):
            # What pods should exist is never decided on hearsay: ask the API server, then decide again.
            job = await self.refresh(key)
            fresh = True
            decision = await self._decide(key, job)
        if job is None:
            await self._sweep(key)
            return None, fresh
        await self._remove_strangers(job)
        if decision.status is not None:
            before = job
            job = await self._write(job, decision.status)
            fresh = True  # the write went through with the resourceVersion we had, so our view was the newest
            self.written(before, job)
            await self.cluster.note(job, decision.notes)
        await self._act(job, decision)
        return decision.requeue_after, fresh

    async def refresh(self, key: Key) -> Job | None:
        """Reads the job and its pods from the API server into the store."""
        obj = await self.cluster.get_job(key)
        known = self.store.jobs.get(key)
        if known is not None and (obj is None or obj["metadata"]["uid"] != known.uid):
            self.store.drop_job(key, known.uid, self.clock())
        if obj is not None:
            self.store.put_job(obj)
        items, version = await self.cluster.list_pods(key)
        self.store.replace_pods(items, version, self.clock(), only=key)
        return self.store.jobs.get(key)

    async def _decide(self, key: Key, job: Job | None) -> Decision:
        if job is None:
            return Decision()
        missing = await self._missing_claims(job)
        with self.tracing.reconcile(job) as tell:
            decision = reconcile(job, self.observed(job, missing), self.clock())
            tell(decision)
        return decision

    def observed(self, job: Job, missing_claims: tuple[str, ...] = ()) -> Observed:
        pods = tuple(pod for pod in self.store.pods_of(job.key) if pod.owner_uid == job.uid)
        return Observed(
            pods=pods,
            nodes=self.store.nodes,
            heard={pod.uid: self.store.heard[pod.uid] for pod in pods if pod.uid in self.store.heard},
            admission=self.desk.verdict(job),
            missing_claims=missing_claims,
            write_error=self._errors.get(job.key, ""),
            limits=replace(self.limits, progress_seconds=self.pace()),
            grid=self.grid(),
        )

    def pace(self) -> float:
        """Seconds between two writes of one job's figures: more of them, the more jobs hold nodes."""
        now = self.clock()
        if not 0 <= now - self._paced_at < PACE_SECONDS:
            self._paced_at = now
            holding = sum(job.status.phase in HOLDING for job in self.store.jobs.values())
            self._pace = figures.interval(self.limits.progress_seconds, holding)
        return self._pace

    def figures_due(self, job: Job) -> float:
        """Seconds until figures that have come in may be written; 0 where they may be now."""
        last = seconds(job.status.updated_at)
        return max(0.0, last + self.pace() - self.clock()) if last is not None else 0.0

    async def _missing_claims(self, job: Job) -> tuple[str, ...]:
        """Claims are looked up only when the job is about to start: a pod that cannot mount hangs without a word."""
        phase = job.status.phase
        verdict = self.desk.verdict(job)
        if job.spec is None or phase in HOLDING or phase in TERMINAL or verdict is None or not verdict.fits:
            return ()
        if job.spec.run_policy.suspend or job.deleting:
            return ()
        return tuple(
            [
                f"{field}: there is no PersistentVolumeClaim {claim!r} in namespace {job.namespace}; create it"
                for claim, field in claim_fields(job.spec).items()
                if not await self.cluster.claim_exists(job.namespace, claim)
            ]
        )

    async def _write(self, job: Job, status: TrainingJobStatus) -> Job:
        plain = plain_status(status)
        admits = status.phase in HOLDING and job.status.phase not in HOLDING
        if admits:
            self.desk.grant(job)
        try:
            written = await self.cluster.patch_status(job, plain)
            self.store.put_own(written)
        finally:
            if admits:
                self.desk.settle(job)
        return self.store.jobs.get(job.key, job)

    async def _act(self, job: Job, decision: Decision) -> None:
        for action in decision.actions:
            if isinstance(action, DeletePod):
                obj = await self.cluster.delete_pod(job.key, action.name, action.uid, action.grace_seconds)
                if obj is not None:
                    self.store.put_pod(obj)
            elif isinstance(action, DeleteJob):
                await self.cluster.delete_job(job)
        creations = [action for action in decision.actions if isinstance(action, CreatePod)]
        if creations:
            await self._create(job, creations)
        else:
            self._errors.pop(job.key, None)

    async def _create(self, job: Job, creations: Iterable[CreatePod]) -> None:
        spec = effective(job)
        assert spec is not None
        results = await asyncio.gather(
            *(self.cluster.create_pod(job, pod_manifest(job, spec, item.slot, self.images)) for item in creations),
            return_exceptions=True,
        )
        trouble = ""
        for result in results:
            if isinstance(result, ApiError | NameTaken):
                trouble = result.message if isinstance(result, ApiError) else str(result)
            elif isinstance(result, BaseException):
                raise result
            else:
                self.store.put_pod(result)
        if trouble:
            self._errors[job.key] = trouble
            await self.cluster.note(job, [Note("CreateFailed", trouble, warning=True)])
            self.queue.retry(job.key)
        else:
            self._errors.pop(job.key, None)
            self.queue.add(job.key)

    async def _remove_strangers(self, job: Job) -> None:
        """Pods whose owner had this name and is gone: the garbage collector's work, done where it is slow or absent."""
        for pod in self.store.pods_of(job.key):
            if pod.owner_uid != job.uid and not pod.leaving:
                fresh = await self.refresh(job.key)
                if fresh is None or fresh.uid != pod.owner_uid:
                    await self._delete(job.key, pod.name, pod.uid)

    async def _sweep(self, key: Key) -> None:
        """The job is not there (asked the API server just now): neither may its pods be."""
        self._errors.pop(key, None)
        for pod in self.store.pods_of(key):
            if not pod.leaving:
                await self._delete(key, pod.name, pod.uid)

    async def _delete(self, key: Key, name: str, uid: str) -> None:
        obj = await self.cluster.delete_pod(key, name, uid, None)
        if obj is not None:
            self.store.put_pod(obj)
        else:
            self.store.drop_pod(uid, self.clock())

    # --- keeping up -------------------------------------------------------------------------------------------------

    async def resync(self) -> tuple[int, int]:
        """Puts the store right by LISTs, for events may be lost; returns how many jobs and pods were news."""
        items, version = await self.cluster.list_jobs()
        jobs = self.store.replace_jobs(items, version, self.clock())
        items, version = await self.cluster.list_pods()
        pods = self.store.replace_pods(items, version, self.clock())
        owned = {(pod.namespace, pod.owner_name) for pod in self.store.pods.values()}
        for key in jobs | pods | (owned - self.store.jobs.keys()):
            self.queue.add(key)
        return len(jobs), len(pods)

    async def keep_admitting(self, pause: float = 0.2) -> None:
        """Looks at the queue of waiting jobs whenever capacity may have changed, for at most a sixth of the time."""
        seen = -1
        while True:
            began = time.monotonic()
            if seen != self.store.capacity_version:
                seen = self.store.capacity_version
                for key in self.desk.decide():
                    self.queue.add(key)
            await asyncio.sleep(max(pause, 5 * (time.monotonic() - began)))


def _rests_on_pods(job: Job, decision: Decision) -> bool:
    """Whether it creates or deletes, or writes of a gang what creations and deletions will follow from. A job without
    slots has no pods to be wrong about, and an old view of the job itself is refused by the API server."""
    decisive = decision.status is not None and decision.requeue_after == 0.0
    return bool(decision.actions) or (decisive and bool(job.status.slots))


def plain_status(status: TrainingJobStatus) -> Json:
    """The status as it is written: what is not known and what is empty is left out."""

    def clean(value: object) -> object:
        if isinstance(value, dict):
            return {name: clean(item) for name, item in value.items() if item not in (None, "")}
        return [clean(item) for item in value] if isinstance(value, list) else value

    plain = clean(status.model_dump(mode="json", by_alias=True, exclude_none=True))
    assert isinstance(plain, dict)
    if status.admitted_spec is not None:
        plain["admittedSpec"] = status.admitted_spec  # verbatim: in a spec an empty text may be meant
    return plain

"""The one module that writes to Kubernetes. Every write may be repeated, and none touches what is not the job's own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from trireme_api.job import API_VERSION, GROUP, KIND, PLURAL, VERSION

from trireme_operator.act.api import Api, ApiError, Json
from trireme_operator.act.events import Recorder
from trireme_operator.decide.actions import Note
from trireme_operator.decide.views import JOB_LABEL, MANAGED, Job, Key
from trireme_operator.observe import leases

log = logging.getLogger(__name__)
PARALLEL_CREATES = 50
MAX_NOTES = 10_000


class NotLeader(Exception):
    """This replica has lost the lease: it must not write."""


class NameTaken(Exception):
    """A pod of our name belongs to someone else; it is neither adopted nor deleted."""


class Cluster(Protocol):
    """What the controller needs of Kubernetes; the simulation has one of its own."""

    async def get_job(self, key: Key) -> Json | None: ...
    async def list_jobs(self) -> tuple[list[Json], str]: ...
    async def list_pods(self, key: Key | None = None) -> tuple[list[Json], str]: ...
    async def patch_status(self, job: Job, status: Json) -> Json: ...
    async def create_pod(self, job: Job, manifest: Json) -> Json: ...
    async def delete_pod(self, key: Key, name: str, uid: str, grace_seconds: int | None) -> Json | None: ...
    async def delete_job(self, job: Job) -> None: ...
    async def note(self, job: Job, notes: Sequence[Note]) -> None: ...
    async def claim_exists(self, namespace: str, name: str) -> bool: ...


class Fence(Protocol):
    @property
    def leading(self) -> bool: ...


class KubernetesCluster:
    def __init__(self, api: Api, namespaces: Sequence[str], fence: Fence, component: str) -> None:
        self._api, self._namespaces, self._fence = api, tuple(namespaces), fence
        self._creating = asyncio.Semaphore(PARALLEL_CREATES)
        self._recorder = Recorder(api, component)
        self._notes: asyncio.Queue[tuple[Job, Note]] = asyncio.Queue(MAX_NOTES)

    # --- reading ----------------------------------------------------------------------------------------------------

    async def get_job(self, key: Key) -> Json | None:
        try:
            return await self._api.get(job_path(key))
        except ApiError as error:
            if error.not_found:
                return None
            raise

    async def list_jobs(self) -> tuple[list[Json], str]:
        try:
            return await self._list(f"/apis/{GROUP}/{VERSION}", PLURAL)
        except ApiError as error:
            if error.not_found:
                raise ApiError(
                    404, f"there is no CRD {PLURAL}.{GROUP} ({VERSION}); apply manifests/crd first"
                ) from None
            raise

    async def list_pods(self, key: Key | None = None) -> tuple[list[Json], str]:
        """Trireme's pods, or those of one job."""
        if key is None:
            return await self._list("/api/v1", "pods", labelSelector=f"{MANAGED}=true")
        selector = f"{MANAGED}=true,{JOB_LABEL}={key[1]}"
        return await self._api.list(f"/api/v1/namespaces/{key[0]}/pods", labelSelector=selector)

    async def list_foreign_pods(self) -> list[Json]:
        """Pods that take room on nodes and are not of our TrainingJobs; those of another operator's count, too."""
        query = {"fieldSelector": "status.phase!=Succeeded,status.phase!=Failed"}
        if not self._namespaces:
            query["labelSelector"] = f"{MANAGED}!=true"
        items, _ = await self._api.list("/api/v1/pods", **query)
        return [item for item in items if not (self._namespaces and self._own(item["metadata"]))]

    def _own(self, metadata: Json) -> bool:
        managed = (metadata.get("labels") or {}).get(MANAGED) == "true"
        return managed and metadata["namespace"] in self._namespaces

    async def list_nodes(self) -> tuple[list[Json], str]:
        return await self._api.list("/api/v1/nodes")

    async def list_node_leases(self) -> list[Json]:
        items, _ = await self._api.list(f"/apis/coordination.k8s.io/v1/namespaces/{leases.NAMESPACE}/leases")
        return items

    async def priority_of(self, name: str) -> int | None:
        """The value of a PriorityClass; None if there is none of this name."""
        try:
            return int((await self._api.get(f"/apis/scheduling.k8s.io/v1/priorityclasses/{name}")).get("value", 0))
        except ApiError as error:
            if error.not_found:
                return None
            raise

    async def claim_exists(self, namespace: str, name: str) -> bool:
        try:
            await self._api.get(f"/api/v1/namespaces/{namespace}/persistentvolumeclaims/{name}")
        except ApiError as error:
            if error.not_found:
                return False
            raise
        return True

    async def _list(self, base: str, plural: str, **query: str) -> tuple[list[Json], str]:
        if not self._namespaces:
            return await self._api.list(f"{base}/{plural}", **query)
        found: list[Json] = []
        versions: list[str] = []
        for namespace in self._namespaces:
            items, version = await self._api.list(f"{base}/namespaces/{namespace}/{plural}", **query)
            found += items
            versions.append(version)
        # The oldest of the snapshots: nothing newer than any of them may be taken for gone.
        return found, min(versions, key=lambda v: int(v) if v.isdigit() else 0)

    # --- writing ----------------------------------------------------------------------------------------------------

    async def patch_status(self, job: Job, status: Json) -> Json:
        """Replaces the status that `job` was read with; raises ApiError (conflict) if it has changed since."""
        self._check()
        changes = merge_patch(job.raw_status, status)
        body = {"metadata": {"resourceVersion": job.resource_version, "uid": job.uid}, "status": changes}
        return await self._api.patch(f"{job_path(job.key)}/status", body)

    async def create_pod(self, job: Job, manifest: Json) -> Json:
        """Creates the pod or finds that an earlier try did. Raises NameTaken."""
        self._check()
        path = f"/api/v1/namespaces/{job.namespace}/pods"
        async with self._creating:
            try:
                return await self._api.create(path, manifest)
            except ApiError as error:
                if not error.exists:
                    raise
            found = await self._api.get(f"{path}/{manifest['metadata']['name']}")
        if not controlled_by(found, job.uid):
            raise NameTaken(f"pod {manifest['metadata']['name']} exists and belongs to someone else; remove it")
        return found

    async def delete_pod(self, key: Key, name: str, uid: str, grace_seconds: int | None) -> Json | None:
        """Asks the pod to leave; None if it is gone already or another has its name by now."""
        self._check()
        body: Json = {"preconditions": {"uid": uid}}
        if grace_seconds is not None:
            body["gracePeriodSeconds"] = grace_seconds
        try:
            found = await self._api.delete(f"/api/v1/namespaces/{key[0]}/pods/{name}", body)
        except ApiError as error:
            if error.not_found or error.conflict:
                return None
            raise
        return found if found.get("kind") == "Pod" else None

    async def delete_job(self, job: Job) -> None:
        self._check()
        try:
            await self._api.delete(
                job_path(job.key), {"preconditions": {"uid": job.uid}, "propagationPolicy": "Background"}
            )
        except ApiError as error:
            if not (error.not_found or error.conflict):
                raise

    async def note(self, job: Job, notes: Sequence[Note]) -> None:
        """Events are for people and never hold up the work: they are posted by `post_notes`, in order."""
        for note in notes:
            level = logging.WARNING if note.warning else logging.INFO
            of = {"namespace": job.namespace, "job": job.name, "attempt": job.status.attempt}
            log.log(level, note.message, extra={**of, "reason": note.reason})
            try:
                self._notes.put_nowait((job, note))
            except asyncio.QueueFull:
                log.warning("event %s not posted: too many wait already", note.reason)

    async def post_notes(self) -> None:
        """Posts events for ever; one that cannot be posted is logged, and nothing else."""
        while True:
            job, note = await self._notes.get()
            try:
                self._check()
                await self._recorder.post(job, note)
            except NotLeader:
                continue  # the next leader tells what it decides itself
            except ApiError as error:
                log.warning("event %s not posted: %s", note.reason, error)

    def _check(self) -> None:
        if not self._fence.leading:
            raise NotLeader


def job_path(key: Key) -> str:
    return f"/apis/{GROUP}/{VERSION}/namespaces/{key[0]}/{PLURAL}/{key[1]}"


def controlled_by(obj: Mapping[str, Any], uid: str) -> bool:
    references = (obj.get("metadata") or {}).get("ownerReferences") or []
    return any(
        ref.get("uid") == uid
        and ref.get("controller")
        and ref.get("kind") == KIND
        and ref.get("apiVersion") == API_VERSION
        for ref in references
    )


def merge_patch(old: Mapping[str, Any], new: Mapping[str, Any]) -> Json:
    """The JSON merge patch (RFC 7396) that makes `new` of `old`: lists are replaced whole, None removes."""
    patch: Json = {}
    for name, value in new.items():
        before = old.get(name)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            inner = merge_patch(before, value)
            if inner:
                patch[name] = inner
        elif value != before:
            patch[name] = value
    for name in old.keys() - new.keys():
        patch[name] = None
    return patch

"""What the operator knows: jobs, pods, nodes and what agents said. Fed by events, put right by LISTs.

Events may come late, twice, or not at all; a LIST says what is there. Nothing older than what is known is taken in (by
resourceVersion), and what is known to be gone stays gone (by UID) however late an event about it comes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from typing import Any

from trireme_api.protocol import Report

from trireme_operator.decide.trail import Trail, follow
from trireme_operator.decide.views import Heard, Job, Key, Node, Pod, job_of, node_of, pod_of

TOMBSTONE_SECONDS = 600.0


def older(version: str, known: str) -> bool:
    """Whether a resourceVersion is before the known one. They grow in every API server that stores in etcd."""
    return version.isdigit() and known.isdigit() and int(version) < int(known)


def _claims(job: Job) -> object:
    """What of a job gang admission depends on."""
    status = job.status
    avoided = [node.name for node in status.avoided_nodes]
    return status.phase, status.attempt, len(status.slots), job.generation, avoided, status.carbon_hold.reason


class Store:
    """Not thread-safe: lives in one event loop."""

    def __init__(self) -> None:
        self.jobs: dict[Key, Job] = {}
        self.pods: dict[str, Pod] = {}
        """By UID; those controlled by a TrainingJob."""
        self.nodes: dict[str, Node] | None = None
        """None until nodes are watched."""
        self.heard: dict[str, Heard] = {}
        """By pod UID."""
        self.capacity_version = 0
        """Rises with all that gang admission depends on."""
        self._by_job: dict[Key, set[str]] = {}
        self._gone: dict[str, float] = {}
        self._own: dict[Key, tuple[str, str]] = {}
        """(UID, resourceVersion) that our own last write of each job left."""

    # --- jobs -------------------------------------------------------------------------------------------------------

    def put_job(self, obj: Mapping[str, Any]) -> Job | None:
        """Takes in a TrainingJob; None if something newer is known."""
        metadata = obj["metadata"]
        key = metadata["namespace"], metadata["name"]
        known = self.jobs.get(key)
        if metadata["uid"] in self._gone:
            return None
        if known is not None and known.uid == metadata["uid"]:
            if older(str(metadata.get("resourceVersion", "")), known.resource_version):
                return None
            job = job_of(obj, known)
        else:
            job = job_of(obj)
        self.jobs[key] = job
        if known is None or _claims(known) != _claims(job):
            self.capacity_version += 1
        return job

    def put_own(self, obj: Mapping[str, Any]) -> None:
        """Takes in a TrainingJob as our own write left it: who wrote looks at it, so the watch will bring no news."""
        job = self.put_job(obj)
        if job is not None:
            self._own[job.key] = job.uid, job.resource_version

    def is_own(self, obj: Mapping[str, Any]) -> bool:
        """Whether this is what our own last write left of the job."""
        metadata = obj["metadata"]
        known = self._own.get((metadata["namespace"], metadata["name"]))
        return known == (metadata["uid"], str(metadata.get("resourceVersion", "")))

    def drop_job(self, key: Key, uid: str, now: float) -> None:
        self._bury(uid, now)
        known = self.jobs.get(key)
        if known is not None and known.uid == uid:
            del self.jobs[key]
            self._own.pop(key, None)
            self.capacity_version += 1

    def replace_jobs(self, objects: Iterable[Mapping[str, Any]], version: str, now: float) -> set[Key]:
        """Takes in a whole LIST of this resourceVersion; returns the jobs whose entry changed."""
        seen, changed = set(), set()
        for obj in objects:
            key = obj["metadata"]["namespace"], obj["metadata"]["name"]
            seen.add(obj["metadata"]["uid"])
            before = self.jobs.get(key)
            after = self.put_job(obj)
            if after is not None and (before is None or before.resource_version != after.resource_version):
                changed.add(key)
        for key, job in list(self.jobs.items()):
            if job.uid not in seen and not older(version, job.resource_version):
                self.drop_job(key, job.uid, now)
                changed.add(key)
        return changed

    # --- pods -------------------------------------------------------------------------------------------------------

    def put_pod(self, obj: Mapping[str, Any]) -> Key | None:
        """Takes in a pod; returns its job's key if that is news."""
        pod = pod_of(obj)
        if not pod.owner_uid or pod.uid in self._gone:
            return None
        known = self.pods.get(pod.uid)
        if known is not None and (known == pod or older(pod.resource_version, known.resource_version)):
            return None
        key = pod.namespace, pod.owner_name
        self.pods[pod.uid] = pod
        self._by_job.setdefault(key, set()).add(pod.uid)
        if known is None or (known.node, known.over, known.leaving) != (pod.node, pod.over, pod.leaving):
            self.capacity_version += 1
        return key

    def drop_pod(self, uid: str, now: float) -> Key | None:
        self._bury(uid, now)
        pod = self.pods.pop(uid, None)
        self.heard.pop(uid, None)
        if pod is None:
            return None
        key = pod.namespace, pod.owner_name
        self._by_job[key].discard(uid)
        if not self._by_job[key]:
            del self._by_job[key]
        self.capacity_version += 1
        return key

    def pods_of(self, key: Key) -> list[Pod]:
        """Pods whose controller has this job's name, whatever its UID; in slot order."""
        found = [self.pods[uid] for uid in self._by_job.get(key, ())]
        return sorted(found, key=lambda pod: (pod.slot, pod.incarnation, pod.uid))

    def replace_pods(
        self, objects: Iterable[Mapping[str, Any]], version: str, now: float, only: Key | None = None
    ) -> set[Key]:
        """Takes in a LIST (of this resourceVersion) of all pods, or of one job's; returns the jobs with news."""
        before = self._by_job.get(only, set()) if only is not None else self.pods.keys()
        missing, changed = set(before), set()
        for obj in objects:
            missing.discard(obj["metadata"]["uid"])
            key = self.put_pod(obj)
            if key is not None:
                changed.add(key)
        for uid in missing:
            if older(version, self.pods[uid].resource_version):
                continue  # made since the LIST was taken
            key = self.drop_pod(uid, now)
            if key is not None:
                changed.add(key)
        return changed

    # --- nodes ------------------------------------------------------------------------------------------------------

    def put_node(self, obj: Mapping[str, Any], now: float) -> bool:
        """Takes in a node; True if anything that decisions depend on has changed."""
        if self.nodes is None:
            self.nodes = {}
        name = obj["metadata"]["name"]
        known = self.nodes.get(name)
        since = known.not_ready_since if known is not None and known.not_ready_since is not None else now
        node = node_of(obj, since, known.stale if known is not None else False)
        self.nodes[name] = node
        if node == known:
            return False
        self.capacity_version += 1
        return True

    def mark_stale(self, stale: Set[str], now: float) -> set[str]:
        """Takes in which nodes' leases are not renewed any more; returns the nodes for which that is news."""
        changed = {name for name, node in (self.nodes or {}).items() if node.stale != (name in stale)}
        for name in changed:
            assert self.nodes is not None
            node = self.nodes[name]
            gone = name in stale
            since = (node.not_ready_since or now) if gone or not node.ready else None
            self.nodes[name] = replace(node, stale=gone, not_ready_since=since)
        self.capacity_version += bool(changed)
        return changed

    def begin_listening(self, now: float) -> None:
        """From now on agents report here: the silence of those on suspect nodes counts from now."""
        for name, node in (self.nodes or {}).items():
            if self.nodes is not None and node.suspect:
                self.nodes[name] = replace(node, not_ready_since=now)

    def drop_node(self, name: str) -> None:
        if self.nodes is not None and self.nodes.pop(name, None) is not None:
            self.capacity_version += 1

    def replace_nodes(self, objects: Iterable[Mapping[str, Any]], now: float) -> bool:
        changed, seen = False, set()
        self.nodes = {} if self.nodes is None else self.nodes
        for obj in objects:
            seen.add(obj["metadata"]["name"])
            changed |= self.put_node(obj, now)
        for name in set(self.nodes) - seen:
            self.drop_node(name)
            changed = True
        return changed

    def jobs_on(self, node: str) -> set[Key]:
        return {(pod.namespace, pod.owner_name) for pod in self.pods.values() if pod.node == node}

    # --- agents -----------------------------------------------------------------------------------------------------

    def hear(self, pod_uid: str, report: Report, now: float, wait: float = 0.0) -> bool:
        """Takes in a report that waits so many seconds for its answer; True if it is more than a sign of life."""
        known = self.heard.get(pod_uid)
        if known is not None and report.attempt < known.report.attempt:
            return False  # overtaken on the way; an agent never goes back to an older attempt
        same = known is not None and (known.report.attempt, known.report.state) == (report.attempt, report.state)
        trail = follow(known.trail if known is not None else Trail(), report, now)
        since = known.since if same and known is not None else now
        self.heard[pod_uid] = Heard(report, now, since, trail, wait, _steps(known, report))
        return known is None or known.report != report

    def turned_away(self, pod_uid: str, now: float, wait: float) -> None:
        """A sign of life that was not listened to: its agent was told to be silent for as long as `wait`."""
        known = self.heard.get(pod_uid)
        if known is not None:
            self.heard[pod_uid] = replace(known, at=now, wait=wait)

    def _bury(self, uid: str, now: float) -> None:
        self._gone[uid] = now
        if len(self._gone) > 4096:
            self._gone = {one: at for one, at in self._gone.items() if now - at < TOMBSTONE_SECONDS}


def _steps(known: Heard | None, report: Report) -> dict[int, int]:
    """Of the two newest attempts that told any."""
    steps = dict(known.steps) if known is not None else {}
    if report.before is not None and report.before.attempt < report.attempt:
        steps[report.before.attempt] = report.before.step
    if report.spent is not None and report.spent.step is not None:
        steps[report.attempt] = report.spent.step
    return {attempt: steps[attempt] for attempt in sorted(steps)[-2:]}

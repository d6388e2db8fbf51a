"""kopf's part: watches that only say what changed. No handler that writes on objects, no finalizer, no index.

`on.event` is the one handler kind used: create and update handlers copy the whole spec into an annotation, and an index
of pods goes stale after a watch gap. What an event says goes into the store; which job it concerns goes into the queue.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import kopf
from trireme_api.job import GROUP, PLURAL, VERSION, Phase

from trireme_operator.decide.gang import HOLDING
from trireme_operator.decide.views import MANAGED, Key
from trireme_operator.observe.store import Store
from trireme_operator.serve.health import Health


class Backoffs:
    """Pauses between tries of kopf's own requests, some 40 s in all; iterable again and again, as kopf needs it."""

    def __iter__(self) -> Iterator[float]:
        return iter((0.5, 1, 2, 3, 5, 8, 10, 10))


class NoEssence(kopf.AnnotationsDiffBaseStorage):
    """For each event kopf copies the whole object, status and all, to see what has changed in it: of use to create and
    update handlers only, and with many jobs a fifth of the operator's processor time."""

    def build(self, *, body: kopf.Body, extra_fields: Any = None) -> kopf.BodyEssence:
        return kopf.BodyEssence()


def settings() -> kopf.OperatorSettings:
    found = kopf.OperatorSettings()
    found.watching.label_selectors["v1/pods"] = f"{MANAGED}=true"
    found.watching.server_timeout = 300
    found.watching.client_timeout = 310
    found.watching.inactivity_timeout = 70
    found.watching.connect_timeout = 10
    found.watching.chunk_size = 500
    found.networking.request_timeout = 30
    found.networking.error_backoffs = Backoffs()
    found.scanning.disabled = True
    found.peering.standalone = True
    found.posting.enabled = False
    found.persistence.finalizer = f"{GROUP}/operator"
    found.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=GROUP, v1=False)
    found.persistence.diffbase_storage = NoEssence(prefix=GROUP, key="last", v1=False)
    found.execution.default_backoff = 5
    found.process.ultimate_exiting_timeout = 25
    return found


def in_cluster(found: Any, environ: Mapping[str, str]) -> Any:
    """The login of the pod's service account by the address the kubelet gives; kopf takes the name, which needs DNS."""
    host, port = environ.get("KUBERNETES_SERVICE_HOST", ""), environ.get("KUBERNETES_SERVICE_PORT", "443")
    if found is None or not host:
        return found
    return dataclasses.replace(found, server=f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}")


def registry(
    store: Store, health: Health, mark: Callable[[Key], None], *, nodes: bool, kubeconfig: str | None
) -> kopf.OperatorRegistry:
    """`mark` is told of each job that something happened to."""
    found = kopf.OperatorRegistry()
    if kubeconfig:
        os.environ["KUBECONFIG"] = kubeconfig  # the one way to tell kopf

    @kopf.on.login(registry=found)
    def login(**kwargs: Any) -> Any:
        if kubeconfig:
            return kopf.login_with_kubeconfig(**kwargs)
        return in_cluster(kopf.login_with_service_account(**kwargs), os.environ)

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=found)
    async def job_event(event: Any, **_: Any) -> None:
        health.event("trainingjobs")
        obj = event["object"]
        key = obj["metadata"]["namespace"], obj["metadata"]["name"]
        if event["type"] == "DELETED":
            store.drop_job(key, obj["metadata"]["uid"], time.time())
            mark(key)
        elif not store.is_own(obj) and store.put_job(obj) is not None:
            mark(key)

    @kopf.on.event("v1", "pods", registry=found)
    async def pod_event(event: Any, **_: Any) -> None:
        health.event("pods")
        obj = event["object"]
        if event["type"] == "DELETED":
            key = store.drop_pod(obj["metadata"]["uid"], time.time())
        else:
            key = store.put_pod(obj)
        if key is not None:
            mark(key)

    if nodes:

        @kopf.on.event("v1", "nodes", registry=found)
        async def node_event(event: Any, **_: Any) -> None:
            health.event("nodes")
            obj = event["object"]
            name = obj["metadata"]["name"]
            if event["type"] == "DELETED":
                store.drop_node(name)
            elif not store.put_node(obj, time.time()):
                return
            for key in store.jobs_on(name):
                job = store.jobs.get(key)
                if job is not None and job.status.phase in HOLDING and job.status.phase != Phase.SUSPENDING:
                    mark(key)

    return found

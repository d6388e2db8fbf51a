"""The way to Kubernetes for `explain`, `top`, `logs`, `note` and `report`: kubectl's flags, and errors in one line."""

from __future__ import annotations

import difflib
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import yaml
from trireme_api.job import GROUP, PLURAL, VERSION

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

Json = dict[str, Any]
F = TypeVar("F", bound=Callable[..., Any])
REQUEST_SECONDS = (5.0, 30.0)
"""To connect, and between two pieces of an answer."""
JOB_UID_LABEL = "trireme.dev/job-uid"
MERGE = "application/merge-patch+json"
_ACCOUNT_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class KubeProblem(click.ClickException):
    """One line for people; exit code 1."""


def connected(command: F) -> F:
    """kubectl's flags, and the connection they lead to as the parameter `kube`."""

    @click.option("-n", "--namespace", metavar="NAME", help="Namespace. Left out: the context's.")
    @click.option("--context", metavar="NAME", help="Context of the kubeconfig. Left out: the current one.")
    @click.option("--kubeconfig", type=click.Path(path_type=Path), metavar="FILE", help="Left out: as kubectl.")
    @functools.wraps(command)
    def with_flags(*args: Any, namespace: str | None, context: str | None, kubeconfig: Path | None, **rest: Any) -> Any:
        return command(*args, kube=lambda: Kube.connect(namespace, context, kubeconfig), **rest)

    return with_flags  # type: ignore[return-value]


Connect = Callable[[], "Kube"]
"""Connects when it is called, for `--local` needs no cluster."""


class Kube:
    """Reads TrainingJobs and their pods as plain JSON. Raises KubeProblem."""

    def __init__(self, client: ApiClient, namespace: str) -> None:
        self._client = client
        self.namespace = namespace

    @classmethod
    def connect(cls, namespace: str | None, context: str | None, kubeconfig: Path | None) -> Kube:
        """By the kubeconfig, as kubectl would; else, in a pod, by its service account."""
        from kubernetes import config
        from kubernetes.client import ApiClient, Configuration

        settings = Configuration()
        try:
            if kubeconfig is None and context is None and _in_pod():
                config.load_incluster_config(client_configuration=settings)
                here = _ACCOUNT_NAMESPACE.read_text().strip() if _ACCOUNT_NAMESPACE.exists() else None
            else:
                given = str(kubeconfig) if kubeconfig else None
                config.load_kube_config(given, context, client_configuration=settings)
                contexts, current = config.list_kube_config_contexts(given)
                entry = next((item for item in contexts if item["name"] == context), current)
                here = entry["context"].get("namespace")
        except (config.ConfigException, OSError) as error:
            raise KubeProblem(f"no way to a cluster: {_line(error)}; give --kubeconfig or set KUBECONFIG") from None
        except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError):  # the library looks at no shapes
            file = kubeconfig or os.environ.get("KUBECONFIG") or "~/.kube/config"
            raise KubeProblem(f"no way to a cluster: {file} is no kubeconfig; give another with --kubeconfig") from None
        settings.retries = 1
        return cls(ApiClient(settings), namespace or here or "default")

    def job(self, name: str) -> Json:
        """The TrainingJob; of a name that is not there, says which are near."""
        found = self._get(self._path(name), missing_ok=True)
        if found is None:
            raise KubeProblem(self._no_such_job(name))
        return found

    def jobs(self, everywhere: bool = False) -> list[Json]:
        path = f"/apis/{GROUP}/{VERSION}/{PLURAL}" if everywhere else self._path()
        found = self._get(path, missing_ok=True)
        if found is None:
            raise KubeProblem(f"this cluster has no {PLURAL}.{GROUP}; install Trireme: kubectl apply -k manifests")
        return list(found["items"])

    def pods(self, job: Json) -> list[Json]:
        """Pods of this very job, by slot."""
        query = {"labelSelector": f"{JOB_UID_LABEL}={job['metadata']['uid']}"}
        found = self._get(f"/api/v1/namespaces/{self.namespace}/pods", query)
        return sorted(found["items"], key=lambda pod: str(pod["metadata"]["name"])) if found else []

    def events(self, job: Json) -> list[Json]:
        """What is left of them; oldest first. None of them where they may not be read: they repeat the status."""
        query = {"fieldSelector": f"involvedObject.uid={job['metadata']['uid']}"}
        try:
            found = self._get(f"/api/v1/namespaces/{self.namespace}/events", query)
        except KubeProblem:
            return []
        return sorted(found["items"], key=lambda e: str(e.get("lastTimestamp") or "")) if found else []

    def annotate(self, name: str, annotations: dict[str, str | None]) -> Json:
        """Sets annotations (None removes); others stay, whoever writes at the same time."""
        answer = self._send("PATCH", self._path(name), {"metadata": {"annotations": annotations}})
        return dict(json.loads(answer))

    def log(self, pod: str, *, follow: bool, tail: int | None, timestamps: bool = True) -> Iterator[str]:
        """The lines of the pod's training container, as they come."""
        query: dict[str, Any] = {"container": "trainer", "timestamps": str(timestamps).lower()}
        if follow:
            query["follow"] = "true"
        if tail is not None:
            query["tailLines"] = tail
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod}/log"
        # A rank may be silent for as long as it likes.
        timeout = (REQUEST_SECONDS[0], None) if follow else REQUEST_SECONDS
        answer = self._open("GET", path, query, None, timeout)
        pending = b""
        for chunk in answer.response.stream(16384):
            *whole, pending = (pending + chunk).split(b"\n")
            yield from (line.decode("utf-8", "replace") for line in whole)
        if pending:
            yield pending.decode("utf-8", "replace")

    def execute(self, pod: str, command: list[str], seconds: float = 60.0) -> str:
        """What the command prints in the training container. Raises KubeProblem where it fails."""
        from kubernetes.client import CoreV1Api
        from kubernetes.client.exceptions import ApiException
        from kubernetes.stream import stream

        try:
            running = stream(
                CoreV1Api(self._client).connect_get_namespaced_pod_exec, pod, self.namespace, container="trainer",
                command=command, stdin=False, stdout=True, stderr=True, tty=False, _preload_content=False, binary=True,
            )  # fmt: skip
            running.run_forever(timeout=seconds)
            out, trouble = running.read_channel(1), running.read_channel(2)
            code = running.returncode
        except ApiException as error:
            raise KubeProblem(f"pod {pod}: cannot run a command in it: {_line(error)}") from None
        if code != 0:
            said = trouble.decode("utf-8", "replace").strip().splitlines()
            raise KubeProblem(f"pod {pod}: {said[-1] if said else 'the command did not end well'}")
        return str(out.decode("utf-8", "replace"))

    def _path(self, name: str = "") -> str:
        base = f"/apis/{GROUP}/{VERSION}/namespaces/{self.namespace}/{PLURAL}"
        return f"{base}/{name}" if name else base

    def _no_such_job(self, name: str) -> str:
        names = [str(job["metadata"]["name"]) for job in self.jobs()]
        near = difflib.get_close_matches(name, names, n=3) or [n for n in names if name in n][:3]
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {', '.join(sorted(names)[:10])}"
        if not names:
            hint = "there is none in this namespace; another: -n NAMESPACE"
        return f"no TrainingJob {name!r} in namespace {self.namespace!r}; {hint}"

    def _get(self, path: str, query: Json | None = None, missing_ok: bool = False) -> Json | None:
        try:
            return dict(json.loads(self._send("GET", path, None, query)))
        except _Missing:
            if missing_ok:
                return None
            raise

    def _send(self, method: str, path: str, body: Any = None, query: Json | None = None) -> bytes:
        answer = self._open(method, path, query or {}, body, REQUEST_SECONDS)
        return bytes(answer.response.read())

    def _open(self, method: str, path: str, query: Json, body: Any, timeout: Any) -> Any:
        """The answer, its body not read yet."""
        from urllib.parse import urlencode

        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        client = self._client
        headers = {"Accept": "application/json", "User-Agent": "trireme"}
        if body is not None:
            headers["Content-Type"] = MERGE
        client.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        url = client.configuration.host + path + (f"?{urlencode(query)}" if query else "")
        try:
            answer = client.call_api(method, url, headers, body, _request_timeout=timeout)
        except (HTTPError, ApiException) as error:
            raise KubeProblem(f"no answer from {client.configuration.host}: {_line(error)}") from None
        if answer.status >= 400:
            raise self._refused(answer.status, answer.response.read())
        return answer

    def _refused(self, code: int, text: bytes) -> KubeProblem:
        try:
            message = str(json.loads(text)["message"])
        except (ValueError, KeyError, TypeError):
            message = text[:200].decode("utf-8", "replace").strip()
        if code == 404:
            return _Missing(message)
        if code == 401:
            message = "the cluster does not know you (401); log in again, or give --context"
        if code == 403:
            message += "; the ClusterRoles trireme-view and trireme-edit have the rights that are needed"
        return KubeProblem(" ".join(message.split()))


class _Missing(KubeProblem):
    pass


def _in_pod() -> bool:
    has_config = os.environ.get("KUBECONFIG") or Path("~/.kube/config").expanduser().exists()
    return not has_config and "KUBERNETES_SERVICE_HOST" in os.environ


def _line(error: BaseException) -> str:
    reason = getattr(error, "reason", None)
    text = " ".join(str(reason if reason else error).split())
    return text.rpartition(": ")[2] if "HTTPSConnection" in text else text[:300]

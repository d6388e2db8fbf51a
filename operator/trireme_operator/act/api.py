"""Requests to the Kubernetes API server: plain JSON in and out, one exception with the status code, one rate limit."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from urllib.parse import urlencode
from urllib.request import getproxies_environment

import aiohttp
from kubernetes.aio import client, config

from trireme_operator.queue import TokenBucket

log = logging.getLogger(__name__)
T = TypeVar("T")
Json = dict[str, Any]
MERGE_PATCH = "application/merge-patch+json"
REQUEST_SECONDS = 30
PAGE = 500
REACH_SECONDS = 2.0
Observer = Callable[[str, str, int, float], None]
"""(verb, resource, status code or 0, seconds)"""


class ApiError(Exception):
    """The API server refused or could not be reached (code 0). `message` is its own one-line answer."""

    def __init__(self, code: int, message: str, reason: str = "") -> None:
        super().__init__(f"{code or 'unreachable'}: {message}")
        self.code, self.message, self.reason = code, message, reason

    @property
    def not_found(self) -> bool:
        return self.code == 404

    @property
    def exists(self) -> bool:
        return self.code == 409 and self.reason == "AlreadyExists"

    @property
    def conflict(self) -> bool:
        """Also a precondition (UID) that does not hold."""
        return self.code == 409 and self.reason != "AlreadyExists"


class Api:
    """A thin client: generated models would cost most of the operator's memory and time for nothing it needs."""

    def __init__(self, api_client: client.ApiClient, *, qps: float = 100.0, burst: int = 200) -> None:
        self._client = api_client
        self._bucket = TokenBucket(qps, burst)
        self.observe: Observer = lambda verb, resource, code, seconds: None

    @classmethod
    async def connect(cls, kubeconfig: str | None, *, qps: float = 100.0, burst: int = 200) -> Api:
        """From a kubeconfig file, or from the pod's service account. Raises ApiError when there is neither."""
        settings = client.Configuration()
        try:
            if kubeconfig:
                await config.load_kube_config(config_file=kubeconfig, client_configuration=settings)
            else:
                config.load_incluster_config(client_configuration=settings)
        except config.ConfigException as error:
            raise ApiError(0, f"no way to the API server: {error}; give --kubeconfig or run in a pod") from None
        # The client's own default reads ~/.netrc for every request, by way of a thread.
        settings.client_session_kwargs = {"trust_env": bool(getproxies_environment())}
        return cls(client.ApiClient(settings), qps=qps, burst=burst)

    async def close(self) -> None:
        await self._client.close()

    async def get(self, path: str, **query: Any) -> Json:
        return await self._request("get", "GET", path, query)

    async def list(self, path: str, **query: Any) -> tuple[list[Json], str]:
        """Every item in pages, and the resourceVersion of the snapshot. A quorum read: nothing stale."""
        items: list[Json] = []
        while True:
            page = await self._request("list", "GET", path, {"limit": PAGE, **query})
            items += page.get("items") or []
            metadata = page.get("metadata") or {}
            if not metadata.get("continue"):
                return items, str(metadata.get("resourceVersion", ""))
            query["continue"] = metadata["continue"]

    async def create(self, path: str, body: Json) -> Json:
        return await self._request("create", "POST", path, {}, body)

    async def update(self, path: str, body: Json) -> Json:
        """PUT: the body's resourceVersion makes it conditional."""
        return await self._request("update", "PUT", path, {}, body)

    async def patch(self, path: str, body: Json) -> Json:
        return await self._request("patch", "PATCH", path, {}, body, MERGE_PATCH)

    async def delete(self, path: str, body: Json) -> Json:
        return await self._request("delete", "DELETE", path, {}, body)

    async def _request(
        self,
        verb: str,
        method: str,
        path: str,
        query: Json,
        body: Json | None = None,
        content: str = "application/json",
    ) -> Json:
        await self._bucket.take()
        headers = {"Accept": "application/json", "Content-Type": content, "User-Agent": "trireme-operator"}
        await self._client.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        url = self._client.configuration.host + path + (f"?{urlencode(query)}" if query else "")
        began, code = time.monotonic(), 0
        try:
            answer = await self._client.rest_client.request(
                method, url, headers=headers, body=body, _request_timeout=REQUEST_SECONDS
            )
            text = await answer.read()
            code = answer.status
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise ApiError(0, f"{type(error).__name__}: {error}".strip(": ")) from None
        finally:
            self.observe(verb, resource_of(path), code, time.monotonic() - began)
        if code >= 400:
            raise _refused(code, text)
        data: Json = json.loads(text)
        return data


def _refused(code: int, text: bytes) -> ApiError:
    try:
        status = json.loads(text)
        return ApiError(code, str(status.get("message", ""))[:500], str(status.get("reason", "")))
    except (ValueError, AttributeError):
        return ApiError(code, text[:200].decode(errors="replace").strip())


def resource_of(path: str) -> str:
    """The resource in a URL path, for metrics: no names, so that the number of series stays bounded."""
    parts = path.strip("/").split("/")
    parts = parts[2:] if parts[0] == "api" else parts[3:]
    if parts[:1] == ["namespaces"] and len(parts) > 2:
        parts = parts[2:]
    return "/".join([*parts[:1], *parts[2:3]])


async def once_reachable(call: Callable[[], Awaitable[T]], pause: float = REACH_SECONDS) -> T:
    """Calls until the API server answers. To end because it is away would only add the kubelet's growing back-off to
    its absence. Raises ApiError for what waiting does not mend (a refusal)."""
    while True:
        try:
            return await call()
        except ApiError as error:
            if 0 < error.code < 500:
                raise
            log.warning("waiting for the API server: %s", error)
            await asyncio.sleep(pause)

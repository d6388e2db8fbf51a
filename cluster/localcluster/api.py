"""The few API calls that bringing a cluster up needs, straight over HTTPS."""

from __future__ import annotations

import base64
import http.client
import json
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

from .report import ClusterError


class Api:
    """A client for one kubeconfig written by this project (token and inline CA)."""

    def __init__(self, kubeconfig: Path) -> None:
        try:
            config = json.loads(kubeconfig.read_text())
            cluster = config["clusters"][0]["cluster"]
            self.server = str(cluster["server"])
            self._token = str(config["users"][0]["user"]["token"])
            authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise ClusterError(
                f"{kubeconfig} is not a kubeconfig of the built-in cluster: run `cluster.py up`"
            ) from error
        # No proxy: the address is this machine's loopback whatever HTTPS_PROXY says.
        self._opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}),
            urllib.request.HTTPSHandler(context=ssl.create_default_context(cadata=authority)),
        )

    def request(
        self, method: str, path: str, body: Any = None, *, content: str = "application/json", timeout: float = 10.0
    ) -> Any:
        """One call; returns the decoded JSON, or the text where the answer is not JSON. Raises OSError where there is
        no answer, or half of one: an API server that is killed answers nobody to the end."""
        request = urllib.request.Request(self.server + path, method=method)
        request.add_header("Authorization", f"Bearer {self._token}")
        data = None
        if body is not None:
            data = json.dumps(body).encode()
            request.add_header("Content-Type", content)
        try:
            with self._opener.open(request, data=data, timeout=timeout) as answer:
                text = answer.read().decode()
                return json.loads(text) if answer.headers.get_content_type() == "application/json" else text
        except http.client.HTTPException as error:
            raise ConnectionError(f"{method} {path}: the answer was cut short: {error}") from error

    def ready(self) -> bool:
        """True when the API server says it is ready and lets the admin in."""
        try:
            return bool(self.request("GET", "/readyz", timeout=3.0) == "ok")
        except (OSError, ssl.SSLError, ValueError):
            return False

    def nodes(self) -> Dict[str, bool]:
        """Ready or not, by node name; empty when the API server does not answer."""
        try:
            listing = self.request("GET", "/api/v1/nodes", timeout=5.0)
        except (OSError, ValueError):
            return {}
        return {item["metadata"]["name"]: node_is_ready(item) for item in listing["items"]}

    def create_or_get(self, path: str, name: str, body: Dict[str, Any]) -> Any:
        """Create; an object of that name that exists already is returned unchanged."""
        try:
            return self.request("POST", path, body)
        except urllib.error.HTTPError as error:
            if error.code != 409:
                raise ClusterError(f"creating {name} failed: {explain(error)}") from error
            return self.request("GET", f"{path}/{name}")


def node_is_ready(node: Dict[str, Any]) -> bool:
    conditions: List[Dict[str, str]] = node.get("status", {}).get("conditions", [])
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def explain(error: urllib.error.HTTPError) -> str:
    """The message of a Kubernetes Status object, else the HTTP reason."""
    try:
        return str(json.loads(error.read())["message"])
    except (ValueError, KeyError, OSError, http.client.HTTPException):
        return f"HTTP {error.code}"


def wait(
    condition: Callable[[], bool], what: str, timeout: float, *, failed: Optional[Callable[[], Optional[str]]] = None
) -> None:
    """Poll until true; `failed` may say early, in one line, why it never will be."""
    deadline = time.monotonic() + timeout
    while not condition():
        reason = failed() if failed is not None else None
        if reason:
            raise ClusterError(reason)
        if time.monotonic() > deadline:
            raise ClusterError(f"{what} not ready after {timeout:.0f} s")
        time.sleep(0.1)

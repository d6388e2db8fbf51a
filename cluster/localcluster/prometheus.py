"""A Prometheus on this machine, for tests and for pictures of dashboards: the machine's own program, else Debian's."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Dict, Optional, Type

from . import debian
from .apiserver import free_ports
from .report import ClusterError
from .shell import which


def program(name: str) -> str:
    """Path of `prometheus` or `promtool`; fetched from Debian where the machine has none. No service is installed."""
    return which(name) or str(debian.unpack_prometheus() / name)


class Prometheus:
    """Runs from `with` to its end on a loopback port, with all it keeps in `folder`."""

    def __init__(self, folder: Path, config: Dict[str, Any]) -> None:
        """`config`: prometheus.yml as data."""
        self.folder = folder
        self.config = config
        self.url = f"http://127.0.0.1:{free_ports(1)[0]}"
        self._process: Optional[subprocess.Popen[bytes]] = None

    def __enter__(self) -> Prometheus:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "prometheus.yml").write_text(json.dumps(self.config))  # JSON is YAML
        command = [
            program("prometheus"), f"--config.file={self.folder}/prometheus.yml",
            f"--storage.tsdb.path={self.folder}/data", f"--web.listen-address={self.url[len('http://'):]}",
        ]  # fmt: skip
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log)
        until = time.monotonic() + 60
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise ClusterError(f"prometheus ended: {(self.folder / 'log').read_text()[-1000:]}")
            try:
                with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5):
                    return self
            except OSError:
                time.sleep(0.1)
        self.__exit__(None, None, None)
        raise ClusterError(f"prometheus is not ready within 60 s: see {self.folder}/log")

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(10)

    def get(self, path: str, **parameters: Any) -> Any:
        """`data` of the HTTP API's answer, e.g. get("query", query="up"). Raises ClusterError with its complaint."""
        query = urllib.parse.urlencode(parameters, doseq=True)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise ClusterError(f"{parameters}: {json.load(error).get('error')}") from None

"""The last word: /dev/termination-log, which the kubelet copies into the pod's status (at most 4096 bytes)."""

from __future__ import annotations

import json
import os
from typing import Any, Dict, Optional

from trireme_api.protocol import AgentState, CheckpointRef, Failure, Progress

from trireme_agent.settings import DEFAULT_TERMINATION_LOG

MAX_BYTES = 4096


def render(
    *, attempt: int, state: AgentState, exit_code: Optional[int], failure: Optional[Failure] = None,
    progress: Optional[Progress] = None, checkpoint: Optional[CheckpointRef] = None,
) -> bytes:
    """JSON of at most 4096 bytes; the traceback gives way first (its end, the reason, is kept), then the message."""
    body: Dict[str, Any] = {"attempt": attempt, "state": state.value}
    if exit_code is not None:
        body["exit"] = exit_code
    if progress is not None:
        body["step"] = progress.step
    if checkpoint is not None:
        body["checkpoint"] = checkpoint.to_json()
    if failure is not None:
        body["failure"] = failure.to_json()
    text = _dump(body)
    for key in ("traceback", "message"):
        inner = body.get("failure", {})
        while len(text) > MAX_BYTES and inner.get(key):
            over = len(text) - MAX_BYTES
            # JSON escapes can make a character up to 6 bytes long: approach from above, so as not to cut too much.
            kept = inner[key].lstrip("…")[max(1, over // 6) :]
            inner[key] = "…" + kept if kept else ""
            text = _dump(body)
    if len(text) > MAX_BYTES:
        body.pop("checkpoint", None)
        text = _dump(body)
    return text


def _dump(body: Dict[str, Any]) -> bytes:
    return json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")


def write(path: str, content: bytes) -> None:
    """Overwrites the file. Without one at the default place (no kubelet made it) nothing is written."""
    if path == DEFAULT_TERMINATION_LOG and not os.path.exists(path):
        return
    try:
        with open(path, "wb") as file:
            file.write(content)
    except OSError:
        pass  # it only ever repeats what was reported

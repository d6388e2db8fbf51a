"""A gang that loses a node, shrinks, grows back and is scaled, with real agents; no step is lost by a wished change."""

from __future__ import annotations

import json
import os
import signal
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import NODES
from rig import MERGE, KubeletStandIn, OperatorProcess, World, eventually, script_job

Operators = Callable[..., OperatorProcess]
Kubelets = Callable[..., KubeletStandIn]

# Ranks in step: each step is an all-reduce (through files) of "was I asked to stop?", as the trainer does it.
RANK = """
import json, os, signal, sys, time
from pathlib import Path
shared, asked = Path({shared!r}), []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
rank, world, attempt = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "TRIREME_ATTEMPT"))
here, beats = shared / str(attempt), Path(os.environ["TRIREME_HEARTBEAT_DIR"])
here.mkdir(exist_ok=True)

def put(path, text):
    path.with_suffix(".tmp%d" % rank).write_text(text)
    os.replace(path.with_suffix(".tmp%d" % rank), path)

def trace(**fields):
    with open(shared / "trace", "a") as file:
        file.write(json.dumps(dict(attempt=attempt, world=world, **fields)) + "\\n")

def commit(step):
    put(shared / "step", str(step))
    beat = dict(step=step, phase="step", time=0, attempt=attempt, checkpoint=dict(step=step, path="step-%d" % step))
    put(beats / "rank-0.json", json.dumps(beat))

step = int((shared / "step").read_text()) if (shared / "step").exists() else 0
if rank == 0:
    trace(begins=step)
while True:
    put(here / ("%d.%d" % (step, rank)), str(len(asked)))
    votes = [here / ("%d.%d" % (step, other)) for other in range(world)]
    while not all(vote.exists() for vote in votes):
        time.sleep(0.01)
    step += 1
    stop = any(vote.read_text() != "0" for vote in votes)
    if rank == 0 and (stop or step % 10 == 0):
        commit(step)
    if stop:
        if rank == 0:
            trace(ends=step)
        time.sleep(0.3)
        sys.exit(75)
    time.sleep(0.05)
"""


def lines(folder: Path) -> list[dict[str, int]]:
    return [json.loads(line) for line in (folder / "trace").read_text().splitlines()]


def runs_on(world: World, size: int, attempt: int) -> Callable[[], Any]:
    def there() -> Any:
        status = world.status("flex")
        known = status.get("replicas", {})
        world.last = {key: status.get(key) for key in ("phase", "explanation", "attempt", "slots", "sizing")}
        good = (status.get("phase"), known.get("size"), known.get("ready")) == ("Running", size, size)
        return status if good and status["attempt"] >= attempt else None

    return there


def scale(world: World, nodes: int) -> Any:
    """What `kubectl scale tj flex --replicas` does."""
    return world.api.request("PATCH", world.path("flex", "scale"), {"spec": {"replicas": nodes}}, content=MERGE)


def test_three_two_three_and_scaled(world: World, operators: Operators, kubelet: Kubelets, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    operators("operator", "--shrink-seconds", "2", "--snooze-seconds", "4")
    standin = kubelet(run=True)
    spec = script_job(3, RANK.format(shared=str(shared)))
    spec["replicas"] = {"desired": 3, "min": 2, "max": 3}
    spec["template"]["terminationGracePeriodSeconds"] = 20
    world.create("flex", spec)
    eventually(runs_on(world, 3, 1), "three nodes", 60)
    eventually(lambda: (shared / "step").exists(), "a checkpoint", 60)

    # A node is lost and there is no other: the pod's replacement finds no place.
    standin.nodes = []
    lost = next(p for p in world.pods("flex") if p["metadata"]["name"] == "flex-1-1")
    os.killpg(standin.processes[lost["metadata"]["uid"]].pid, signal.SIGKILL)
    world.api.request("DELETE", standin.path(lost), {"gracePeriodSeconds": 0})
    status = eventually(runs_on(world, 2, 3), "two nodes", 90)
    assert status["nodeSummary"] == "2/3"
    assert world.condition("flex", "Shrunk")["status"] == "True"
    assert sum(status["restarts"][kind] for kind in ("process", "pod", "gang")) == 1
    shrunk = status["attempt"]

    # Room again: the third pod gets ready beside the running gang, then all go on together.
    standin.nodes = list(NODES)
    status = eventually(runs_on(world, 3, shrunk + 1), "three nodes again", 90)
    assert status["restartCount"] == 1
    assert world.condition("flex", "Shrunk")["status"] == "False"
    grown = status["attempt"]

    answer = scale(world, 2)
    assert answer["spec"]["replicas"] == 2
    status = eventually(runs_on(world, 2, grown + 1), "scaled to two", 60)
    assert (status["attempt"], status["restartCount"]) == (grown + 1, 1)
    answer = world.api.request("GET", world.path("flex", "scale"))
    assert answer["status"]["replicas"] == 2
    assert answer["status"]["selector"].startswith("trireme.dev/job-uid=")
    eventually(lambda: len(world.pods("flex")) == 2, "the third pod leaves", 40)

    refused = 0  # by the server where it knows the CRD's rules, else by the operator, which changes nothing
    try:
        scale(world, 9)
    except urllib.error.HTTPError as error:
        refused = error.code
    told = lambda: world.condition("flex", "Invalid").get("message", "")  # noqa: E731
    assert refused == 422 or eventually(lambda: "max: 3" in told(), "told that 9 is too many")
    assert len(world.pods("flex")) == 2
    scale(world, 3)
    eventually(runs_on(world, 3, grown + 2), "scaled to three", 60)

    found = lines(shared)
    ends = {item["attempt"]: item["ends"] for item in found if "ends" in item}
    begins = {item["attempt"]: (item["begins"], item["world"]) for item in found if "begins" in item}
    assert [world_size for _, world_size in begins.values()] == [3, 2, 3, 2, 3]
    print("attempt: (first step, nodes)", begins, "ended at", ends)
    for attempt in (shrunk, grown, grown + 1):
        assert begins[attempt + 1][0] == ends[attempt], "a wished change of size goes on at the very step"
    assert world.status("flex")["restartCount"] == 1



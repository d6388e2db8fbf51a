"""Every fault: its name, what it does, how it is undone, and what must come of it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from chaos import arena as arenas
from chaos.arena import Job
from chaos.measure import Broken, events, step_seconds

Json = dict[str, Any]


@dataclass
class Scene:
    """One injection: the job, and what healing must know."""

    job: Job
    away_seconds: float = 60.0
    """How long the API server or a slow rank's slowness stays."""
    undo: list[Callable[[], object]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def heal(self) -> None:
        while self.undo:
            self.undo.pop()()


@dataclass(frozen=True)
class Fault:
    name: str
    what: str
    """What is done, in one sentence, for the table's legend."""
    inject: Callable[[Scene], float]
    """Does it; returns the Unix time at which it was done. Where nothing restarts: returns when it is over."""
    where: tuple[str, ...] = ("local", "cluster")
    kind: Literal["recovery", "pause"] = "recovery"
    """pause: nothing must restart, and the time is the longest without a step."""
    attempts: int = 1
    restarts: int = 1
    """That `status.restartCount` may rise by; a suspension is not a restart."""
    keeps_every_step: bool = False
    """True: what the ranks were asked to save was saved, and no step is done twice."""
    spares_ready: bool = True
    """True: only once the warm spare of every rank is ready, as it is but for the first seconds of an attempt."""
    log_on_same_disk: bool = False
    """True: the step log may miss rows, for it lies on the disk that was full."""
    target: float | None = None
    """Seconds, of the total."""
    detect: float | None = None
    """Seconds until the failure is known."""


def rank_killed(scene: Scene) -> float:
    return arenas.kill(arenas.rank_of(scene.job.pod(1)))


def rank_stopped(scene: Scene) -> float:
    pid = arenas.rank_of(scene.job.pod(1))
    scene.undo.append(lambda: _continue(pid))
    return arenas.kill(pid, signal.SIGSTOP)


def _continue(pid: int) -> None:
    if arenas.alive(pid):
        os.kill(pid, signal.SIGCONT)


def agent_killed(scene: Scene) -> float:
    """The agent is PID 1 of its pod: with it the kernel ends every process of the pod. Where pods have no process
    namespace of their own (local processes), the same is done by hand."""
    pod = scene.job.pod(1)
    agent = arenas.agent_of(pod)
    at = arenas.kill(agent)
    for pid in arenas.of_pod(pod["metadata"]["uid"]):
        if pid != agent and arenas.alive(pid):
            arenas.kill(pid)
    return at


def pod_deleted(scene: Scene) -> float:
    at = time.time()
    scene.job.arena.delete_pod(scene.job.pod(1)["metadata"]["name"], grace=0)
    return at


def pod_evicted(scene: Scene) -> float:
    """What a drain does: SIGTERM to one pod of the gang, with its grace period. All ranks must save one step."""
    at = time.time()
    scene.job.arena.delete_pod(scene.job.pod(1)["metadata"]["name"], grace=None)
    return at


def suspended_and_resumed(scene: Scene, during: Callable[[str], None] = lambda _: None) -> float:
    """Returns the time of the resumption."""
    job = scene.job
    at = time.time()
    job.arena.patch(job.name, {"runPolicy": {"suspend": True}})
    during("Suspending")
    arenas.wait_until(
        "suspension", lambda: job.status().get("phase") == "Suspended" and not job.arena.pods(job.name), 120
    )
    scene.facts["secondsToSuspend"] = round(time.time() - at, 3)
    stopped, saved = job.curve().last_step(), (job.status().get("lastCheckpoint") or {}).get("step")
    if saved != stopped:
        raise Broken(f"suspended after step {stopped}, but status says that step {saved} is saved")
    at = time.time()
    job.arena.patch(job.name, {"runPolicy": {"suspend": False}})
    during("Starting")
    return at


def operator_killed(scene: Scene) -> float:
    at = time.time()
    _kill_operator(scene)
    return at


def _kill_operator(scene: Scene) -> None:
    at = time.time()
    scene.job.arena.kill_operator()
    arenas.wait_until("the operator is away", lambda: not scene.job.arena.operator_leads(), 30)
    arenas.wait_until("the operator leads again", scene.job.arena.operator_leads, 120)
    scene.facts.setdefault("secondsWithoutOperator", []).append(round(time.time() - at, 3))


def operator_killed_recovering(scene: Scene) -> float:
    job, attempt = scene.job, scene.job.attempt()
    at = rank_killed(scene)
    arenas.wait_until("the phase Recovering", lambda: job.status()["phase"] == "Recovering", 60, every=0.01)
    scene.facts["killedInPhase"] = "Recovering"
    _kill_operator(scene)
    if job.attempt() != attempt + 1:
        raise Broken(f"attempt {job.attempt()} after one failure in attempt {attempt}")
    return at


def operator_killed_stopping_and_starting(scene: Scene) -> float:
    def during(phase: str) -> None:
        arenas.wait_until(f"the phase {phase}", lambda: scene.job.status()["phase"] == phase, 60, every=0.01)
        scene.facts.setdefault("killedInPhases", []).append(phase)
        _kill_operator(scene)

    return suspended_and_resumed(scene, during)


def api_server_away(scene: Scene) -> float:
    job = scene.job
    before = job.curve().last_step()
    at = time.time()
    job.arena.api_server(up=False)
    scene.undo.append(lambda: job.arena.api_server(up=True))
    time.sleep(scene.away_seconds)
    scene.facts["secondsAway"] = scene.away_seconds
    scene.facts["stepsMeanwhile"] = job.curve().last_step() - before
    scene.heal()
    arenas.wait_until("the operator leads again", job.arena.operator_leads, 120)
    scene.facts["secondsUntilOperatorLeads"] = round(time.time() - at - scene.away_seconds, 3)
    here = job.curve().last_step()
    job.wait_for("progress in status", lambda: (job.status().get("progress") or {}).get("step", 0) >= here, 60)
    return at


def shard_corrupted(scene: Scene) -> float:
    """Two bytes of the newest checkpoint's largest shard are flipped, then a rank is killed."""
    job = scene.job
    job.wait_for("two checkpoints to choose from", lambda: len(job.checkpoints()) > 1)
    saved = job.committed()
    newest = job.folder / f"step-{saved:08d}"
    shard = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0x40
    data[len(data) // 2 + 1] ^= 0x01
    shard.write_bytes(data)
    attempt = job.attempt()
    at = rank_killed(scene)

    def skipped() -> list[Json]:
        lines = job.lines()
        return [row for row in events(lines, "checkpoint-skipped") if row["attempt"] > attempt]

    job.wait_for("the damaged checkpoint is named", skipped)
    if shard.name not in skipped()[0]["reason"]:
        raise Broken(f"the reason does not name {shard.name}: {skipped()[0]['reason']}")
    resumed = job.wait_for("resumption", lambda: [r for r in events(job.lines(), "resumed") if r["attempt"] > attempt])
    if resumed[0]["step"] >= saved:
        raise Broken(f"resumed from step {resumed[0]['step']}, though the checkpoint of step {saved} was damaged")
    scene.facts["damagedStep"], scene.facts["resumedStep"] = saved, resumed[0]["step"]
    return at


def storage_full(scene: Scene) -> float:
    """The checkpoints' file system is filled to the last byte; two saves fail; then there is room again."""
    job = scene.job
    filler = job.folder.parent / "filler"
    scene.undo.append(lambda: filler.unlink(missing_ok=True))
    at = time.time()
    _fill(filler, job.arena.storage_size(job.name))
    # The step log lies on the same disk, and status may be seconds old, in which a third save would end the attempt.
    rank = arenas.rank_of(job.pod(1))
    before, step = job.committed(), int(job.heartbeat(rank)["step"])
    far = step + 2 * job.every + 2
    job.wait_for(f"step {far} with a full disk", lambda: int(job.heartbeat(rank)["step"]) >= far)
    after = job.committed()
    if after > before + job.every:
        raise Broken(f"a checkpoint of step {after} was committed on a full disk")
    scene.facts["stepsWithFullDisk"] = int(job.heartbeat(rank)["step"]) - step
    scene.heal()
    job.wait_for("a checkpoint once there is room", lambda: job.committed() > after)
    return at


def _fill(path: Any, size: int) -> None:
    with path.open("wb", buffering=0) as file:
        for chunk in (1 << 20, 1 << 12, 1):
            try:
                for _ in range(size // chunk + 1):
                    file.write(b"\0" * chunk)
            except OSError:
                continue
    try:
        with path.open("ab", buffering=0) as file:
            file.write(b"\0" * (1 << 20))
        raise Broken(f"{path.parent} holds more than {size} bytes: it could not be filled")
    except OSError:
        return


def rank_slow(scene: Scene) -> float:
    """One rank gets every third 30 ms only (SIGSTOP and SIGCONT in turn). Slow is not hung: nothing must restart."""
    job = scene.job
    scene.facts["stepSecondsBefore"] = round(step_seconds(job.curve()), 4)
    pid, over = arenas.rank_of(job.pod(1)), threading.Event()

    def slow() -> None:
        while not over.is_set() and arenas.alive(pid):
            os.kill(pid, signal.SIGSTOP)
            over.wait(0.06)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.03)

    thread = threading.Thread(target=slow, name="slow rank", daemon=True)

    def end() -> None:
        over.set()
        thread.join(5)
        _continue(pid)

    scene.undo.append(end)
    at = time.time()
    thread.start()
    time.sleep(min(20.0, scene.away_seconds))
    scene.facts["stepSecondsSlow"] = round(step_seconds(job.curve(), 20), 4)
    scene.facts["stragglerNamed"] = bool((job.status().get("stragglers")) or [])
    scene.heal()
    return at


def clock_jumped(scene: Scene) -> float:
    """The wall clock of one pod (agent and ranks) jumps ten minutes ahead, then ten minutes behind, then is right."""
    arena: Any = scene.job.arena
    scene.undo.append(lambda: arena.clock_ahead(1, 0))
    at = time.time()
    for seconds in (600, -600):
        arena.clock_ahead(1, seconds)
        scene.job.wait_for("heartbeats by that clock", lambda: abs(_ahead(scene.job) - seconds) < 60)  # noqa: B023
        time.sleep(min(10.0, scene.away_seconds))
    scene.heal()
    return at


def _ahead(job: Job) -> float:
    """Seconds that slot 1's newest heartbeat is ahead of the machine's clock."""
    return float(job.heartbeat(arenas.rank_of(job.pod(1)))["time"]) - time.time()


def kubelet_stopped(scene: Scene) -> float:
    """For half a minute, less than Kubernetes' own 40 s of grace: containers run on, and so must training."""
    arena: Any = scene.job.arena
    _, number = arena.slot_away_from_operator(scene.job.name)
    scene.undo.append(lambda: arena.cluster.start_process(f"kubelet-{number}"))
    at = time.time()
    arena.cluster.stop_process(f"kubelet-{number}")
    time.sleep(min(30.0, scene.away_seconds))
    scene.heal()
    return at


def node_gone(scene: Scene) -> float:
    """containerd, its shims, the containers, the kubelet: all killed at once. The node comes back afterwards. Two
    attempts for one failure: the peers see a connection end before anybody can know that the node is gone."""
    arena: Any = scene.job.arena
    slot, number = arena.slot_away_from_operator(scene.job.name)
    scene.facts["slot"] = slot
    scene.undo.append(lambda: arena.cluster.start_node(number))
    at = time.time()
    arena.cluster.stop_node(number)
    return at


def cable_pulled(scene: Scene) -> float:
    """The node's only network interface goes down: its ranks live on as zombies. Plugged in again afterwards, they
    must end and must not have written anything."""
    arena: Any = scene.job.arena
    slot, number = arena.slot_away_from_operator(scene.job.name)
    pod = scene.job.pod(slot)
    scene.facts["slot"] = slot

    def plug() -> None:
        at = time.time()
        arena.cluster.set_link(number, True)
        uid = pod["metadata"]["uid"]
        arenas.wait_until("the zombie pod's processes end", lambda: not arenas.of_pod(uid), 120)
        scene.facts["zombieEndedAfterSeconds"] = round(time.time() - at, 3)

    scene.undo.append(plug)
    at = time.time()
    arena.cluster.set_link(number, False)
    return at


FAULTS: tuple[Fault, ...] = (
    Fault("rank-sigkill", "SIGKILL to one rank", rank_killed, target=10, detect=2),
    Fault(
        "rank-sigkill-early", "SIGKILL to one rank while the warm spares still import torch", rank_killed,
        spares_ready=False, detect=2,
    ),
    Fault("rank-sigstop", "SIGSTOP to one rank: it hangs", rank_stopped, target=60, detect=15),
    Fault("agent-killed", "SIGKILL to a pod's agent, PID 1 of the pod", agent_killed, target=30, detect=2),
    Fault("pod-deleted", "a pod deleted with no grace", pod_deleted, target=30),
    Fault(
        "pod-evicted", "a pod deleted with its grace period, as a drain does: all ranks save one step", pod_evicted,
        keeps_every_step=True, target=60,
    ),
    Fault(
        "suspend-resume", "suspended, and resumed once its pods are gone; the time counts from the resumption",
        suspended_and_resumed, restarts=0, keeps_every_step=True, target=30,
    ),
    Fault(
        "operator-killed-running", "SIGKILL to the operator while the gang runs", operator_killed, kind="pause",
        attempts=0, restarts=0,
    ),
    Fault(
        "operator-killed-recovering", "SIGKILL to a rank, and to the operator while the gang recovers",
        operator_killed_recovering, target=30,
    ),
    Fault(
        "operator-killed-suspending", "SIGKILL to the operator while the gang suspends, and again while it starts",
        operator_killed_stopping_and_starting, restarts=0, keeps_every_step=True, target=60,
    ),
    Fault(
        "api-server-away", "the API server killed and away for a minute", api_server_away, kind="pause", attempts=0,
        restarts=0,
    ),
    Fault(
        "shard-corrupted", "two bytes of the newest checkpoint flipped, then SIGKILL to a rank", shard_corrupted,
        target=15, detect=2,
    ),
    Fault(
        "storage-full", "the checkpoints' disk filled for two saves", storage_full, where=("local",), kind="pause",
        attempts=0, restarts=0, log_on_same_disk=True,
    ),
    Fault(
        "rank-slow", "one rank at a third of its speed for 20 s", rank_slow, kind="pause", attempts=0, restarts=0,
    ),
    Fault(
        "clock-jump", "the clock of one pod ten minutes ahead for 10 s, then ten minutes behind", clock_jumped,
        where=("local",), kind="pause", attempts=0, restarts=0,
    ),
    Fault(
        "kubelet-stopped", "SIGKILL to a node's kubelet, started again after 30 s", kubelet_stopped, where=("cluster",),
        kind="pause", attempts=0, restarts=0,
    ),
    Fault(
        "node-gone", "all processes of a node killed: containerd, shims, containers, kubelet", node_gone,
        where=("cluster",), attempts=2, target=60, detect=20,
    ),
    Fault(
        "cable-pulled", "a node's network interface down; up again once the gang trains on", cable_pulled,
        where=("cluster",), target=60, detect=20,
    ),
)  # fmt: skip


def chosen(where: str, names: str) -> list[Fault]:
    """Faults of an arena by comma-separated names, all where none is named. Raises ValueError for an unknown name."""
    known = {fault.name: fault for fault in FAULTS if where in fault.where}
    wanted = [name for name in names.split(",") if name] or list(known)
    for name in wanted:
        if name not in known:
            raise ValueError(f"no fault {name!r} in {where}; there are {', '.join(known)}")
    return [known[name] for name in wanted]

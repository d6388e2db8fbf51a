"""200 jobs are created, suspended, resumed and deleted while the operator is killed and started again ten times."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from rig import KubeletStandIn, OperatorProcess, World, eventually, script_job

Operators = Callable[..., OperatorProcess]
Kubelets = Callable[..., KubeletStandIn]
JOBS, KILLS = 200, 10


def test_200_jobs_while_the_operator_is_killed_ten_times(world: World, operators: Operators, kubelet: Kubelets) -> None:
    chance = random.Random(7)
    operator = operators()
    kubelet(pause=0.3)
    names = [f"job-{i:03d}" for i in range(JOBS)]
    began = time.monotonic()
    uids: dict[str, str] = {}

    def create(name: str) -> None:
        uids[name] = world.create(name, script_job(chance.choice((1, 2))))["metadata"]["uid"]

    def kill() -> None:
        operator.kill()
        assert_no_duplicates(world)
        operator.start(ready=False)
        eventually(lambda: operator.metric("trireme_leader") == 1, "it works again", 30, pause=0.05)

    deeds = [(create, name) for name in names]
    suspended = chance.sample(names, 60)
    deeds += [(lambda n: world.patch(n, {"runPolicy": {"suspend": True}}), name) for name in suspended]
    deeds += [(lambda n: world.patch(n, {"runPolicy": {"suspend": False}}), name) for name in suspended[:30]]
    deeds += [(world.delete, name) for name in chance.sample(names, 100)]
    deleted = {name for deed, name in deeds if deed == world.delete}
    share = len(deeds) // KILLS
    for i, (deed, name) in enumerate(deeds):
        deed(name)
        time.sleep(0.05)  # the next kill is to come in the midst of work
        if i % share == share // 2:
            kill()
    killed = sum(i % share == share // 2 for i in range(len(deeds)))
    assert killed >= KILLS

    left = [name for name in names if name not in deleted]
    still = set(suspended[30:]) - deleted

    def settled() -> bool:
        jobs = {job["metadata"]["name"]: job for job in world.jobs()}
        pods = Counter(pod["metadata"]["labels"]["trireme.dev/job"] for pod in world.pods())
        if set(jobs) != set(left) or set(pods) - set(left):
            return False
        for name, job in jobs.items():
            desired = job["spec"]["replicas"]["desired"]
            if pods[name] != (0 if name in still else desired):
                return False
            if job.get("status", {}).get("phase") != ("Suspended" if name in still else "Starting"):
                return False
        return True

    eventually(settled, "every job where it should be, no pod of a deleted one", 180, pause=1.0)
    print(f"{JOBS} jobs, {len(deeds)} changes, {killed} kills: settled after {time.monotonic() - began:.1f} s")
    assert_no_duplicates(world)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(world.delete, left))
    eventually(lambda: not world.jobs(), "no job is held by a finalizer", 60)
    eventually(lambda: not world.pods(), "no orphan", 180, pause=1.0)
    assert operator.get("/healthz") == "ok"
    p99, looks = (
        operator.quantile("trireme_reconcile_seconds", 0.99),
        operator.metric("trireme_reconcile_seconds_count"),
    )
    looks = operator.metric("trireme_reconcile_seconds_count")
    print(f"since the last kill: reconcile p99 at most {p99} s, {looks:.0f} looks")
    print(f"all gone after {time.monotonic() - began:.1f} s")


def assert_no_duplicates(world: World) -> None:
    """At no moment two live pods for one slot of one job."""
    live = Counter(
        (pod["metadata"]["labels"]["trireme.dev/job-uid"], pod["metadata"]["labels"]["trireme.dev/slot"])
        for pod in world.pods()
        if not pod["metadata"].get("deletionTimestamp")
    )
    assert not [place for place, count in live.items() if count > 1]

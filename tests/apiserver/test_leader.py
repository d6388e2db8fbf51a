"""Two replicas: one leads, the other waits hot; the lease goes over when the leader dies or leaves."""

from __future__ import annotations

import time
from collections.abc import Callable

from rig import MERGE, KubeletStandIn, OperatorProcess, World, eventually, script_job
from trireme_operator.options import DEFAULT_NAMESPACE

Operators = Callable[..., OperatorProcess]
Kubelets = Callable[..., KubeletStandIn]


def leads(operator: OperatorProcess) -> bool:
    return operator.metric("trireme_leader") == 1


def test_failover_after_a_kill_and_after_a_goodbye(world: World, operators: Operators, kubelet: Kubelets) -> None:
    flags = ("--lease-seconds", "6")
    first, second = operators("first", *flags), operators("second", *flags)
    kubelet()
    eventually(lambda: leads(first) or leads(second), "someone leads")
    old, new = (first, second) if leads(first) else (second, first)
    time.sleep(2)
    assert leads(old)
    assert not leads(new)
    assert new.get("/readyz") == "ok"
    world.create("one", script_job(1))
    eventually(lambda: world.pods("one"), "the leader works")

    old.kill()
    killed = time.monotonic()
    eventually(lambda: leads(new), "the standby takes over", 20)
    took = time.monotonic() - killed
    assert took > 2, "the lease was taken while it could still be valid"
    world.create("two", script_job(1))
    eventually(lambda: world.pods("two"), "the new leader works")
    assert {pod["metadata"]["name"] for pod in world.pods("one")} == {"one-0-1"}

    old.start()
    time.sleep(1)
    assert not leads(old)
    began = time.monotonic()
    assert new.stop() == 0
    eventually(lambda: leads(old), "a leader that says goodbye is followed at once", 20)
    handed = time.monotonic() - began
    print(f"failover after SIGKILL {took:.1f} s (lease 6 s), after SIGTERM {handed:.1f} s")
    assert handed < 5
    world.create("three", script_job(1))
    eventually(lambda: world.pods("three"), "and works")


def test_a_leader_that_lost_its_lease_starts_anew_in_the_same_process(
    world: World, operators: Operators, kubelet: Kubelets
) -> None:
    """As after minutes without the API server. Were it to end, the kubelet would let it wait longer each time."""
    operator = operators("robbed", "--lease-seconds", "4")
    kubelet()
    eventually(lambda: leads(operator), "it leads")
    assert operator.process is not None
    path = f"/apis/coordination.k8s.io/v1/namespaces/{DEFAULT_NAMESPACE}/leases/lease-{world.namespace}"
    lease = world.api.request("GET", path)
    thief = {"holderIdentity": "thief", "leaseDurationSeconds": 4, "renewTime": lease["spec"]["renewTime"]}
    world.api.request("PATCH", path, {"spec": thief}, content=MERGE)
    eventually(lambda: "starting anew" in operator.log.read_text(), "it notices", 20)
    eventually(lambda: leads(operator), "it leads again when the other is gone", 30)
    assert operator.process.poll() is None
    world.create("after", script_job(1))
    eventually(lambda: world.pods("after"), "it works")


def test_a_standby_writes_nothing(world: World, operators: Operators) -> None:
    operators("leader")
    standby = operators("standby")
    world.create("one", script_job(1))
    eventually(lambda: world.pods("one"), "the leader works")
    written = [
        line
        for line in standby.get("/metrics").splitlines()
        if line.startswith("trireme_api_requests_total")
        and any(f'verb="{verb}"' in line for verb in ("create", "patch", "update", "delete"))
    ]
    assert written == []

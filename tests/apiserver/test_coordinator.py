"""The coordinator with real tokens: only a pod's own, for our audience, opens the door; the barrier agents see."""

from __future__ import annotations

import http.client
import json
import ssl
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from rig import KubeletStandIn, OperatorProcess, World, eventually, pod_token, script_job
from trireme_api.protocol import AgentState, Assignment, Report

Operators = Callable[..., OperatorProcess]
Kubelets = Callable[..., KubeletStandIn]
Json = dict[str, Any]


class Line:
    """What an agent does to speak with the coordinator, with everything open to forgery."""

    def __init__(self, operator: OperatorProcess, world: World, pod: Json, token: str | None) -> None:
        self.port, self.world, self.pod, self.token = operator.ports[0], world, pod, token
        environment = {item["name"]: item.get("value", "") for item in pod["spec"]["containers"][0]["env"]}
        self.context = ssl.create_default_context(cadata=environment["TRIREME_COORDINATOR_CA"])

    def post(self, body: Any, *, wait: float = 0, job: str | None = None, pod: str | None = None) -> tuple[int, Json]:
        labels, name = self.pod["metadata"]["labels"], pod or self.pod["metadata"]["name"]
        path = (
            f"/v1/namespaces/{self.world.namespace}/trainingjobs/{job or labels['trireme.dev/job']}/pods/{name}/report"
        )
        connection = http.client.HTTPSConnection("127.0.0.1", self.port, timeout=wait + 10, context=self.context)
        headers = {"Content-Type": "application/json"}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        text = body if isinstance(body, str) else json.dumps(body)
        connection.request("POST", f"{path}?wait={wait}", text, headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())

    def report(self, state: AgentState, attempt: int, *, wait: float = 0, holding: str | None = None) -> Assignment:
        report = Report(self.pod["metadata"]["uid"], attempt, state, holding=holding)
        status, answer = self.post(report.to_json(), wait=wait)
        assert status == 200, answer
        return Assignment.from_json(answer)


@pytest.fixture
def gang(world: World, operators: Operators, kubelet: Kubelets) -> tuple[OperatorProcess, list[Json]]:
    operator = operators()
    kubelet()
    world.create("g", script_job(2))
    pods = eventually(
        lambda: [p for p in world.pods("g") if p["status"].get("podIP")] if len(world.pods("g")) == 2 else None,
        "two pods",
    )
    eventually(lambda: len([p for p in world.pods("g") if p["status"].get("podIP")]) == 2, "both with an address")
    eventually(lambda: all(s.get("podUid") for s in world.status("g").get("slots", [])), "both recorded")
    pods = sorted(world.pods("g"), key=lambda p: p["metadata"]["name"])
    return operator, pods


def body_of(pod: Json) -> Json:
    return Report(pod["metadata"]["uid"], 0, AgentState.WAITING).to_json()


def test_only_the_pods_own_token_opens_the_door(world: World, gang: tuple[OperatorProcess, list[Json]]) -> None:
    operator, (one, two) = gang
    good = Line(operator, world, one, pod_token(world, one))
    assert good.post(body_of(one))[0] == 200
    for what, token, pod, expected in (
        ("no token", None, one, 401),
        ("not a token", "abc", one, 401),
        ("wrong audience", pod_token(world, one, "somebody-else"), one, 401),
        ("another pod's token", pod_token(world, two), one, 403),
    ):
        status, answer = Line(operator, world, pod, token).post(body_of(pod))
        assert status == expected, (what, status, answer)
        assert "error" in answer
    # Its own token, but a body that claims another pod's UID, and a path that names another job.
    assert good.post(body_of(two))[0] == 403
    assert good.post(body_of(one), job="other")[0] == 404


def test_reports_that_are_too_large_or_no_reports(world: World, gang: tuple[OperatorProcess, list[Json]]) -> None:
    operator, (one, _) = gang
    line = Line(operator, world, one, pod_token(world, one))
    assert line.post("{" + " " * 300_000 + "}")[0] == 413
    assert line.post("[]")[0] == 400
    assert line.post("not json")[0] == 400
    status, answer = line.post({**body_of(one), "state": "dancing"})
    assert status == 400
    assert "Report.state" in answer["error"]
    assert operator.get("/healthz") == "ok"


def test_a_token_dies_with_its_pod(world: World, gang: tuple[OperatorProcess, list[Json]]) -> None:
    operator, (one, _) = gang
    token = pod_token(world, one)
    path = f"/api/v1/namespaces/{world.namespace}/pods/{one['metadata']['name']}"
    world.api.request("DELETE", path, {"gracePeriodSeconds": 0})
    eventually(lambda: world.status("g")["attempt"] == 2, "the pod is replaced")
    assert Line(operator, world, one, token).post(body_of(one))[0] in (401, 404)


def test_the_barrier(world: World, gang: tuple[OperatorProcess, list[Json]]) -> None:
    operator, (one, two) = gang
    lines = [Line(operator, world, pod, pod_token(world, pod)) for pod in (one, two)]
    first = lines[0].report(AgentState.WAITING, 0)
    assert (first.action.value, first.attempt, first.node_rank, first.world_size) == ("hold", 1, 0, 2)
    held = lines[0].report(AgentState.WAITING, 1, holding=first.tag)
    assert held.action.value == "hold"
    # A long poll answers when the barrier lifts, not before and not late.
    answers: list[tuple[Assignment, float]] = []

    def wait() -> None:
        answers.append((lines[0].report(AgentState.WAITING, 1, wait=20, holding=held.tag), time.monotonic()))

    poller = threading.Thread(target=wait)
    poller.start()
    time.sleep(0.5)
    assert not answers
    second = lines[1].report(AgentState.WAITING, 0)
    lifted = time.monotonic()
    assert lines[1].report(AgentState.WAITING, 1, holding=second.tag, wait=5).action.value == "run"
    poller.join(10)
    told, at = answers[0]
    assert told.action.value == "run"
    assert told.master_port == 29401
    assert at - lifted < 2.0
    # Nobody is held up after an operator that knows nothing of it all has started.
    for line in lines:
        line.report(AgentState.RUNNING, 1)
    world.wait_phase("g", "Running")
    operator.kill()
    operator.start()
    eventually(lambda: operator.metric("trireme_leader") == 1, "it leads again", 30)
    again = lines[0].report(AgentState.RUNNING, 1)
    assert (again.action.value, again.attempt) == ("run", 1)
    assert again.tag == told.tag

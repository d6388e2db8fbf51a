"""carbonPolicy against a real API server, with real agents: a job is held, released, paused and goes on by what a
provider answers over HTTP, and stops at its budget. The provider is this test, with recorded answers."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from rig import KubeletStandIn, OperatorProcess, World, eventually, script_job
from test_elastic import RANK, lines

Operators = Callable[..., OperatorProcess]
Kubelets = Callable[..., KubeletStandIn]
# An answer of Electricity Maps as it documents them; zone, figure and time are put in.
RECORDED = {
    "updatedAt": "2026-11-29T12:06:14.002Z", "createdAt": "2026-11-26T12:08:00.000Z", "emissionFactorType": "lifecycle",
    "isEstimated": True, "estimationMethod": "TIME_SLICER_AVERAGE", "temporalGranularity": "hourly",
}  # fmt: skip
TOMORROW = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 86_400))


class Provider:
    """Answers every zone with `grams`."""

    def __init__(self) -> None:
        self.grams = 0.0
        self.asked: list[tuple[str, str]] = []
        """(zone, token)"""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                (zone,) = parse_qs(urlsplit(self.path).query)["zone"]
                outer.asked.append((zone, self.headers["auth-token"]))
                at = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
                body = json.dumps({"zone": zone, "carbonIntensity": outer.grams, "datetime": at, **RECORDED}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def provider() -> Iterator[Provider]:
    found = Provider()
    yield found
    found.close()


def settings(folder: Path, provider: Provider) -> tuple[str, ...]:
    """The operator's flags."""
    (folder / "carbon.yaml").write_text(
        yaml.safe_dump({"provider": "electricity-maps", "url": provider.url, "refreshSeconds": 30})
    )
    (folder / "token").write_text("secret")
    return "--carbon-settings", str(folder / "carbon.yaml"), "--carbon-secrets", str(folder)


def job(shared: Path, **policy: Any) -> dict[str, Any]:
    """Ranks that agree on a step and save when they are asked to stop."""
    shared.mkdir(exist_ok=True)
    spec = script_job(2, RANK.format(shared=str(shared)), checkpoint={"uri": "s3://nobody/asks"}, carbonPolicy=policy)
    spec["template"]["terminationGracePeriodSeconds"] = 20
    return spec


def test_a_dirty_grid_holds_a_job_and_pauses_it_and_a_clean_one_lets_it_go_on(
    world: World, operators: Operators, kubelet: Kubelets, provider: Provider, tmp_path: Path
) -> None:
    provider.grams = 300
    operators("operator", *settings(tmp_path, provider))
    kubelet(run=True)
    zones = iter(("FR", "PL", "AT", "CH"))

    def the_grid_has(grams: float) -> None:
        """The provider is asked again every 30 s, and at once when a job in a new zone comes: so one comes."""
        provider.grams = grams
        zone = next(zones)
        other = script_job(1, carbonPolicy={"zone": zone}, runPolicy={"suspend": True})
        world.create(f"in-{zone.lower()}", other)

    shared = tmp_path / "shared"
    policy = {"zone": "DE", "startBelow": 100, "pauseAbove": 200, "minimumRunSeconds": 0, "deadline": TOMORROW}
    world.create("green", job(shared, **policy))
    held = eventually(lambda: world.status("green").get("reason") == "DirtyGrid" and world.status("green"), "held", 40)
    assert held["phase"] == "Pending"
    assert "300 g/kWh (Electricity Maps, DE" in held["explanation"], "the table's 381 was never gone by"
    assert provider.asked[0] == ("DE", "secret")
    the_grid_has(150)
    eventually(lambda: "150 g/kWh" in world.status("green")["explanation"], "the newer figure", 40)
    assert not world.pods("green"), "above startBelow nothing starts"
    assert world.phase("green") == "Pending"

    the_grid_has(90)
    world.wait_phase("green", "Running", seconds=60)
    eventually(lambda: (shared / "step").exists(), "a checkpoint", 30)

    the_grid_has(250)
    status = world.wait_phase("green", "Suspended", seconds=60)
    assert status["carbonHold"] | {"since": "", "runsSince": ""} == {
        "reason": "DirtyGrid", "pauses": 1, "since": "", "runsSince": "",
    }  # fmt: skip
    eventually(lambda: not world.pods("green"), "its pods are gone", 30)
    ended = next(item["ends"] for item in lines(shared) if "ends" in item)
    assert world.status("green")["lastCheckpoint"]["step"] == ended

    the_grid_has(80)
    status = world.wait_phase("green", "Running", seconds=60)
    assert (status["attempt"], status["restartCount"]) == (2, 0), "a pause is no failure"
    begun = eventually(lambda: [i["begins"] for i in lines(shared) if i["attempt"] == 2 and "begins" in i], "attempt 2")
    assert begun == [ended], "it goes on at the very step it saved"
    ledger = status["goodput"]["seconds"]
    assert ledger["queued"] > 0
    assert ledger["suspended"] > 0
    told = {event["reason"] for event in world.events("green")}
    assert {"DirtyGrid", "CarbonHoldEnded"} <= told


def test_a_spent_budget_suspends_a_job_until_it_is_raised(
    world: World, operators: Operators, kubelet: Kubelets, tmp_path: Path
) -> None:
    operators()
    kubelet(run=True)
    shared = tmp_path / "shared"
    # Watts that no processor has, so that a fraction of a gram is spent within seconds.
    policy = {"gramsPerKilowattHour": 1000, "cpuWattsPerCore": 20_000, "budgetGrams": 0.5, "onBudget": "suspend"}
    world.create("thrifty", job(shared, **policy))
    world.wait_phase("thrifty", "Running", seconds=60)
    status = world.wait_phase("thrifty", "Suspended", seconds=90)
    assert status["carbonHold"]["reason"] == "CarbonBudgetSpent"
    assert status["carbon"]["totalGrams"] > 0.5
    assert world.condition("thrifty", "OverCarbonBudget")["status"] == "True"
    ended = [item["ends"] for item in lines(shared) if "ends" in item]
    assert ended == [status["lastCheckpoint"]["step"]]
    eventually(lambda: not world.pods("thrifty"), "its pods are gone", 30)
    spent = status["energy"]["joules"]
    time.sleep(3)
    assert world.phase("thrifty") == "Suspended"

    world.patch("thrifty", {"carbonPolicy": {"budgetGrams": 5_000}})
    status = world.wait_phase("thrifty", "Running", seconds=60)
    assert (status["attempt"], status["restartCount"]) == (2, 0)
    assert world.condition("thrifty", "OverCarbonBudget")["status"] == "False"
    begun = eventually(lambda: [i["begins"] for i in lines(shared) if i["attempt"] == 2 and "begins" in i], "attempt 2")
    assert begun == ended
    more = lambda: world.status("thrifty")["energy"]["joules"] > spent  # noqa: E731
    eventually(more, "what it used before still counts", 30)

"""carbonPolicy on the real cluster: a job is held, starts, pauses, goes on exactly, as the grid's figure is edited."""

from __future__ import annotations

import json
import time
from typing import Any

from e2e_support import Jobs
from test_training import beyond, same_losses, succeed

from demo.kube import Kube, wait_until
from demo.training import started


def test_a_dirty_grid_holds_and_pauses_a_job_and_its_losses_are_the_same(
    job: dict[str, Any], jobs: Jobs, kube: Kube, baseline: dict[int, float]
) -> None:
    tomorrow = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 86_400))
    job["spec"]["carbonPolicy"] = {
        "gramsPerKilowattHour": 300, "startBelow": 100, "pauseAbove": 200, "minimumRunSeconds": 0, "deadline": tomorrow,
    }  # fmt: skip

    def the_grid_has(grams: float) -> None:
        patch = json.dumps({"spec": {"carbonPolicy": {"gramsPerKilowattHour": grams}}})
        kube.out("patch", "trainingjob", run.name, "--type=merge", "-p", patch)

    run = jobs.run(job, "green")
    run.wait_for("being held", lambda: run.status().get("reason") == "DirtyGrid", 60)
    assert not kube.items("pods", "trireme.dev/job=green")
    the_grid_has(50)
    started(run)
    beyond(run, 12)
    the_grid_has(250)
    run.wait_for("the pause", lambda: run.status()["phase"] == "Suspended", 120)
    wait_until("pods leave", lambda: not kube.items("pods", "trireme.dev/job=green"), 90)
    stopped_at = run.curve().last_step()
    assert stopped_at < len(baseline), "the job was over before it paused"
    assert run.status()["lastCheckpoint"]["step"] == stopped_at
    assert run.status()["carbonHold"]["pauses"] == 1
    the_grid_has(80)
    finished = succeed(run)["status"]
    assert (finished["attempt"], finished["restartCount"]) == (2, 0)
    assert not run.curve().repeated()
    same_losses(run.curve(), baseline)
    priced = [row["grams"] for row in finished["energy"]["attempts"]]
    assert len(priced) == 2
    assert all(grams > 0 for grams in priced)

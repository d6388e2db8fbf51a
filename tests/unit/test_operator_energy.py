"""Energy by attempt, each joule once; carbon of it, operational and embodied; and what is not known."""

from __future__ import annotations

import pytest
from operator_cases import Scene, heard
from trireme_api import carbon
from trireme_api.job import TrainingJobStatus
from trireme_api.protocol import AgentState, EnergyReading, Hardware, Progress, RankReport
from trireme_operator.decide.energy import KEPT_ATTEMPTS, weakest
from trireme_operator.decide.views import Node

KWH = carbon.JOULES_PER_KILOWATT_HOUR
H100 = "NVIDIA H100 80GB HBM3"


def energy(joules: float | None, source: str = "declared") -> dict[str, EnergyReading]:
    return {"cpu": EnergyReading(joules, source)}


def test_energy_of_a_pod_is_counted_once_whatever_comes_twice() -> None:
    scene = Scene(carbonPolicy={"zone": "SE", "pue": 1.5}).run()
    for joules in (1000.0, 1000.0, 2500.0, 2400.0, 2500.0):
        scene.now += 10
        scene.heard["pod-0-1"] = heard("pod-0-1", 1, AgentState.RUNNING, scene.now, energy=energy(joules))
        scene.heard["pod-1-1"] = heard("pod-1-1", 1, AgentState.RUNNING, scene.now, energy=energy(KWH, "rapl"))
        before = scene.status.energy.joules
        scene.settle()
        assert scene.status.energy.joules >= before, "an older report that comes late takes nothing back"
    assert scene.status.energy.joules == pytest.approx(2500 + KWH)
    assert scene.status.energy.source == "declared"
    assert scene.status.carbon.grams == pytest.approx((2500 + KWH) / KWH * 1.5 * 40.7, rel=1e-4)
    assert scene.status.carbon.summary == "61.1g"
    # A view that misses a pod once must not make it count again.
    lost = scene.pods.pop("pod-1-1")
    reports = dict(scene.heard)
    scene.decide()
    scene.pods[lost.uid], scene.heard = lost, reports
    scene.now += 10
    scene.settle()
    assert scene.status.energy.joules == pytest.approx(2500 + KWH)


def test_missing_is_not_zero() -> None:
    scene = Scene(carbonPolicy={"zone": "SE"}).run()
    scene.hear_all(AgentState.RUNNING, energy=energy(None, "missing"))
    scene.settle()
    assert scene.status.energy.source == "missing"
    assert scene.status.carbon.grams is None


@pytest.mark.parametrize(
    ("sources", "worst"), [(["nvml", "rapl"], "rapl"), (["nvml"], "nvml"), (["declared", "nvml-power"], "declared")]
)
def test_a_sum_is_as_good_as_its_weakest_part(sources: list[str], worst: str) -> None:
    assert weakest(sources) == worst


def tell(scene: Scene, uid: str, state: AgentState, attempt: int | None = None, **fields: object) -> None:
    scene.now += 10
    held = scene.status.attempt if attempt is None else attempt
    scene.heard[uid] = heard(uid, held, state, scene.now, ranks=[RankReport(0)], **fields)
    scene.settle()


def test_every_attempt_keeps_its_own_row_failed_and_idle_ones_too() -> None:
    scene = Scene(carbonPolicy={"zone": "SE", "pue": 1.0}).run()
    tell(scene, "pod-0-1", AgentState.RUNNING, energy=energy(1000.0))
    tell(scene, "pod-1-1", AgentState.RUNNING, energy=energy(500.0))
    scene.change_pod("pod-1-1", phase="Failed")
    scene.settle()
    assert scene.status.attempt == 2, scene.status.explanation
    tell(scene, "pod-0-1", AgentState.WAITING, energy=energy(1200.0))
    tell(scene, "pod-0-1", AgentState.RUNNING, energy=energy(1700.0))
    first, second = scene.status.energy.attempts
    assert (first.attempt, first.joules, first.idle_joules) == (1, {"cpu": 1500.0}, 0.0)
    assert (second.attempt, second.joules, second.idle_joules) == (2, {"cpu": 700.0}, 200.0)
    assert scene.status.energy.joules == 2200.0
    assert scene.status.energy.idle_joules == 200.0
    # The zombie goes on burning: its own attempt's.
    tell(scene, "pod-1-1", AgentState.RUNNING, attempt=1, energy=energy(600.0))
    assert scene.status.energy.attempts[0].joules == {"cpu": 1600.0}
    assert scene.status.carbon.grams == pytest.approx(2300 / KWH * 40.7, rel=1e-3)


def test_nothing_is_counted_twice_after_the_operator_starts_anew() -> None:
    scene = Scene(carbonPolicy={"zone": "SE"}).run()
    hardware = Hardware(100.0, 8, H100)
    tell(scene, "pod-0-1", AgentState.RUNNING, energy=energy(1000.0), hardware=hardware)
    before = scene.status.energy
    scene.heard.clear()
    scene.settle()
    tell(scene, "pod-0-1", AgentState.RUNNING, energy=energy(1000.0), hardware=hardware)
    assert scene.status.energy == before


def test_what_is_burnt_after_the_end_is_counted_too() -> None:
    scene = Scene(carbonPolicy={"zone": "SE"}).run()
    tell(scene, "pod-0-1", AgentState.RUNNING, energy=energy(1000.0))
    for uid in ("pod-0-1", "pod-1-1"):
        scene.heard[uid] = heard(uid, 1, AgentState.EXITED, scene.now, ranks=[RankReport(0, exit=0)])
        scene.change_pod(uid, phase="Succeeded")
    scene.settle()
    assert scene.status.phase == "Succeeded"
    tell(scene, "pod-0-1", AgentState.EXITED, energy=energy(1100.0))
    assert scene.status.energy.joules == 1100.0


@pytest.mark.parametrize("nonsense", [float("nan"), float("inf"), -5.0, 1e30])
def test_a_counter_that_cannot_be_is_missing(nonsense: float) -> None:
    scene = Scene(carbonPolicy={"zone": "SE"}).run()
    tell(scene, "pod-0-1", AgentState.RUNNING, energy=energy(1000.0), hardware=Hardware(nonsense, -3))
    tell(scene, "pod-0-1", AgentState.RUNNING, energy=energy(nonsense), hardware=Hardware(20.0))
    assert scene.status.energy.joules == 1000.0
    assert scene.status.energy.missing == ["cpu"]
    assert (scene.status.carbon.summary or "").startswith("≥")


def test_a_sum_without_the_gpu_says_that_it_is_no_whole() -> None:
    scene = Scene(carbonPolicy={"zone": "SE"}).run()
    told = {"cpu": EnergyReading(1000.0, "rapl"), "gpu": EnergyReading(None, "missing")}
    tell(scene, "pod-0-1", AgentState.RUNNING, energy=told)
    assert (scene.status.energy.source, scene.status.energy.missing) == ("rapl", ["gpu"])
    assert scene.status.energy.attempts[0].sources == {"cpu": "rapl", "gpu": "missing"}
    assert (scene.status.carbon.summary or "").startswith("≥")


def test_a_grid_that_becomes_known_later_prices_what_was_used_before() -> None:
    scene = Scene().run()
    tell(scene, "pod-0-1", AgentState.RUNNING, energy=energy(KWH))
    assert scene.status.carbon.grams is None
    scene.edit(carbonPolicy={"gramsPerKilowattHour": 100, "pue": 1.0})
    scene.settle()
    assert scene.status.carbon.grams == 100
    # What has been used keeps the price of its time.
    scene.edit(carbonPolicy={"gramsPerKilowattHour": 400, "pue": 1.0})
    tell(scene, "pod-0-1", AgentState.RUNNING, energy=energy(2 * KWH))
    assert scene.status.carbon.grams == 500


def test_the_hardwares_share_in_both_modes() -> None:
    scene = Scene(carbonPolicy={"zone": "SE", "pue": 1.0, "embodied": {"mode": "busy"}}).run()
    scene.nodes = {"n0": Node("n0", True, allocatable={"cpu": 2.0}), "n1": Node("n1", True, allocatable={"cpu": 2.0})}
    hours = 1000 * 3600.0
    tell(scene, "pod-0-1", AgentState.RUNNING, energy=energy(KWH), hardware=Hardware(hours, 8, H100),
         progress=Progress(5, tokens=2_000_000))  # fmt: skip
    row = scene.status.energy.attempts[0]
    assert (row.gpu_seconds, row.host_seconds, row.pod_seconds) == ({H100: 8 * hours}, {"gpu": hours / 2}, hours)
    found = scene.status.carbon
    calendar, busy = found.embodied_by_mode["calendar"], found.embodied_by_mode["busy"]
    made = carbon.gpu(H100).embodied_kilograms.mid * 8 + carbon.host(8).embodied_kilograms.mid / 2
    assert calendar.mid == pytest.approx(made * 1000 * 1000 / (4 * 8760), rel=1e-6)
    assert busy.high == pytest.approx(calendar.high / 0.45, rel=1e-6)
    assert calendar.low < calendar.mid < calendar.high
    assert found.embodied == busy
    assert found.grams == pytest.approx(40.7)
    assert found.total_grams == pytest.approx(40.7 + busy.mid)
    assert found.grams_per_million_tokens == pytest.approx((40.7 + calendar.mid) / 2), "SCI is by calendar"


def test_own_figures_go_before_the_table() -> None:
    policy = {"zone": "SE", "embodied": {"gpuKilograms": 200, "hostKilograms": 0, "lifeYears": 5}}
    scene = Scene(carbonPolicy=policy).run()
    tell(scene, "pod-0-1", AgentState.RUNNING, energy=energy(1.0), hardware=Hardware(3600.0, 2, None))
    found = scene.status.carbon.embodied
    assert found is not None
    assert found.low == found.high == pytest.approx(2 * 200_000 / (5 * 8760), rel=1e-4)


def test_rows_of_old_attempts_are_put_together_and_nothing_is_lost() -> None:
    scene = Scene(carbonPolicy={"zone": "SE"}, failurePolicy={"stopWhen": {"sameCauseWithoutProgress": 999}}).run()
    burnt = 0.0
    for _ in range(KEPT_ATTEMPTS + 5):
        attempt = scene.status.attempt
        uid = f"pod-0-{scene.status.slots[0].incarnation}"
        burnt += 100.0
        tell(scene, uid, AgentState.RUNNING, energy=energy(burnt), hardware=Hardware(burnt / 10))
        status = TrainingJobStatus.model_validate(scene.obj["status"])
        status.attempt = attempt + 1
        scene.obj["status"]["attempt"] = attempt + 1
    found = scene.status.energy
    assert found.older is not None
    assert len(found.attempts) == KEPT_ATTEMPTS
    assert found.joules == burnt
    assert sum(row.joules["cpu"] for row in (found.older, *found.attempts)) == burnt
    assert sum(row.pod_seconds for row in (found.older, *found.attempts)) == pytest.approx(burnt / 10)
    assert scene.status.carbon.grams == pytest.approx(burnt / KWH * 1.1 * 40.7, rel=1e-3)

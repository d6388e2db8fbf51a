from __future__ import annotations

import pytest
from localcluster.decide import Facts, decide, expected_processes
from localcluster.plan import CANDIDATES, Plan
from localcluster.state import Process, State

PLAN = Plan.within("t", CANDIDATES[0])
NODES = [1, 2]
NAMES = expected_processes(NODES)
SPACES = {"t-control", "t-node1", "t-node2"}


def record(names: list[str] = NAMES) -> State:
    processes = {name: Process(pid=index + 2, started=1, argv=[name], log="") for index, name in enumerate(names)}
    return State(plan=PLAN, boot_id="boot", nodes=NODES, processes=processes)


def test_clean_ground_is_built_on() -> None:
    assert decide(Facts(state=None, boot_id="boot")).action == "create"


@pytest.mark.parametrize("facts", [{"strays": 1}, {"namespaces": {"t-node1"}}])
def test_remains_without_a_record_are_removed_first(facts: dict[str, object]) -> None:
    assert decide(Facts(state=None, boot_id="boot", **facts)).action == "rebuild"  # type: ignore[arg-type]


def test_a_whole_cluster_is_kept() -> None:
    decision = decide(Facts(state=record(), boot_id="boot", alive=set(NAMES), namespaces=SPACES))
    assert (decision.action, decision.missing) == ("keep", [])


@pytest.mark.parametrize("dead", NAMES)
def test_one_dead_process_is_started_again_and_nothing_else(dead: str) -> None:
    decision = decide(Facts(state=record(), boot_id="boot", alive=set(NAMES) - {dead}, namespaces=SPACES))
    assert (decision.action, decision.missing) == ("repair", [dead])


def test_a_switched_off_node_is_started_again() -> None:
    node2 = {name for name in NAMES if name.endswith("-2")}
    decision = decide(Facts(state=record(), boot_id="boot", alive=set(NAMES) - node2, namespaces=SPACES))
    assert decision.action == "repair"
    assert set(decision.missing) == node2


@pytest.mark.parametrize(
    ("facts", "word"),
    [
        (Facts(state=record(), boot_id="boot", alive=set(), namespaces=SPACES), "killed"),
        (Facts(state=record(), boot_id="later", alive=set(NAMES), namespaces=SPACES), "rebooted"),
        (Facts(state=record(), boot_id="boot", alive=set(NAMES), namespaces={"t-control"}), "t-node1, t-node2"),
        (Facts(state=record(NAMES[:4]), boot_id="boot", alive=set(NAMES[:4]), namespaces=SPACES), "did not finish"),
        # Ids of a foreign process that runs prove nothing: only expected names count.
        (Facts(state=record(), boot_id="boot", alive={"something-else"}, namespaces=SPACES), "killed"),
    ],
)
def test_ground_that_is_gone_is_rebuilt_and_says_why(facts: Facts, word: str) -> None:
    decision = decide(facts)
    assert decision.action == "rebuild"
    assert word in decision.reason


def test_processes_are_expected_in_starting_order() -> None:
    assert NAMES.index("etcd") < NAMES.index("kube-apiserver") < NAMES.index("kube-scheduler")
    assert NAMES.index("namespaces-1") < NAMES.index("containerd-1") < NAMES.index("kubelet-1")

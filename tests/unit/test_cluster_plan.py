from __future__ import annotations

import ipaddress
import itertools

import pytest
from localcluster.plan import CANDIDATES, MAX_NODES, Plan, check_name, check_nodes, choose, overlaps
from localcluster.report import ClusterError


def test_ranges_of_a_plan_never_overlap_each_other_nor_leave_their_block() -> None:
    for block in CANDIDATES:
        plan = Plan.within("t", block)
        ranges = [ipaddress.ip_network(text) for text in (plan.nodes, plan.pods, plan.services)]
        assert all(one.subnet_of(ipaddress.ip_network(block)) for one in ranges)
        assert not any(one.overlaps(other) for one, other in itertools.combinations(ranges, 2))


def test_candidates_are_private_and_disjoint() -> None:
    networks = [ipaddress.ip_network(block) for block in CANDIDATES]
    # 100.64.0.0/10 is shared address space: not routed on the internet, but `is_private` denies it.
    shared = ipaddress.ip_network("100.64.0.0/10")
    assert all(network.is_private or network.subnet_of(shared) for network in networks)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(networks, 2))


def test_every_node_has_its_own_address_and_pod_subnet_inside_the_ranges() -> None:
    plan = Plan.within("t", CANDIDATES[0])
    numbers = range(1, MAX_NODES + 1)
    addresses = [plan.control_address, *(plan.node_address(number) for number in numbers)]
    assert len(set(addresses)) == len(addresses)
    assert all(ipaddress.ip_address(address) in ipaddress.ip_network(plan.nodes) for address in addresses)
    subnets = [ipaddress.ip_network(plan.pod_subnet(number)) for number in numbers]
    assert all(subnet.subnet_of(ipaddress.ip_network(plan.pods)) for subnet in subnets)
    assert len(set(subnets)) == len(subnets)
    assert ipaddress.ip_address(plan.kubernetes_service) == ipaddress.ip_network(plan.services)[1]


@pytest.mark.parametrize(
    ("taken", "expected"),
    [
        ([], CANDIDATES[0]),
        (["192.168.1.5/24", "172.17.0.0/16"], CANDIDATES[0]),
        (["0.0.0.0/0"], CANDIDATES[0]),
        (["10.209.3.4/32"], CANDIDATES[1]),
        (["10.0.0.0/8"], "172.24.0.0/14"),
        (["10.0.0.0/8", "172.16.0.0/12"], "100.84.0.0/14"),
        (["10.208.0.7"], CANDIDATES[1]),
        (["fd00::/8"], CANDIDATES[0]),
    ],
)
def test_the_first_block_clear_of_the_machine_is_chosen(taken: list[str], expected: str) -> None:
    assert choose("t", taken) == Plan.within("t", expected)


def test_no_free_block_is_one_line_that_names_the_blocks() -> None:
    with pytest.raises(ClusterError) as caught:
        choose("t", ["10.0.0.0/8", "172.16.0.0/12", "100.64.0.0/10"])
    assert "\n" not in str(caught.value)
    assert CANDIDATES[0] in str(caught.value)


def test_overlaps_names_what_is_in_the_way() -> None:
    assert overlaps("10.208.0.0/14", ["10.1.0.0/16", "10.211.0.0/16", "10.210.1.1"]) == ["10.211.0.0/16", "10.210.1.1"]


@pytest.mark.parametrize("name", ["", "a/b", "../x", "-x", "a b", "x" * 25, "ü"])
def test_a_name_that_would_not_do_as_a_file_name_is_refused(name: str) -> None:
    with pytest.raises(ClusterError, match="--name"):
        check_name(name)


def test_node_counts() -> None:
    check_nodes(1)
    check_nodes(MAX_NODES)
    for count in (0, -1, MAX_NODES + 1):
        with pytest.raises(ClusterError, match="--nodes"):
            check_nodes(count)

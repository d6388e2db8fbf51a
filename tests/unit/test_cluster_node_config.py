from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest
from localcluster import control_plane, node_config
from localcluster.binaries import Binaries
from localcluster.control_plane import Timings
from localcluster.plan import CANDIDATES, Plan

PLAN = Plan.within("t", CANDIDATES[0])


@pytest.fixture
def programs(tmp_path: Path) -> Binaries:
    for name in (
        "etcd",
        "kube-apiserver",
        "kube-controller-manager",
        "kube-scheduler",
        "kubelet",
        "kube-proxy",
        "runc",
    ):
        (tmp_path / name).write_text("")
    return Binaries(kubernetes=tmp_path, system=tmp_path)


def kubelet(timings: Timings) -> dict[str, object]:
    return json.loads(node_config.kubelet(PLAN, 1, Path("/pki"), Path("/node1"), timings, 110))


def test_without_flags_the_timings_are_kubernetes_own(programs: Binaries, tmp_path: Path) -> None:
    config = kubelet(Timings())
    assert not {"nodeStatusUpdateFrequency", "nodeStatusReportFrequency", "nodeLeaseDurationSeconds"} & set(config)
    flags = control_plane.controller_manager(programs, tmp_path, (1, 20))
    flags += control_plane.api_server(
        programs, tmp_path, etcd_port=1, port=2, bind="127.0.0.1", services=PLAN.services, advertise=None
    )
    assert not [flag for flag in flags if "grace" in flag or "eviction" in flag or "toleration" in flag]


def test_node_loss_timings_reach_every_clock_that_counts(programs: Binaries, tmp_path: Path) -> None:
    timings = Timings(node_status=1, node_grace=8, eviction=5)
    config = kubelet(timings)
    assert config["nodeStatusUpdateFrequency"] == "1s"
    # A lease is renewed every quarter of its duration, which must be well inside the grace period.
    assert int(str(config["nodeLeaseDurationSeconds"])) / 4 < 8
    flags = control_plane.controller_manager(programs, tmp_path, (1, 20), timings)
    assert "--node-monitor-grace-period=8s" in flags
    assert "--pod-eviction-timeout=5s" in flags
    assert "--pod-eviction-timeout=5s" not in control_plane.controller_manager(programs, tmp_path, (1, 30), timings)
    server = control_plane.api_server(
        programs,
        tmp_path,
        etcd_port=1,
        port=2,
        bind="127.0.0.1",
        services=PLAN.services,
        advertise=None,
        timings=timings,
    )
    assert "--default-unreachable-toleration-seconds=5" in server


def test_two_nodes_share_nothing() -> None:
    one, two = (json.loads(node_config.cni(PLAN, number, 9000))["plugins"][0]["ipam"]["ranges"] for number in (1, 2))
    assert one != two
    assert PLAN.cgroup(1) != PLAN.cgroup(2)
    assert PLAN.node_namespace(1) != PLAN.node_namespace(2)


def test_the_kubelet_never_deletes_imported_images_nor_touches_the_kernel() -> None:
    config = kubelet(Timings())
    assert config["imageGCHighThresholdPercent"] == 100
    script = node_config.mount_script(Path("/node1"), Path("/node1/furnished"))
    for setting in node_config.KERNEL_SETTINGS:
        assert f"/proc/sys/{setting}" in script


def test_flags_that_newer_versions_refuse_are_not_given(programs: Binaries, tmp_path: Path) -> None:
    old = node_config.kubelet_command(programs, PLAN, 1, tmp_path, tmp_path, (1, 20))
    new = node_config.kubelet_command(programs, PLAN, 1, tmp_path, tmp_path, (1, 34))
    assert "--container-runtime=remote" in old
    assert [flag for flag in old if flag not in new] == [flag for flag in old if "docker" in flag or "runtime=" in flag]


def test_only_the_standard_library_is_imported() -> None:
    folder = Path(__file__).resolve().parents[2] / "cluster"
    allowed = {*sys.stdlib_module_names, "localcluster"}
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(), feature_version=(3, 9))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert {name.split(".")[0] for name in names} <= allowed, path

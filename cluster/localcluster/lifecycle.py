"""Bringing the built-in cluster up, breaking and mending parts of it, and taking it down."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Optional

from . import binaries as binary_files
from . import control_plane, credentials, debian, decide, netns, pause, processes, teardown
from .api import Api, wait
from .binaries import Binaries
from .build import require_space
from .machine import check_machine, host_port, require_root
from .node import ROLES, Node
from .paths import ClusterPaths
from .plan import API_PORT, check_name, check_nodes, choose
from .report import ClusterError, say, step
from .state import State, boot_id, locked

FORWARDER = "forwarder"
CONTROL_PROCESSES = (
    control_plane.ETCD,
    control_plane.API_SERVER,
    FORWARDER,
    control_plane.CONTROLLER_MANAGER,
    control_plane.SCHEDULER,
)
NEEDED_BYTES = 3 * 1024**3


class Cluster:
    """The built-in cluster of one name on this machine."""

    def __init__(self, name: str) -> None:
        check_name(name)
        self.paths = ClusterPaths(name)

    # -- up -----------------------------------------------------------------------------------------------------

    def up(self, nodes: int, options: Dict[str, Any], port: int = 0) -> str:
        """Bring up `nodes` nodes; returns what was done: keep, repair, grow, create or rebuild.

        options: node_status, node_grace, eviction (seconds), max_pods; None leaves Kubernetes' default.
        """
        check_nodes(nodes)
        require_root()
        with locked(self.paths):
            state = State.load(self.paths.record)
            found = self.facts(state)
            decision = decide.decide(found)
            if state is not None and decision.action in ("keep", "repair"):
                return self._keep(state, decision, nodes, options)
            check_machine()
            debian.install(debian.NODE_TOOLS)
            programs = binary_files.find(nodes=True)
            if decision.action == "rebuild":
                with step(f"removing what is left of an earlier cluster ({decision.reason})"):
                    teardown.remove_everything(self.paths, state)
            self.paths.state.mkdir(parents=True, exist_ok=True)
            require_space(self.paths.state, NEEDED_BYTES, "a cluster")
            self._create(programs, nodes, options, port)
            return decision.action

    def _keep(self, state: State, decision: decide.Decision, nodes: int, options: Dict[str, Any]) -> str:
        if nodes < len(state.nodes):
            say(f"  note: the cluster has {len(state.nodes)} nodes and keeps them; `down` first for fewer")
        changed = sorted(key for key, value in options.items() if value is not None and state.options.get(key) != value)
        if changed:
            raise ClusterError(
                f"the cluster runs with other values of {', '.join(changed)}: run `cluster.py down` first"
            )
        action = decision.action
        added = [number for number in range(1, nodes + 1) if number not in state.nodes]
        if action == "keep" and not added:
            self._wait_ready(state)
            return action
        programs = binary_files.find(nodes=True)
        if decision.missing:
            say(f"starting again what is not running: {', '.join(decision.missing)}")
        if added:
            self._add_nodes(state, added)
            action = "grow"
        self._start(programs, state)
        return action

    def _create(self, programs: Binaries, nodes: int, options: Dict[str, Any], port: int) -> None:
        plan = choose(self.paths.label, netns.taken_ranges())
        version = programs.version()
        state = State(
            plan=plan,
            boot_id=boot_id(),
            host_port=host_port(port),
            version=f"{version[0]}.{version[1]}",
            nodes=list(range(1, nodes + 1)),
            options={key: value for key, value in options.items() if value is not None},
        )
        state.save(self.paths.record)
        with step("keys, certificates and tokens"):
            control_plane.make_credentials(self.paths.pki, plan, state.nodes)
            self._write_kubeconfig(state)
        with step(f"network: nodes {plan.nodes}, pods {plan.pods}, services {plan.services}"):
            netns.create_control(plan)
            for number in state.nodes:
                netns.create_node(plan, number)
            netns.connect(plan, state.nodes)
        pause.image()
        self._start(programs, state)

    def _add_nodes(self, state: State, added: List[int]) -> None:
        """The API server reads its token file only when it starts, so it is started again."""
        state.nodes = sorted({*state.nodes, *added})
        control_plane.make_credentials(self.paths.pki, state.plan, state.nodes)
        with step(f"network of nodes {', '.join(map(str, added))}"):
            for number in added:
                netns.create_node(state.plan, number)
            netns.connect(state.plan, state.nodes)
        processes.kill(state.processes[control_plane.API_SERVER])
        state.save(self.paths.record)

    def _start(self, programs: Binaries, state: State) -> None:
        """Start every process that does not run and wait until the cluster is ready.

        The nodes start while the API server does: a kubelet waits 5 s for a Docker that is not there before it looks.
        """
        commands = self._control_commands(programs, state)
        for name in (control_plane.ETCD, control_plane.API_SERVER, FORWARDER):
            self._start_control(state, name, commands[name])
        version = programs.version()
        with step(f"containerd, kubelet and kube-proxy on {len(state.nodes)} nodes"):
            for number in state.nodes:
                node = Node(self.paths, state, programs, number)
                node.prepare()
                node.start(version)
        with step("etcd and kube-apiserver"):
            self._wait_api(state)
        for name in (control_plane.CONTROLLER_MANAGER, control_plane.SCHEDULER):
            self._start_control(state, name, commands[name])
        with step("nodes ready"):
            self._assign_pod_subnets(state)
            self._wait_ready(state)

    def _assign_pod_subnets(self, state: State) -> None:
        """A kubelet that sees its node's pod subnet reports ready at once, else only with its next regular report.

        Nodes cannot be made beforehand with it: a kubelet of 1.20 crashes on a node that has no capacity yet. Nor
        may it come within a second of the start, when the kubelet has not looked at its containers and reports that.
        """
        api = Api(self.paths.kubeconfig)
        names = {state.plan.node_name(number): state.plan.pod_subnet(number) for number in state.nodes}
        wait(
            lambda: api.nodes().keys() >= names.keys(),
            "registration of nodes",
            60,
            failed=lambda: first_ended(state, list(state.processes)),
        )
        new = [name for name in names if not api.request("GET", f"/api/v1/nodes/{name}")["spec"].get("podCIDR")]
        if new:
            time.sleep(1.5)
        for name in new:
            spec = {"podCIDR": names[name], "podCIDRs": [names[name]]}
            api.request(
                "PATCH", f"/api/v1/nodes/{name}", {"spec": spec}, content="application/strategic-merge-patch+json"
            )

    def _control_commands(self, programs: Binaries, state: State) -> Dict[str, List[str]]:
        plan, pki = state.plan, self.paths.pki
        version = programs.version()
        timings = control_plane.Timings.from_options(state.options)
        space = netns.FOLDER / plan.control_namespace
        inside = {
            control_plane.ETCD: control_plane.etcd(
                programs, self.paths.state / "etcd", client_port=2379, peer_port=2380
            ),
            control_plane.API_SERVER: control_plane.api_server(
                programs,
                pki,
                etcd_port=2379,
                port=API_PORT,
                bind="0.0.0.0",
                services=plan.services,
                advertise=plan.control_address,
                timings=timings,
            ),
            control_plane.CONTROLLER_MANAGER: control_plane.controller_manager(programs, pki, version, timings),
            control_plane.SCHEDULER: control_plane.scheduler(programs, pki),
        }
        commands = {name: netns.enter(plan.control_namespace, argv) for name, argv in inside.items()}
        program = Path(__file__).with_name("forwarder.py")
        commands[FORWARDER] = [
            sys.executable,
            str(program),
            str(state.host_port),
            str(space),
            plan.control_address,
            str(API_PORT),
        ]
        return commands

    def _start_control(self, state: State, name: str, argv: List[str]) -> None:
        process = state.processes.get(name)
        if process is not None and processes.alive(process):
            return
        state.processes[name] = processes.start(argv, self.paths.logs / f"{name}.log", owner=str(self.paths.state))
        state.save(self.paths.record)

    def _write_kubeconfig(self, state: State) -> None:
        credentials.write_kubeconfig(
            self.paths.kubeconfig,
            server=f"https://127.0.0.1:{state.host_port}",
            authority=self.paths.pki / "ca.crt",
            token=credentials.read_tokens(self.paths.pki)[credentials.ADMIN],
            cluster=self.paths.name,
            user=credentials.ADMIN,
        )

    def _wait_api(self, state: State) -> None:
        if not self.paths.kubeconfig.exists():
            self._write_kubeconfig(state)
        api = Api(self.paths.kubeconfig)
        wait(api.ready, "kube-apiserver", 60, failed=lambda: first_ended(state, CONTROL_PROCESSES))

    def _wait_ready(self, state: State) -> None:
        self._wait_api(state)
        api = Api(self.paths.kubeconfig)
        names = {state.plan.node_name(number) for number in state.nodes}
        wait(
            lambda: {name for name, ready in api.nodes().items() if ready} >= names,
            "nodes",
            90,
            failed=lambda: first_ended(state, list(state.processes)),
        )
        # Pods are refused until the controller manager has made their service account.
        wait(lambda: has_service_account(api), "service account 'default'", 30)

    # -- one process or node ------------------------------------------------------------------------------------

    def node(self, number: int) -> Node:
        state = self.require()
        if number not in state.nodes:
            raise ClusterError(f"no node {number}: there are {', '.join(map(str, state.nodes))}")
        return Node(self.paths, state, binary_files.find(nodes=True), number)

    def start_node(self, number: int) -> None:
        with locked(self.paths):
            node = self.node(number)
            node.prepare()
            node.start(node.binaries.version())
            api = Api(self.paths.kubeconfig)
            wait(lambda: api.nodes().get(node.name, False), node.name, 90)
            node.state.save(self.paths.record)

    def stop_node(self, number: int) -> int:
        with locked(self.paths):
            node = self.node(number)
            count = node.power_off()
            node.state.save(self.paths.record)
            return count

    def stop_process(self, name: str, sig: signal.Signals = signal.SIGKILL) -> bool:
        """Signal one recorded process (kubelet-2, etcd, ...) and wait for its end; True when it ran."""
        with locked(self.paths):
            state = self.require()
            process = state.processes.get(name)
            if process is None:
                raise ClusterError(f"no process {name!r}: there are {', '.join(state.processes)}")
            return processes.kill(process, sig)

    def start_process(self, name: str) -> None:
        """Start one recorded process again, with the command line that it had."""
        with locked(self.paths):
            state = self.require()
            if name in CONTROL_PROCESSES:
                self._start_control(state, name, state.processes[name].argv)
                self._wait_api(state)
                return
            role, _, number = name.rpartition("-")
            if role not in ROLES or not number.isdigit():
                raise ClusterError(f"no process {name!r}: there are {', '.join(state.processes)}")
        self.start_node(int(number))

    def set_link(self, number: int, up: bool) -> None:
        with locked(self.paths):
            netns.set_link(self.node(number).plan, number, up)

    def require(self) -> State:
        state = State.load(self.paths.record)
        if state is None:
            raise ClusterError(f"cluster {self.paths.name!r} is not up: run `python3 cluster/cluster.py up`")
        return state

    # -- facts and down ----------------------------------------------------------------------------------------

    def facts(self, state: Optional[State]) -> decide.Facts:
        running = {name for name, p in state.processes.items() if processes.alive(p)} if state is not None else set()
        known = netns.of_cluster(teardown.label(self.paths, state))
        return decide.Facts(
            state=state,
            boot_id=boot_id(),
            alive=running,
            namespaces={name for name in known if netns.exists(name)},
            strays=teardown.traces(self.paths, state) + int(state is None and self.paths.state.exists()),
        )

    def down(self) -> bool:
        """Leave nothing; True when there was something. Needs root only then."""
        state = State.load(self.paths.record)
        if not self.paths.state.exists() and not teardown.traces(self.paths, state):
            self.paths.kubeconfig.unlink(missing_ok=True)
            return False
        require_root()
        with locked(self.paths):
            teardown.remove_everything(self.paths, State.load(self.paths.record))
            teardown.forget_lock(self.paths)
        return True


def first_ended(state: State, names: Any) -> Optional[str]:
    """One line about the first of these processes that was started and has ended, else None."""
    for name in names:
        process = state.processes.get(name)
        if process is not None and not processes.alive(process):
            return f"{name} ended: see {process.log}"
    return None


def has_service_account(api: Api) -> bool:
    try:
        return bool(api.request("GET", "/api/v1/namespaces/default/serviceaccounts/default"))
    except OSError:
        return False

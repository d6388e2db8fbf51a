#!/usr/bin/env python3
"""A real multi-node Kubernetes on one machine: `python3 cluster/cluster.py --help`. Standard library only."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

sys.path.insert(0, str(Path(__file__).resolve().parent))

from localcluster import apiserver, backend, images, volumes
from localcluster.lifecycle import Cluster
from localcluster.paths import DEFAULT_NAME
from localcluster.plan import check_name
from localcluster.report import ClusterError, say
from localcluster.status import status as status_of

FAST_NODE_LOSS = {"node_status": 1, "node_grace": 8, "eviction": 5}


def options_of(arguments: argparse.Namespace) -> Dict[str, Any]:
    preset = FAST_NODE_LOSS if arguments.fast_node_loss else {}
    given = {
        "node_status": arguments.node_status_seconds,
        "node_grace": arguments.node_grace_seconds,
        "eviction": arguments.eviction_seconds,
        "max_pods": arguments.max_pods,
    }
    return {key: value if value is not None else preset.get(key) for key, value in given.items()}


def up(arguments: argparse.Namespace) -> None:
    began = time.monotonic()
    chosen = backend.choose(arguments.backend, arguments.name)
    done = backend.up(chosen, arguments.name, arguments.nodes, options_of(arguments), arguments.port)
    kubeconfig = backend.kubeconfig(chosen, arguments.name)
    say(f"cluster {arguments.name} ({chosen.kind}) is up: {done}, {time.monotonic() - began:.1f} s")
    emit(
        arguments,
        {"backend": chosen.kind, "action": done, "kubeconfig": str(kubeconfig)},
        f"export KUBECONFIG={kubeconfig}",
    )


def down(arguments: argparse.Namespace) -> None:
    began = time.monotonic()
    existed = backend.down(arguments.name)
    say(
        f"cluster {arguments.name}: "
        + (f"removed in {time.monotonic() - began:.1f} s" if existed else "nothing to remove")
    )


def status(arguments: argparse.Namespace) -> None:
    facts = status_of(Cluster(arguments.name))
    if arguments.json:
        print(json.dumps(facts, indent=2))
    elif "nodes" not in facts:
        print(f"cluster {arguments.name}: {facts['reason']}")
    else:
        whole = "up" if facts["up"] else "NOT whole"
        print(f"cluster {facts['name']}: {whole}, Kubernetes {facts['version']}, {facts['server']}")
        print(f"KUBECONFIG={facts['kubeconfig']}  memory {facts['resident_bytes'] / 2**20:.0f} MiB without pods")
        for node in facts["nodes"]:
            state = "ready" if node["ready"] else "not ready"
            print(
                f"  {node['name']:8} {node['address']:15} {state:10} cable {'in' if node['link'] else 'PULLED'}"
                + ("" if node["powered"] else "  switched off")
            )
        for name, row in facts["processes"].items():
            if not row["running"]:
                print(f"  not running: {name}")
    sys.exit(0 if facts["up"] else 3)


def kubeconfig(arguments: argparse.Namespace) -> None:
    path = backend.kubeconfig(backend.current(arguments.name), arguments.name)
    if not path.exists():
        raise ClusterError(f"cluster {arguments.name!r} is not up: run `python3 cluster/cluster.py up`")
    emit(arguments, {"kubeconfig": str(path)}, str(path))


def detect(arguments: argparse.Namespace) -> None:
    chosen = backend.choose(arguments.backend, arguments.name)
    emit(arguments, {"backend": chosen.kind, "reason": chosen.reason}, f"{chosen.kind}: {chosen.reason}")


def load_image(arguments: argparse.Namespace) -> None:
    report = images.load(backend.current(arguments.name), arguments.name, [Path(path) for path in arguments.archives])
    emit(arguments, report, "")


def node_command(arguments: argparse.Namespace) -> None:
    cluster, number = Cluster(arguments.name), arguments.number
    if arguments.command == "node-stop":
        say(f"node {number}: {cluster.stop_node(number)} processes killed")
    elif arguments.command == "node-start":
        cluster.start_node(number)
        say(f"node {number} is ready")
    elif arguments.command in ("link-up", "link-down"):
        cluster.set_link(number, arguments.command == "link-up")
        say(f"node {number}: cable {'plugged in' if arguments.command == 'link-up' else 'pulled'}")
    else:
        raise ClusterError(f"unknown command {arguments.command}")


def process_command(arguments: argparse.Namespace) -> None:
    cluster = Cluster(arguments.name)
    name = f"kubelet-{arguments.number}" if arguments.command.startswith("kubelet-") else arguments.process
    if arguments.command.endswith("-start"):
        cluster.start_process(name)
        say(f"{name} runs")
    else:
        sig = signal.SIGTERM if arguments.gracefully else signal.SIGKILL
        say(f"{name} " + ("stopped" if cluster.stop_process(name, sig) else "was not running"))


def volume(arguments: argparse.Namespace) -> None:
    facts = volumes.make(
        backend.current(arguments.name), arguments.name, arguments.volume, arguments.size, arguments.namespace
    )
    emit(arguments, facts, f"claim {facts['claim']} in namespace {facts['namespace']} is {facts['path']} on every node")


def control_plane_only(arguments: argparse.Namespace) -> None:
    folder = Path(arguments.dir) if arguments.dir else apiserver.default_folder(arguments.port)
    server = apiserver.ApiServer(folder, port=arguments.port, controllers=arguments.controllers)
    if arguments.stop:
        server.stop()
        say(f"control plane in {server.folder} is stopped")
        return
    began = time.monotonic()
    server.start()
    say(f"control plane in {server.folder} is up on port {server.port}: {time.monotonic() - began:.1f} s")
    emit(
        arguments,
        {"kubeconfig": str(server.kubeconfig), "port": server.port, "dir": str(server.folder)},
        str(server.kubeconfig),
    )


def emit(arguments: argparse.Namespace, data: Any, text: str) -> None:
    if arguments.json:
        print(json.dumps(data, indent=2))
    elif text:
        print(text)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cluster.py", description=__doc__)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--name", default=DEFAULT_NAME, help="cluster name (default: %(default)s)")
    common.add_argument("--json", action="store_true", help="data on stdout as JSON; progress is on stderr in any case")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, function: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, parents=[common])
        sub.set_defaults(function=function)
        return sub

    sub = command("up", up, "bring the cluster up; does nothing when it is")
    sub.add_argument("--nodes", type=int, default=3)
    sub.add_argument("--port", type=int, default=0, help="API server's port on loopback (default: 6443, or a free one)")
    sub.add_argument("--backend", choices=["auto", *backend.KINDS], default="auto")
    sub.add_argument("--max-pods", type=int, help="pods per node (default: 110)")
    sub.add_argument("--node-status-seconds", type=int, help="kubelet reports this often (Kubernetes' default: 10)")
    sub.add_argument("--node-grace-seconds", type=int, help="silent node counts as lost after this (default: 40)")
    sub.add_argument("--eviction-seconds", type=int, help="pods of a lost node are deleted after this (default: 300)")
    sub.add_argument(
        "--fast-node-loss", action="store_true", help="1, 8 and 5 seconds for the three above, unless given"
    )
    command("down", down, "remove the cluster and every trace of it")
    command("status", status, "what runs; exit code 3 unless all of it does")
    command("kubeconfig", kubeconfig, "print the path of the kubeconfig")
    sub = command("detect", detect, "print which kind of cluster would be used, and why")
    sub.add_argument("--backend", choices=["auto", *backend.KINDS], default="auto")
    sub = command("load-image", load_image, "import image archives into every node; skips what is there")
    sub.add_argument("archives", nargs="+", metavar="ARCHIVE")
    for name, text in (
        ("node-stop", "kill all of a node at once, as if its plug was pulled"),
        ("node-start", "boot a stopped node"),
        ("link-down", "pull a node's network cable"),
        ("link-up", "plug it in again"),
    ):
        command(name, node_command, text).add_argument("number", type=int, metavar="N")
    for name, text in (("kubelet-stop", "kill a node's kubelet; its pods go on"), ("kubelet-start", "start it again")):
        sub = command(name, process_command, text)
        sub.add_argument("number", type=int, metavar="N")
        sub.add_argument("--gracefully", action="store_true", help="SIGTERM instead of SIGKILL")
    for name, text in (
        ("process-stop", "kill one process: etcd, kube-apiserver, containerd-2, ..."),
        ("process-start", "start it again"),
    ):
        sub = command(name, process_command, text)
        sub.add_argument("process", metavar="PROCESS")
        sub.add_argument("--gracefully", action="store_true", help="SIGTERM instead of SIGKILL")
    sub = command(
        "volume", volume, "make a volume and claim that pods of all nodes can share and write to, as any user"
    )
    sub.add_argument("volume", metavar="CLAIM")
    sub.add_argument("--size", default="10Gi")
    sub.add_argument("--namespace", default="default")
    sub = command("control-plane-only", control_plane_only, "etcd and kube-apiserver alone on loopback, for API tests")
    sub.add_argument("--dir", help="where to keep it (default: a folder of your own in the temporary directory)")
    sub.add_argument("--port", type=int, default=0, help="default: a free one")
    sub.add_argument("--controllers", action="store_true", help="also the controller manager")
    sub.add_argument("--stop", action="store_true", help="stop the one in --dir")
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        check_name(arguments.name)
        arguments.function(arguments)
    except ClusterError as error:
        say(f"error: {error}")
        return 1
    except BrokenPipeError:
        # Whoever read our output has seen enough (`| head`); nothing may be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        say("interrupted; `up` again continues, `down` removes what there is")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

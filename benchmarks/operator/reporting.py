"""What the operator spends while many jobs report: its CPU time, memory, latency of decisions and writes.

    python benchmarks/operator/reporting.py --jobs 1000 --output benchmarks/results/operator-reporting.json
    python benchmarks/operator/reporting.py --jobs 300 --starve 0.25   # and then with a quarter of a core

Real: the operator as a process, the API server and etcd, TLS, each agent's token and its review. Stood in for: nodes
and kubelets (pods are bound and called running), and the agents: coroutines of this process that speak the agents'
protocol at the agents' rate, two connections each, a long poll and a report every five seconds with figures that move.
`--starve`: afterwards the operator is killed and started with that share of a core, so that all agents come at once.
The operator's series are scraped every 15 s, as by Prometheus.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import resource
import ssl
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "cluster"), str(ROOT / "tests" / "apiserver")]

from agents import StandIn  # noqa: E402
from localcluster.api import Api  # noqa: E402
from localcluster.apiserver import ApiServer  # noqa: E402
from rig import (  # noqa: E402
    MERGE,
    OperatorProcess,
    World,
    add_namespace,
    add_node,
    container,
    eventually,
    now,
    pod_token,
    script_job,
)
from starving import starve  # noqa: E402
from trireme_api.crd import crd, strip_cel  # noqa: E402

from demo.training import cpu_model, own_time  # noqa: E402

SCRAPE_SECONDS = 15.0
"""As manifests/monitoring has it."""
PODS_PER_NODE = 250
START_SECONDS = 900
"""In which every agent must have been told to run, and every job be called Running."""
FLAGS = ("--progress-seconds", "5", "--resync-seconds", "60", "--gang-seconds", "3600")
"""The operator's own defaults, but that it waits for nodes that come slowly here."""
HISTOGRAM = "trireme_reconcile_seconds"


def process_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> int:
    return int(re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[0]) * 1024


def series(page: str) -> dict[str, float]:
    """Every sample of a page by its name with labels."""
    rows = (line.rsplit(" ", 1) for line in page.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, value in rows}


def quantile(gained: dict[str, float], q: float) -> float:
    """Of the looks in between: within its bucket in proportion, as Prometheus does it."""
    buckets = sorted(
        (float(name.split('le="')[1].split('"')[0]), count)
        for name, count in gained.items()
        if name.startswith(f"{HISTOGRAM}_bucket")
    )
    wanted, below, floor = q * buckets[-1][1], 0.0, 0.0
    for bound, count in buckets:
        if count >= wanted:
            return floor if bound == float("inf") else floor + (bound - floor) * (wanted - below) / (count - below or 1)
        below, floor = count, bound
    return floor


def by_label(gained: dict[str, float], name: str) -> dict[str, float]:
    return {key.partition("{")[2].rstrip("}"): value for key, value in gained.items() if key.startswith(name + "{")}


def running(operator: OperatorProcess) -> int:
    """Jobs that are called Running, as Prometheus is told."""
    wanted = 'phase="Running"'
    rows = (line for line in operator.get("/metrics").splitlines() if line.startswith("trireme_job_phase{"))
    return sum(wanted in line and line.endswith(" 1.0") for line in rows)


def make_pods_run(world: World, pods: list[dict[str, Any]], nodes: list[str], pool: ThreadPoolExecutor) -> None:
    def run(item: tuple[int, dict[str, Any]]) -> None:
        number, pod = item
        name = pod["metadata"]["name"]
        path = f"/api/v1/namespaces/{world.namespace}/pods/{name}"
        target = {"apiVersion": "v1", "kind": "Node", "name": nodes[number % len(nodes)]}
        body = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": target}
        world.api.request("POST", f"{path}/binding", body, timeout=60)
        state = container({"running": {"startedAt": now()}})
        status = {"phase": "Running", "podIP": "127.0.0.1", "containerStatuses": [state]}
        world.api.request("PATCH", f"{path}/status", {"status": status}, content=MERGE, timeout=60)

    list(pool.map(run, enumerate(pods)))


async def measure(operator: OperatorProcess, agents: list[StandIn], warm: float, seconds: float) -> dict[str, Any]:
    assert operator.process is not None
    pid = operator.process.pid
    until = time.monotonic() + START_SECONDS
    while (run := await asyncio.to_thread(running, operator)) < len(agents):
        if time.monotonic() > until:
            raise SystemExit(f"only {run} jobs run after {START_SECONDS} s")
        await asyncio.sleep(10)
    await asyncio.sleep(warm)

    def read() -> tuple[float, float, dict[str, float], float]:
        own = resource.getrusage(resource.RUSAGE_SELF)
        return time.monotonic(), process_seconds(pid), series(operator.get("/metrics")), own.ru_utime + own.ru_stime

    began, cpu, page, own = await asyncio.to_thread(read)
    for agent in agents:
        agent.answers, agent.troubles, agent.told_away = [], 0, 0
    for _ in range(int(seconds / SCRAPE_SECONDS)):
        await asyncio.sleep(SCRAPE_SECONDS)
        await asyncio.to_thread(operator.get, "/metrics")
    ended, cpu_after, page_after, own_after = await asyncio.to_thread(read)
    passed = ended - began
    gained = {name: value - page.get(name, 0.0) for name, value in page_after.items()}
    requests = {what: n / passed for what, n in by_label(gained, "trireme_api_requests_total").items() if n}
    waits = sorted(wait for agent in agents for wait in agent.answers)
    return {
        "seconds": passed,
        "operatorCpu": (cpu_after - cpu) / passed,
        "generatorCpu": (own_after - own) / passed,
        "residentBytes": resident(pid),
        "reportsPerSecond": sum(by_label(gained, "trireme_coordinator_answers_total").values()) / passed,
        "looksPerSecond": gained[f"{HISTOGRAM}_count"] / passed,
        "reconcileP50": quantile(gained, 0.5),
        "reconcileP99": quantile(gained, 0.99),
        "statusWritesPerSecond": sum(n for what, n in requests.items() if "status" in what and "patch" in what.lower()),
        "requestsPerSecond": requests,
        "answerP50": waits[len(waits) // 2],
        "answerP99": waits[len(waits) * 99 // 100],
        "toldToComeLater": sum(agent.told_away for agent in agents),
        "troubles": sum(agent.troubles for agent in agents),
        "queueOldestSeconds": page_after.get("trireme_queue_oldest_seconds"),
    }


async def load(world: World, operator: OperatorProcess, tokens: dict[str, str], options: Any) -> dict[str, Any]:
    pods = world.pods()
    variables = {item["name"]: item.get("value", "") for item in pods[0]["spec"]["containers"][0]["env"]}
    tls = ssl.create_default_context(cadata=variables["TRIREME_COORDINATOR_CA"])
    agents = []
    for pod in pods:
        name, labels = pod["metadata"]["name"], pod["metadata"]["labels"]
        place = f"/v1/namespaces/{world.namespace}/trainingjobs/{labels['trireme.dev/job']}/pods/{name}/report"
        uid = pod["metadata"]["uid"]
        agents.append(StandIn(operator.coordinator + place, tokens[uid], uid, tls))
    tasks = [asyncio.create_task(one) for agent in agents for one in (agent.poll(), agent.push())]
    try:
        found = await measure(operator, agents, options.warm, options.seconds)
        if options.starve:
            found["starved"] = await starve(
                world, operator, agents, options.starve, options.starve_seconds, process_seconds
            )
        return found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for agent in agents:
            await agent.close()


def benchmark(folder: Path, options: Any) -> dict[str, Any]:
    with ApiServer(folder / "apiserver", extra=["--max-requests-inflight=1000"]) as server:
        api = Api(server.kubeconfig)
        definition = strip_cel(crd())
        api.request("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", definition)
        for name in ("trireme-system", "many"):
            add_namespace(api, name)
        nodes = [f"node-{number}" for number in range(-(-options.jobs // PODS_PER_NODE))]
        for node in nodes:
            add_node(api, node, {"cpu": "256", "memory": "1024Gi", "pods": str(PODS_PER_NODE + 10)})
        account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}}
        api.request("POST", "/api/v1/namespaces/many/serviceaccounts", account)
        world = World(api, server.kubeconfig, "many")
        eventually(lambda: world.jobs() == [], "the TrainingJob resource is served")
        operator = OperatorProcess(world, folder, "operator", FLAGS)
        operator.start()
        try:
            with ThreadPoolExecutor(8) as pool:
                spec = script_job(1, carbonPolicy={"zone": "DE"}, checkpoint={"uri": "s3://nobody/asks"})
                list(pool.map(lambda number: world.create(f"job-{number:04d}", spec), range(options.jobs)))
                eventually(lambda: len(world.pods()) == options.jobs, "every job's pod is made", 600, pause=2)
                pods = world.pods()
                make_pods_run(world, pods, nodes, pool)
                tokens = dict(pool.map(lambda pod: (pod["metadata"]["uid"], pod_token(world, pod)), pods))
            return asyncio.run(load(world, operator, tokens, options))
        finally:
            operator.kill()
            if options.log:
                options.log.write_text(operator.log.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--warm", type=float, default=30.0, help="seconds from the last start until measuring begins")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--starve", type=float, metavar="SHARE", help="of a core, for an operator that starts anew")
    parser.add_argument("--starve-seconds", type=float, default=180.0)
    parser.add_argument("--log", type=Path, help="where to put the operator's log")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # two connections for each agent, at both ends
    with tempfile.TemporaryDirectory(prefix="operator-benchmark-") as folder:
        found = benchmark(Path(folder), options)
    print(json.dumps(found, indent=1))
    if options.output:
        about = {"measuredAt": own_time(), "machine": cpu_model(), "load": round(os.getloadavg()[1], 1)}
        options.output.write_text(json.dumps({"format": 1, **about, "jobs": options.jobs, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()

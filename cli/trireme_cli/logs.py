"""`trireme logs NAME`: the ranks' output of all pods as one stream."""

from __future__ import annotations

import heapq
import json
import queue
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import click
from trireme_api.job import TrainingJobStatus, pod_name
from trireme_api.layout import LOG_DIR

from trireme_cli.explanation import JobView
from trireme_cli.kube import Connect, Json, Kube, KubeProblem, connected

_STARTS = re.compile(r"^\[agent\] attempt (\d+): starting ranks (\d+) to (\d+) ")
_RANK = re.compile(r"^\[rank (\d+)\] ")
WAITING = 10_000
"""Lines that are read ahead of a terminal that is slow."""


@dataclass(frozen=True)
class Line:
    at: str
    """RFC 3339 with nanoseconds, as the kubelet stamps it: sorts as text."""
    pod: str
    text: str
    rank: int | None
    """None: the agent's own."""
    attempt: int | None
    """None: before the first attempt of this pod, or cut off by --tail."""


def read(pod: str, lines: Iterable[str]) -> Iterator[Line]:
    """Lines of one pod with the attempt they belong to: its agent says when one starts."""
    attempt: int | None = None
    for line in lines:
        at, _, text = line.partition(" ")
        started = _STARTS.match(text)
        if started:
            attempt = int(started.group(1))
        found = _RANK.match(text)
        yield Line(at, pod, text, int(found.group(1)) if found else None, attempt)


def wanted(rank: int | None, attempt: int | None) -> Callable[[Line], bool]:
    """Of a rank: its own lines. Of an attempt: also what agents said in it."""

    def fits(line: Line) -> bool:
        return (rank is None or line.rank == rank) and (attempt is None or line.attempt == attempt)

    return fits


def merged(streams: Iterable[Iterable[Line]]) -> Iterator[Line]:
    """By time; lines of one pod keep their order."""
    return heapq.merge(*streams, key=lambda line: line.at)


def shown(line: Line) -> str:
    """Ranks are told by the line itself; an agent by its pod."""
    return line.text if line.rank is not None else f"[{line.pod}] {line.text.removeprefix('[agent] ')}"


def gone(status: TrainingJobStatus, job: str, there: set[str]) -> str | None:
    """What to say of attempts whose pods are no more; None where all of them are still here."""
    first = min((slot.incarnation for slot in status.slots), default=status.attempt)
    if status.attempt <= 1 or (first <= 1 and all(pod_name(job, slot) in there for slot in status.slots)):
        return None
    return (
        f"pods of earlier attempts were replaced, and their output went with them: it is where your cluster collects "
        f"logs, by the label trireme.dev/job={job}. What each failure said is in: trireme explain {job}"
    )


@click.command("logs")
@click.argument("name")
@click.option("--rank", type=click.IntRange(0), metavar="N", help="Only this global rank.")
@click.option("--attempt", type=click.IntRange(1), metavar="N", help="Only this attempt.")
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes; Ctrl-C ends it.")
@click.option("--tail", type=click.IntRange(0), metavar="N", help="Only the last N lines of each pod.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line: at, pod, rank, attempt, text.")
@connected
def command(
    name: str, rank: int | None, attempt: int | None, follow: bool, tail: int | None, as_json: bool, kube: Connect
) -> None:
    """Print the output of all ranks of the TrainingJob NAME, by time, each line with its rank.

    \b
      trireme logs opt-125m -f
      trireme logs opt-125m --rank 3 --attempt 2
    """
    cluster = kube()
    obj = cluster.job(name)
    job = JobView.of(obj)
    pods = [pod for pod in cluster.pods(obj) if has_output(pod)]
    names = {str(pod["metadata"]["name"]) for pod in pods}
    if not pods:
        raise KubeProblem(f"no pod of {name} has any output yet ({job.phase}): trireme explain {name}")
    where = gone(job.status, name, names)
    if where is not None and (attempt is None or attempt < job.status.attempt):
        click.echo(f"note: {where}", err=True)
    fits, any_shown = wanted(rank, attempt), False
    for line in _follow(cluster, sorted(names), tail) if follow else _all(cluster, sorted(names), tail):
        if fits(line):
            any_shown = True
            click.echo(json.dumps(vars(line)) if as_json else shown(line))
    if not any_shown and (rank is not None or attempt is not None):
        told = " of ".join(
            part
            for part in (f"rank {rank}" if rank is not None else "", f"attempt {attempt}" if attempt else "")
            if part
        )
        raise KubeProblem(
            f"no line of {told} in the pods of {name} ({', '.join(sorted(names))}); ranks' own files are in each pod's "
            f"{LOG_DIR} while it runs"
        )


def has_output(pod: Json) -> bool:
    """Whether the training container has been started."""
    states = (pod.get("status") or {}).get("containerStatuses") or []
    return any((s.get("state") or {}).keys() & {"running", "terminated"} for s in states if s.get("name") == "trainer")


def _all(cluster: Kube, pods: list[str], tail: int | None) -> Iterator[Line]:
    return merged(read(pod, cluster.log(pod, follow=False, tail=tail)) for pod in pods)


def _follow(cluster: Kube, pods: list[str], tail: int | None) -> Iterator[Line]:
    """As they come: one thread per pod, for a pod that is silent must not hold up the others."""
    lines: queue.Queue[Any] = queue.Queue(WAITING)

    def pump(pod: str) -> None:
        try:
            for line in read(pod, cluster.log(pod, follow=True, tail=tail)):
                lines.put(line)
        except Exception as error:  # the stream ends; the others go on
            lines.put(f"{pod}: {error}")
        finally:
            lines.put(None)

    for pod in pods:
        threading.Thread(target=pump, args=(pod,), daemon=True).start()
    left = len(pods)
    while left:
        item = lines.get()
        if item is None:
            left -= 1
        elif isinstance(item, Line):
            yield item
        else:
            click.echo(f"note: {item}", err=True)

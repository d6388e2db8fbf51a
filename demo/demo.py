"""`make demo`: a real Kubernetes, a real training run, a killed rank, and the proof that nothing was lost."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo import plot, report, target
from demo.kube import ROOT, conditions, events_of
from demo.report import DemoError, complain, say, step
from demo.training import ENDED, Recovery, Run, cpu_model, fresh, own_time, prepare, recover, started

SAMPLE = ROOT / "manifests" / "samples" / "opt-8m-cpu.yaml"
NAME = "opt-8m"
OUTPUT = ROOT / ".demo"
KILL_AFTER_CHECKPOINT = 60
"""The rank is killed some steps after this checkpoint is committed, so that steps are lost and must be done again."""
KILL_DELAY_STEPS = 8
ORDER = ("detect", "decide", "fence", "replace", "rendezvous", "load", "firstStep")
EXACT = 1e-5
TAIL = 20
"""Steps that the final loss is the mean of."""


def follow(run: Run, until_step: int | None) -> None:
    """Prints a line whenever something moved, until the step or the end."""
    last: tuple[Any, ...] = ()
    while True:
        status = run.status()
        phase, log = status.get("phase"), run.curve()
        here = log.last_step()
        saved = (status.get("lastCheckpoint") or {}).get("step", 0)
        news = (phase, here // 10, saved)
        if news != last:
            loss = f"loss {log.rows[-1].loss:.3f}" if log.rows else "no step yet"
            speed = (status.get("progress") or {}).get("tokensPerSecond")
            say(
                f"  {phase or 'Pending':<10} step {here:>4}  {loss}"
                + (f"  {speed:,.0f} tok/s" if speed else "")
                + (f"  checkpoint {saved}" if saved else "")
            )
            last = news
        if phase in ENDED or (until_step is not None and here >= until_step and saved >= KILL_AFTER_CHECKPOINT):
            return
        # Each look is a kubectl or two, which take their processor time from the ranks.
        time.sleep(1)


def show_recovery(found: Recovery) -> None:
    say(
        f"  rank 1 killed in step {found.killed_in_step + 1}, "
        f"the gang resumed from the checkpoint of step {found.resumed_from}"
    )
    for name, seconds in sorted(found.phases.items(), key=lambda item: ORDER.index(item[0])):
        say(f"    {name:<12} {seconds:7.2f} s")
    say(f"    {'in all':<12} {found.seconds:7.2f} s from the kill to the first new step")


def judge(run: Run, entropy: float, found: Recovery) -> dict[str, Any]:
    """The figures of the run; raises DemoError unless it did what the demo claims."""
    log = run.curve()
    losses = list(log.newest().values())
    final = sum(losses[-TAIL:]) / len(losses[-TAIL:])
    difference = log.largest_difference()
    status = run.status()
    if status.get("phase") != "Succeeded":
        raise DemoError(f"{run.name} did not succeed: {run.why()}")
    if final >= entropy - 0.2:
        raise DemoError(
            f"the loss of the last {TAIL} steps is {final:.3f}, not well below the unigram entropy {entropy:.3f}"
        )
    if log.missing():
        raise DemoError(f"steps {log.missing()[:5]} were never done")
    if difference is None or difference > EXACT:
        raise DemoError(f"steps done twice differ by {difference}, more than {EXACT}: the run did not continue exactly")
    return {
        "measuredAt": own_time(),
        "machine": cpu_model(),
        "steps": log.last_step(),
        "finalLoss": round(final, 4),
        "unigramEntropy": round(entropy, 4),
        "firstLoss": round(losses[0], 4),
        "stepsDoneTwice": len(log.repeated()),
        "largestDifference": difference,
        "recovery": found.as_json(),
        "progress": status.get("progress"),
        "energy": {k: v for k, v in (status.get("energy") or {}).items() if k != "pods"},
        "carbon": status.get("carbon"),
        "restarts": status.get("restartCount"),
    }


def show_end(run: Run, entropy: float, summary: dict[str, Any]) -> None:
    log = run.curve()
    say("\n$ kubectl get tj\n" + run.kube.out("get", "trainingjobs"))
    say(f"$ kubectl describe tj {run.name}   # events")
    for event in events_of(run.kube, run.job()):
        say(f"  {event['type']:<8} {event['reason']:<16} {event['message'][:160]}")
    say("\n" + plot.terminal(log, entropy))
    picture = OUTPUT / "loss.png"
    plot.picture(
        log,
        entropy,
        picture,
        f"OPT-8M on Debian's manuals: rank killed in step {summary['recovery']['killedInStep'] + 1}",
    )
    say(f"\nloss {summary['firstLoss']:.2f} → {summary['finalLoss']:.2f}, unigram entropy {entropy:.2f}")
    say(
        f"{summary['stepsDoneTwice']} steps were done by both attempts; their losses differ by at most "
        f"{summary['largestDifference']:.1e}"
    )
    say(f"{summary['recovery']['secondsFromKillToFirstNewStep']:.1f} s from the kill to the first new step")
    say(f"\nfigures  {OUTPUT / 'summary.json'}\nplot     {picture}")
    say("\nWhere to look next")
    say(f"  export KUBECONFIG={run.kube.kubeconfig}")
    say(f"  kubectl get tj {run.name} -o yaml            # conditions, progress, restarts, energy, carbon")
    say("  kubectl get pods,events -w                   # while you apply a job of your own")
    say(f"  {run.storage.verify(run.place)}")
    say("  docs/architecture.md                         # how it works;  make cluster-down removes the cluster")


def demo() -> None:
    began = time.monotonic()
    here = target.up()
    target.install(here, *target.images(here))
    with step("corpus: Debian's manuals, tokenised by `trireme prepare`"):
        manifest = prepare(here.storage(), "corpus/debian")
        entropy = float(manifest["unigramEntropy"])
        say(f"  {manifest['tokens']:,} tokens, unigram entropy {entropy:.3f} nats per token")
    ready = time.monotonic() - began
    with step(f"kubectl apply -f {SAMPLE.relative_to(ROOT)}"):
        run = fresh(here, SAMPLE, NAME)
        started(run)
    with step("training on 2 nodes × 1 rank"):
        follow(run, KILL_AFTER_CHECKPOINT + KILL_DELAY_STEPS)
    with step("kill -9 of rank 1"):
        found = recover(run, slot=1)
        show_recovery(found)
    with step("training on"):
        follow(run, None)
    running = conditions(run.job()).get("Succeeded", {})
    say(f"  {running.get('reason', '')}: {running.get('message', '')}")
    summary = judge(run, entropy, found)
    summary["seconds"] = {"setUp": round(ready, 1), "all": round(time.monotonic() - began, 1), "steps": report.seconds}
    OUTPUT.mkdir(exist_ok=True)
    (OUTPUT / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    show_end(run, entropy, summary)
    say(f"\n{summary['seconds']['all']:.0f} s in all, {ready:.0f} s of them until everything stood")


def main() -> int:
    try:
        demo()
    except DemoError as error:
        return complain(error)
    except KeyboardInterrupt:
        say("\ninterrupted; `make demo` again continues, `make cluster-down` removes the cluster")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`make images` and `make install`: the demo's first steps, each by itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo import delivery, target
from demo.images import build_all
from demo.report import DemoError, complain, say, step


def images() -> None:
    prefix = delivery.registry(os.environ)
    with step("images"):
        built = build_all(prefix or delivery.LOCAL, push=bool(prefix))
    for one in built:
        say(f"  {one.tag}  {'pushed' if prefix else one.archive}")


def install() -> None:
    here = target.up()
    target.install(here, *target.images(here))
    say(f"\nexport KUBECONFIG={here.kube.kubeconfig}")
    say("kubectl apply -f job.yaml   # any TrainingJob, e.g. of manifests/samples; `kubectl get tj -w` shows it")


def main() -> int:
    steps = {"images": images, "install": install}
    if len(sys.argv) != 2 or sys.argv[1] not in steps:
        return complain(DemoError(f"usage: steps.py {'|'.join(steps)}"))
    try:
        steps[sys.argv[1]]()
    except DemoError as error:
        return complain(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())

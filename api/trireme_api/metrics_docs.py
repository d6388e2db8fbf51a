"""docs/metrics.md: every series, from the catalogue that the exposers use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from trireme_api.metrics import AGENT, JOB, OPERATOR, TRAINER, Metric, exposed_by

_INTRODUCTION = """# Metrics

Made by `make docs` from `api/trireme_api/metrics.py`; edit the catalogue, not this page. How they are scraped, the
alerts and the dashboards: [monitoring](monitoring.md).

Base units; counters end in `_total`; a value that is not known has no series. Series of a job go when the job goes.
No series carries a pod's name of its own accord: `namespace`, `job` and `pod` are put on by the scraper, so they join.

```promql
trireme_train_loss * on (namespace, job) group_left (model) trireme_job_info
```
"""


def page() -> str:
    operator = exposed_by(OPERATOR)
    jobs = [metric for metric in operator if metric.labels[:2] == JOB]
    own = [metric for metric in operator if metric not in jobs]
    parts = [
        _INTRODUCTION,
        _section(
            "Jobs", "By the operator's leading replica, from the status of each job, port 8080. Labels `namespace` and "
            "`job`, and:", ((metric, metric.labels[2:]) for metric in jobs),
        ),
        _section("The operator", "By each replica, port 8080.", ((metric, metric.labels) for metric in own)),
        _section(
            "Training", "By global rank 0 alone, port 9401; handed on by its pod's agent, so that nothing that is not "
            "there is scraped. Steady state leaves out the first step, checkpoints and evaluation "
            "([formulae](trainer.md#figures)).", ((metric, metric.labels) for metric in exposed_by(TRAINER)),
        ),
        _section(
            "Pods", "By the agent of each pod, port 9400.", ((metric, metric.labels) for metric in exposed_by(AGENT))
        ),
    ]  # fmt: skip
    return "\n".join(parts)


def _section(title: str, text: str, metrics: Iterable[tuple[Metric, tuple[str, ...]]]) -> str:
    return "\n".join([f"## {title}", "", text, "", *_table(metrics), ""])


def _table(metrics: Iterable[tuple[Metric, tuple[str, ...]]]) -> Iterator[str]:
    yield "| name | type | unit | labels | meaning | there |"
    yield "|---|---|---|---|---|---|"
    for metric, labels in metrics:
        shown = " ".join(f"`{label}`" for label in labels)
        yield f"| `{metric.name}` | {metric.kind} | {metric.unit} | {shown} | {metric.help} | {metric.when} |"

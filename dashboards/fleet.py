"""All jobs and the operator: what runs, what waits, how well time is used, and whether somebody decides."""

from __future__ import annotations

from typing import Any

from dashboards.panels import PHASES, STATES, board, choice, figure, listing, over_time, row

IN = 'namespace=~"$namespace"'
BY = "by (namespace, job)"


def fleet() -> Any:
    made = board("trireme-fleet", "Trireme / Fleet", "All TrainingJobs and the operator.", 12)
    made = made.with_variable(choice("namespace", "label_values(trireme_job_info, namespace)", several=True))
    for panel in (*_now(), *_jobs(), *_recoveries(), *_operator()):
        made = made.with_panel(panel) if not hasattr(panel, "collapsed") else made.with_row(panel)
    return made


def each(name: str) -> str:
    """A series of each job, told once."""
    return f"max {BY} (trireme_job_{name}{{{IN}}})"


def phase(names: str) -> str:
    return f'sum(max by (namespace, job, phase) (trireme_job_phase{{{IN},phase=~"{names}"}}))'


def _now() -> list[Any]:
    bad = (None, "green"), (1, "orange")
    return [
        figure("Running", "Jobs that train.", "none", (phase("Running"), "jobs")),
        figure("Waiting", "Jobs that wait for room.", "none", (phase("Pending"), "jobs")),
        figure("In trouble", "Jobs that hold nodes and do not train.", "none",
               (phase("Starting|Recovering|Suspending"), "jobs"), steps=bad),
        figure("Nodes", "Nodes whose ranks run.", "none", (f"sum({each('nodes_ready')})", "nodes")),
        figure("Tokens/s", "Of all jobs.", "short", (f"sum({each('tokens_per_second')}) or vector(0)", "tokens/s")),
        figure("Goodput", "Of all jobs: step over all time but queued and suspended, since each job's start.",
               "percentunit", (
                   f'sum(max by (namespace, job) (trireme_job_seconds_total{{{IN},state="step"}})) / '
                   f'sum(max by (namespace, job, state) (trireme_job_seconds_total{{{IN},state!~"queued|suspended"}}))',
                   "goodput"), decimals=1, steps=((None, "red"), (0.8, "orange"), (0.95, "green"))),
        figure("Leaders", "Replicas of the operator that lead; one is right.", "none",
               ("sum(trireme_leader)", "leaders"), steps=((None, "red"), (1, "green"), (2, "red")), graph=False),
        figure("Alerts", "Alerts of Trireme that fire.", "none",
               ('count(ALERTS{alertname=~"Trireme.+",alertstate="firing"}) or vector(0)', "alerts"), steps=bad),
    ]  # fmt: skip


def _jobs() -> list[Any]:
    moved = f"max by (namespace, job, state) (clamp_min(delta(trireme_job_seconds_total{{{IN}}}[5m]), 0))"
    unsaved = f"namespace_job:trireme_unsaved_seconds{{{IN}}}"
    return [
        listing("Jobs", "Jobs that have not ended.", (
            ("steps done", "none", each("step")),
            ("of", "none", each("total_steps")),
            ("loss", "none", each("loss")),
            ("tokens/s", "short", each("tokens_per_second")),
            ("TFLOP/s", "none", each("model_tflops")),
            ("goodput", "percentunit", each("goodput_ratio")),
            ("restarts", "none",
             f"sum {BY} (max by (namespace, job, kind) (trireme_job_restarts_total{{{IN}}}))"),
            ("not saved", "s", f"max {BY} ({unsaved})"),
            ("CO2e", "massg", f"sum {BY} (max by (namespace, job, scope) (trireme_job_carbon_grams{{{IN}}}))"),
        )),
        over_time("Jobs by phase", "How many jobs are in which phase.", "none",
                  (f"sum by (phase) (max by (namespace, job, phase) (trireme_job_phase{{{IN}}}))", "{{phase}}"),
                  stacked=True, low=0, colors=PHASES),
        over_time("Throughput", "Valid tokens per second of each job.", "short",
                  (each("tokens_per_second"), "{{namespace}}/{{job}}"), stacked=True, low=0),
        over_time("Time by state", "Shares of all jobs' last 5 minutes that went into each state.", "percentunit",
                  (f"sum by (state) ({moved}) / scalar(sum({moved}))", "{{state}}"), stacked=True, low=0, high=1,
                  colors=STATES),
    ]  # fmt: skip


def _recoveries() -> list[Any]:
    failures = f"sum by (cause) (max by (namespace, job, cause) (increase(trireme_job_failures_total{{{IN}}}[15m])))"
    return [
        row("Recoveries"),
        over_time("Failures", "Answered in 15 minutes, by cause.", "none", (failures, "{{cause}}"), stacked=True,
                  low=0),
        *(
            over_time(f"Recovery, {text}", f"{words}, by phase; over 6 hours.", "s", (
                      f"histogram_quantile({q}, sum by (phase, le) (increase(trireme_recovery_seconds_bucket[6h])))",
                      "{{phase}}"), low=0)
            for q, text, words in (
                (0.5, "median", "Half took no longer"), (0.95, "p95", "All but a twentieth took no longer"))
        ),
    ]  # fmt: skip


def _operator() -> list[Any]:
    return [
        row("Operator"),
        over_time("Leader", "1 on the replica that leads.", "none", ("trireme_leader", "{{instance}}"), low=0, high=2),
        over_time("Queue", "How many jobs wait to be looked at, and for how many seconds the latest is late.", "none",
                  ("max(trireme_queue_depth)", "jobs"), ("max(trireme_queue_oldest_seconds)", "seconds late"), low=0),
        over_time("Reconcile", "One look at a job, writes included.", "s",
                  *((f"histogram_quantile({q}, sum by (le) (rate(trireme_reconcile_seconds_bucket[5m])))", name)
                    for q, name in ((0.5, "median"), (0.99, "p99"))), low=0),
        over_time("API requests", "To the Kubernetes API, by answer.", "reqps",
                  ("sum by (code) (rate(trireme_api_requests_total[5m]))", "{{code}}"), stacked=True, low=0),
        over_time("Agents", "Answers to agents by HTTP status.", "reqps",
                  ("sum by (code) (rate(trireme_coordinator_answers_total[5m]))", "{{code}}"), stacked=True, low=0),
        over_time("Watches", "LISTs that found what no event had told; 2 and silence: the watch is dead.", "none",
                  ("max by (resource) (trireme_watch_unannounced_lists)", "{{resource}}"), low=0),
    ]  # fmt: skip

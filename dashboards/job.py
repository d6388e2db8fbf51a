"""One job, for whoever is woken by it: what it does now, how it trains, where time goes, what failed, what is left."""

from __future__ import annotations

from typing import Any

from dashboards.panels import PHASES, STATES, bars, board, choice, figure, marks, over_time, row, timeline

JOB = 'namespace="$namespace",job="$job"'
BY = "by (namespace, job)"
DEVICE = "of each device, causal-exact, in steady state"


def one(name: str) -> str:
    """A series of the job: one, whichever replica of the operator tells of it."""
    return f"max {BY} (trireme_job_{name}{{{JOB}}})"


def job() -> Any:
    made = board("trireme-job", "Trireme / Job", "One TrainingJob.", 3)
    made = made.with_variable(choice("namespace", "label_values(trireme_job_info, namespace)"))
    made = made.with_variable(choice("job", 'label_values(trireme_job_info{namespace="$namespace"}, job)'))
    made = made.annotation(marks("new attempt", f"changes(trireme_job_attempt{{{JOB}}}[1m]) > 0", "red"))
    for panel in (*_now(), *_training(), *_time(), *_failures(), *_checkpoints(), *_footprint()):
        made = made.with_panel(panel) if not hasattr(panel, "collapsed") else made.with_row(panel)
    return made


def _now() -> list[Any]:
    warn = (None, "green"), (1800, "orange"), (3600, "red")
    return [
        figure("Phase", "Phase of the job.", "none",
               (f"max by (phase) (trireme_job_phase{{{JOB}}}) == 1", "{{phase}}"), named=True),
        figure("Done", "Optimiser steps done, of all.", "percentunit",
               (f"{one('step')} / {one('total_steps')}", "done"), decimals=1),
        figure("Left", "Time to the end at this speed.", "s",
               (f"{one('end_timestamp_seconds')} - time()", "left"), graph=False),
        figure("Loss", "Newest training loss.", "none", (one("loss"), "loss"), decimals=3),
        figure("Tokens/s", "All devices together.", "short", (one("tokens_per_second"), "tokens/s")),
        figure("Nodes", "Nodes whose ranks run.", "none", (one("nodes_ready"), "ready"), graph=False),
        figure("Goodput", "Effective training time since the start: step over all time but queued and suspended.",
               "percentunit", (one("goodput_ratio"), "goodput"), decimals=1,
               steps=((None, "red"), (0.8, "orange"), (0.95, "green"))),
        figure("Not saved", "What would be done again if it died now.", "s",
               (f"namespace_job:trireme_unsaved_seconds{{{JOB}}}", "not saved"), steps=warn),
        timeline("State", "The phase it was in; red lines are new attempts.",
                 (f"max by (phase) (trireme_job_phase{{{JOB}}}) == 1", "{{phase}}"), colors=PHASES),
    ]  # fmt: skip


def _training() -> list[Any]:
    train = f"trireme_train_{{}}{{{{{JOB}}}}}"
    return [
        row("Training"),
        over_time("Loss", "Mean cross-entropy per valid token.", "none", (one("loss"), "loss")),
        over_time("Step", "Optimiser steps done, and the newest that is saved.", "none",
                  (one("step"), "done"), (one("last_checkpoint_step"), "saved")),
        over_time("Throughput", "Valid tokens per second, all devices, in steady state.", "short",
                  (one("tokens_per_second"), "tokens/s"), low=0),
        over_time("TFLOP/s", f"Model FLOP/s {DEVICE}.", "none", (one("model_tflops"), "TFLOP/s"),
                  (f"namespace_job:trireme_model_tflops:median_6h{{{JOB}}}", "median of 6 h"), low=0),
        over_time("MFU", f"Share of the peak {DEVICE}; none where the peak is not known.", "percentunit",
                  (one("mfu"), "MFU"), (train.format("mfu_palm"), "by PaLM's formula"),
                  (train.format("hfu"), "HFU"), low=0),
        over_time("Time of a step", "Half of the steps, and all but a hundredth, took no longer.", "s",
                  *((f"histogram_quantile({q}, sum by (le) (rate(trireme_train_step_seconds_bucket{{{JOB}}}[5m])))", n)
                    for q, n in ((0.5, "median"), (0.99, "p99"))), low=0),
        over_time("Gradient norm", "Global L2 norm before clipping.", "none", (train.format("grad_norm"), "norm"),
                  log=True),
        over_time("Learning rate", "Of the newest step.", "sci", (train.format("learning_rate"), "rate"), low=0),
        over_time("Instability", "Loss spikes, steps skipped, rollbacks; in 5 minutes.", "none",
                  *((f"increase(trireme_train_{name}_total{{{JOB}}}[5m])", text) for name, text in
                    (("spikes", "spikes"), ("skipped_steps", "skipped"), ("rollbacks", "rollbacks"))), low=0),
    ]  # fmt: skip


def _time() -> list[Any]:
    moved = f"clamp_min(delta(trireme_job_seconds_total{{{JOB}}}[5m]), 0)"
    return [
        row("Where time goes"),
        over_time("Time by state", "Shares of the last 5 minutes that went into each state.", "percentunit",
                  (f"max by (state) ({moved}) / scalar(sum(max by (state) ({moved})))", "{{state}}"),
                  span=16, stacked=True, low=0, high=1, colors=STATES),
        bars("Since the start", "All of the job's time by state.", "s",
             (f"max by (state) (trireme_job_seconds_total{{{JOB}}}) > 0", "{{state}}")),
        over_time("Goodput", "Effective training time since the start and in the last hour.", "percentunit",
                  (one("goodput_ratio"), "since the start"),
                  (f"namespace_job:trireme_goodput:ratio_1h{{{JOB}}}", "last hour"), low=0, high=1),
        over_time("Waiting for data", "Share of time rank 0 stood waiting for data.", "percentunit",
                  (f"rate(trireme_train_data_wait_seconds_total{{{JOB}}}[5m])", "waiting"), low=0),
        over_time("Nodes", "Asked for, running, and avoided as sick.", "none", (one("nodes_desired"), "desired"),
                  (one("nodes_ready"), "ready"), (one("nodes_avoided"), "avoided"), low=0),
    ]  # fmt: skip


def _failures() -> list[Any]:
    heartbeat = f"max by (pod, local_rank) (trireme_agent_rank_heartbeat_age_seconds{{{JOB}}})"
    return [
        row("Failures"),
        over_time("Restarts", "Restarts so far: processes in place, pods replaced, the whole gang.", "none",
                  (f"max by (kind) (trireme_job_restarts_total{{{JOB}}})", "{{kind}}"), span=6, low=0),
        bars("Failures by cause", "Failures answered so far.", "none",
             (f"max by (cause) (trireme_job_failures_total{{{JOB}}}) > 0", "{{cause}}"), span=6,
             steps=((None, "red"),)),
        bars("Newest recovery", "Its parts, in the order they come.", "s",
             *((f'max(trireme_job_recovery_seconds{{{JOB},phase="{phase}"}})', phase.replace("_", " ")) for phase in
               ("detect", "decide", "fence", "replace", "rendezvous", "load", "first_step")), span=6),
        bars("Restarts left", "Of causes that have used some, within the window; at none the job fails.", "none",
             (f"max by (cause, action) (trireme_job_restart_budget_left{{{JOB}}})", "{{cause}}: {{action}}"), span=6,
             steps=((None, "red"), (1, "orange"), (3, "green"))),
        over_time("Heartbeats", "Age of each rank's newest heartbeat; one that grows is a hang.", "s",
                  (heartbeat, "{{pod}} rank {{local_rank}}"), span=12, low=0),
        over_time("Hangs and stragglers", "A hang that is being answered; ranks that the others wait for each step.",
                  "none", (one("hang"), "hang"), (one("stragglers"), "stragglers"), span=12, low=0),
    ]  # fmt: skip


def _checkpoints() -> list[Any]:
    mean = (
        f"sum by (part) (rate(trireme_train_checkpoint_seconds_sum{{{JOB}}}[15m])) "
        f"/ sum by (part) (rate(trireme_train_checkpoint_seconds_count{{{JOB}}}[15m]))"
    )
    return [
        row("Checkpoints"),
        over_time("Not saved", "Work since the newest checkpoint, or since the attempt began.", "s",
                  (f"namespace_job:trireme_unsaved_seconds{{{JOB}}}", "not saved"), span=12, low=0),
        over_time("Time of a save", "Mean of 15 minutes: how long training stood still, and until it was committed.",
                  "s", (mean, "{{part}}"), span=12, low=0),
    ]  # fmt: skip


def _footprint() -> list[Any]:
    return [
        row("Energy and carbon"),
        over_time("Power", "By part, mean of 2 minutes; parts without a counter are left out.", "watt",
                  (f"namespace_job_part:trireme_power_watts:rate_2m{{{JOB}}}", "{{part}}"), stacked=True, low=0),
        over_time("CO2e", "Of all attempts, and what the job may cause.", "massg",
                  (f"max by (scope) (trireme_job_carbon_grams{{{JOB}}})", "{{scope}}"),
                  (one("carbon_budget_grams"), "budget"), low=0),
        over_time("Energy", "Of all attempts, by the weakest source in it.", "joule",
                  (f"max by (source) (trireme_job_energy_joules{{{JOB}}})", "{{source}}"), low=0),
    ]  # fmt: skip

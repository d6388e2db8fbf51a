"""Every Prometheus series there is: name, type, unit, labels, help. Trainer, agent and operator expose what stands here
and nothing else; docs/metrics.md is made from it (`make docs`).

Standard library only and Python 3.9 syntax: travels with the agent. Whose job a series is about, a pod does not say:
`namespace`, `job` and `pod` come from the scraper (manifests/monitoring), where a pod cannot forge them. The operator,
which tells of all jobs, says `namespace` and `job` itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Tuple

TRAINER, AGENT, OPERATOR = "trainer", "agent", "operator"
COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"
UNTYPED = "untyped"
"""A total that is moved between labels afterwards, so neither a counter nor one gauge."""
JOB = ("namespace", "job")


@dataclass(frozen=True)
class Metric:
    name: str
    """As it is exposed; of a counter with `_total`."""
    kind: str
    unit: str
    by: str
    help: str
    labels: Tuple[str, ...] = ()
    when: str = ""
    """When there is a series, where that is not always: a value that is not known has none."""
    buckets: Tuple[float, ...] = ()

    @property
    def base(self) -> str:
        """Without `_total`: how prometheus_client names a counter."""
        return self.name[: -len("_total")] if self.kind == COUNTER else self.name


_STEPS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_RECOVERY = (0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_STEPPED, _STEADY = "after the first step", "after the second step"
_PEAK = "where the device's peak is known"
_TOLD = "once the ranks tell it"
_RUNS = "while it runs, once the ranks tell it"
_USED = "for causes that have used some"


def _train(name: str, kind: str, unit: str, text: str, *labels: str, when: str = "") -> Metric:
    buckets = _STEPS if kind == HISTOGRAM else ()
    return Metric(f"trireme_train_{name}", kind, unit, TRAINER, text, labels, when, buckets)


_TRAIN = (
    _train("attempt", GAUGE, "", "Attempt this process belongs to."),
    _train("step", GAUGE, "steps", "Optimiser steps done.", when=_STEPPED),
    _train("steps_planned", GAUGE, "steps", "Optimiser steps of the whole run.", when=_STEPPED),
    _train("loss", GAUGE, "nats", "Mean cross-entropy per valid token.", when=_STEPPED + ", where finite"),
    _train("grad_norm", GAUGE, "", "Global L2 gradient norm before clipping.", when=_STEPPED + ", where finite"),
    _train("learning_rate", GAUGE, "", "Learning rate of the newest step.", when=_STEPPED),
    _train("loss_scale", GAUGE, "", "What fp16 gradients are scaled by.", when="with fp16"),
    _train("tokens_total", COUNTER, "tokens", "Valid tokens trained by this attempt, all ranks."),
    _train("tokens_per_second", GAUGE, "tokens/s", "Throughput of all devices in steady state.", when=_STEADY),
    _train("model_tflops", GAUGE, "TFLOP/s", "Model FLOP/s per device, causal-exact, in steady state.", when=_STEADY),
    _train("mfu", GAUGE, "0 to 1", "Model FLOPs utilisation.", when=_PEAK),
    _train("mfu_palm", GAUGE, "0 to 1", "Model FLOPs utilisation by PaLM's formula.", when=_PEAK),
    _train("hfu", GAUGE, "0 to 1", "Utilisation with recomputed FLOPs.", when=_PEAK),
    _train("step_seconds", HISTOGRAM, "s", "Time of each step, waiting for data included."),
    _train("seconds_total", COUNTER, "s", "Wall time of this process by what it went into.", "state", when=_STEPPED),
    _train("data_wait_seconds_total", COUNTER, "s", "Time rank 0 stood waiting for data."),
    _train("checkpoint_seconds", HISTOGRAM, "s", "Time per checkpoint: blocked (training stood still) or total.",
           "part", when="after the first checkpoint"),
    _train("checkpoint_step", GAUGE, "steps", "Step of the newest committed checkpoint.",
           when="after the first checkpoint"),
    _train("skipped_steps_total", COUNTER, "steps", "Steps that left the weights alone: not finite, or a spike."),
    _train("spikes_total", COUNTER, "spikes", "Loss spikes, whatever was done."),
    _train("rollbacks_total", COUNTER, "rollbacks", "How often this attempt went back in place."),
)  # fmt: skip


def _agent(name: str, kind: str, unit: str, text: str, *labels: str, when: str = "") -> Metric:
    return Metric(f"trireme_{name}", kind, unit, AGENT, text, labels, when)


_AGENT = (
    _agent("agent_state", GAUGE, "0 or 1", "1 for the state the agent is in.", "state"),
    _agent("agent_attempt", GAUGE, "", "Attempt the agent holds; 0 before the first."),
    _agent("agent_starts_total", COUNTER, "starts", "Times this agent started its ranks."),
    _agent("agent_coordinator_unheard_seconds", GAUGE, "s", "Time since the coordinator last answered."),
    _agent("agent_rank_up", GAUGE, "0 or 1", "1 while the rank's process is alive.", "local_rank",
           when="from the first assignment"),
    _agent("agent_rank_step", GAUGE, "steps", "Step of the rank's last heartbeat.", "local_rank",
           when="for ranks with a heartbeat"),
    _agent("agent_rank_heartbeat_age_seconds", GAUGE, "s", "Time since the rank's heartbeat last changed.",
           "local_rank", when="for ranks with a heartbeat"),
    *(
        _agent(f"{part}_energy_joules_total", COUNTER, "J",
               f"Energy of this pod's {what} since the agent started; NaN where source is missing.", "source",
               when=when)
        for part, what, when in (
            ("gpu", "GPUs", "in pods with GPUs"), ("cpu", "share of the CPUs", ""), ("dram", "share of the memory", "")
        )
    ),
)  # fmt: skip


def _job(name: str, kind: str, unit: str, text: str, *labels: str, when: str = "") -> Metric:
    return Metric(f"trireme_job_{name}", kind, unit, OPERATOR, text, (*JOB, *labels), when)


_JOB = (
    _job("info", GAUGE, "1", "What the job is; join on namespace and job.", "uid", "model", "checkpoint", "zone"),
    _job("phase", GAUGE, "0 or 1", "1 for the phase the job is in.", "phase"),
    _job("step", GAUGE, "steps", "Optimiser steps done.", when=_TOLD),
    _job("total_steps", GAUGE, "steps", "Optimiser steps to do.", when=_TOLD),
    _job("tokens", GAUGE, "tokens", "Tokens trained on.", when=_TOLD),
    _job("loss", GAUGE, "nats", "Newest training loss.", when=_TOLD),
    _job("tokens_per_second", GAUGE, "tokens/s", "Throughput of the whole job.", when=_RUNS),
    _job("model_tflops", GAUGE, "TFLOP/s", "Model FLOP/s per device.", when=_RUNS),
    _job("mfu", GAUGE, "0 to 1", "Model FLOPs utilisation.", when=f"while it runs, {_PEAK}"),
    _job("nodes_desired", GAUGE, "nodes", "Nodes asked for."),
    _job("nodes_ready", GAUGE, "nodes", "Nodes whose ranks run."),
    _job("nodes_avoided", GAUGE, "nodes", "Nodes that get no pod of this job for a while."),
    _job("attempt", GAUGE, "", "Number of the attempt."),
    _job("stragglers", GAUGE, "ranks", "Ranks that the others wait for, each step."),
    _job("hang", GAUGE, "0 or 1", "1 while a hang that was found is being answered."),
    _job("start_timestamp_seconds", GAUGE, "Unix s", "When the job was first seen.", when="once seen"),
    _job("attempt_start_timestamp_seconds", GAUGE, "Unix s", "When this attempt began.", when="once admitted"),
    _job("end_timestamp_seconds", GAUGE, "Unix s", "When it will have ended at this speed.", when=_RUNS),
    _job("last_checkpoint_step", GAUGE, "steps", "Step of the newest committed checkpoint.",
         when="after the first checkpoint"),
    _job("last_checkpoint_timestamp_seconds", GAUGE, "Unix s", "When the newest committed checkpoint was told.",
         when="after the first checkpoint"),
    _job("restarts_total", COUNTER, "restarts", "Restarts by kind: process, pod, gang.", "kind"),
    _job("failures_total", COUNTER, "failures", "Failures answered, by cause.", "cause"),
    _job("restart_budget", GAUGE, "restarts", "Restarts that a cause may use within the window, by rung.",
         "cause", "action", when=_USED),
    _job("restart_budget_left", GAUGE, "restarts", "How many of them are left.", "cause", "action", when=_USED),
    _job("recovery_seconds", GAUGE, "s", "Parts of the newest recovery.", "phase", when="after a failure"),
    _job("goodput_ratio", GAUGE, "0 to 1",
         "Effective training time: step over all time in which nodes were held.", when="once ranks ran"),
    _job("seconds_total", UNTYPED, "s",
         "Wall time by the state it went into; time moves from step to lost when steps are done again.", "state",
         when="once seen"),
    _job("lost_steps", GAUGE, "steps", "Optimiser steps that had to be done again.", when="once seen"),
    _job("energy_joules", GAUGE, "J", "Energy of all attempts, by the weakest source in it.", "source",
         when="where energy is read"),
    _job("idle_energy_joules", GAUGE, "J", "The part of it used while no rank ran in the pod.",
         when="where energy is read"),
    _job("carbon_grams_per_million_tokens", GAUGE, "g CO2e",
         "SCI: operational and embodied, the latter by calendar.", when="once tokens and both are known"),
    _job("carbon_grams", GAUGE, "g CO2e", "CO2e of all attempts; scope is operational or embodied.", "scope",
         when="where it is known"),
    _job("carbon_budget_grams", GAUGE, "g CO2e", "CO2e that the job may cause.", when="where the job has a budget"),
    _job("grid_grams_per_kilowatt_hour", GAUGE, "g/kWh", "Carbon intensity of the grid that is reckoned with.",
         when="where a zone or an intensity is given"),
)  # fmt: skip


def _operator(
    name: str, kind: str, unit: str, text: str, *labels: str, when: str = "", buckets: Tuple[float, ...] = ()
) -> Metric:
    return Metric(f"trireme_{name}", kind, unit, OPERATOR, text, labels, when, buckets)


_OPERATOR = (
    _operator("leader", GAUGE, "0 or 1", "1 on the replica that leads."),
    _operator("reconcile_total", COUNTER, "looks", "Looks at a job by result.", "result"),
    _operator("reconcile_seconds", HISTOGRAM, "s", "One look at a job, writes included.", buckets=_FAST),
    _operator("queue_depth", GAUGE, "jobs", "Jobs marked to be looked at."),
    _operator("queue_oldest_seconds", GAUGE, "s", "How late the latest of them is; figures may wait."),
    _operator("loop_late_seconds", GAUGE, "s", "How late the event loop is; from 2 on it turns agents away."),
    _operator("api_requests_total", COUNTER, "requests", "Requests to the Kubernetes API.", "verb", "resource", "code"),
    _operator("api_request_seconds", HISTOGRAM, "s", "Time of such a request.", "verb", buckets=_FAST),
    _operator("watch_last_event_age_seconds", GAUGE, "s", "Time since the last event of a watch.", "resource"),
    _operator("watch_unannounced_lists", GAUGE, "lists",
              "LISTs since that event that found what no event had told.", "resource"),
    _operator("coordinator_answers_total", COUNTER, "answers", "Answers to agents by HTTP status.", "code"),
    _operator("coordinator_waiting_agents", GAUGE, "agents", "Agents in a long poll."),
    _operator("recovery_seconds", HISTOGRAM, "s", "Parts of each recovery, all jobs.", "phase", buckets=_RECOVERY),
    _operator("carbon_grams_total", COUNTER, "g CO2e",
              "CO2e accounted since this replica started, all jobs; scope is operational or embodied.", "scope"),
)  # fmt: skip

METRICS: Dict[str, Metric] = {metric.name: metric for metric in (*_TRAIN, *_AGENT, *_JOB, *_OPERATOR)}


def exposed_by(part: str) -> Tuple[Metric, ...]:
    """Those of the trainer, the agent or the operator."""
    return tuple(metric for metric in METRICS.values() if metric.by == part)

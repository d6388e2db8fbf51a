"""What training costs in energy and CO2e: of all jobs, by job, by source, and how far the figures can be trusted."""

from __future__ import annotations

from typing import Any

from dashboards.panels import bars, board, choice, figure, over_time, row

IN = 'namespace=~"$namespace"'
ENERGY = f"max by (namespace, job) (trireme_job_energy_joules{{{IN}}})"
GRAMS = f"sum by (namespace, job) (max by (namespace, job, scope) (trireme_job_carbon_grams{{{IN}}}))"
TOKENS = f"max by (namespace, job) (trireme_job_tokens{{{IN}}})"
POWER = f"namespace_job_part:trireme_power_watts:rate_2m{{{IN}}}"
NAME = "{{namespace}}/{{job}}"


def carbon() -> Any:
    made = board("trireme-carbon", "Trireme / Energy and carbon", "Energy and CO2e of all TrainingJobs.", 24)
    made = made.with_variable(choice("namespace", "label_values(trireme_job_info, namespace)", several=True))
    for panel in (*_now(), *_flow(), *_jobs(), *_trust()):
        made = made.with_panel(panel) if not hasattr(panel, "collapsed") else made.with_row(panel)
    return made


def _now() -> list[Any]:
    return [
        figure("Power", "Now, all jobs.", "watt", (f"sum({POWER})", "power"), span=4),
        figure("Energy", "Of all jobs that are there.", "kwatth", (f"sum({ENERGY}) / 3.6e6", "energy"), span=4),
        figure("CO2e", "Of all jobs that are there; operational and embodied.", "massg", (f"sum({GRAMS})", "CO2e"),
               span=4),
        figure("CO2e in a day", "Accounted in the last 24 hours, ended and deleted jobs included.", "massg",
               ("sum(increase(trireme_carbon_grams_total[24h]))", "CO2e"), span=4),
        figure("Per million tokens", "CO2e of jobs for each million tokens they are trained on.", "massg",
               (f"sum({GRAMS}) / sum({TOKENS} and on (namespace, job) {GRAMS}) * 1e6", "g"), span=4),
        figure("Grid", "Intensity that is reckoned with, the highest of all jobs; gCO2e/kWh.", "none",
               (f"max(trireme_job_grid_grams_per_kilowatt_hour{{{IN}}})", "g/kWh"), span=4, graph=False),
    ]  # fmt: skip


def _flow() -> list[Any]:
    return [
        over_time("Power by job", "Mean of 2 minutes.", "watt", (f"sum by (namespace, job) ({POWER})", NAME),
                  span=12, stacked=True, low=0),
        over_time("Power by part", "GPUs, CPUs, memory.", "watt", (f"sum by (part) ({POWER})", "{{part}}"),
                  span=12, stacked=True, low=0),
        over_time("CO2e per hour", "Accounted by the operator, by scope; mean of 15 minutes.", "massg",
                  ("sum by (scope) (rate(trireme_carbon_grams_total[15m])) * 3600", "{{scope}}"), span=12, stacked=True,
                  low=0),
        over_time("Grid intensity", "By zone, gCO2e/kWh.", "none", (
                  f"max by (zone) (trireme_job_grid_grams_per_kilowatt_hour{{{IN}}} * on (namespace, job) "
                  f"group_left (zone) trireme_job_info{{{IN}}})", "{{zone}}"), span=12, low=0),
    ]  # fmt: skip


def _jobs() -> list[Any]:
    intensity = f"max by (namespace, job) (trireme_job_carbon_grams_per_million_tokens{{{IN}}})"
    idle = f"max by (namespace, job) (trireme_job_idle_energy_joules{{{IN}}})"
    budget = f"max by (namespace, job) (trireme_job_carbon_budget_grams{{{IN}}})"
    return [
        row("By job"),
        bars("CO2e by job", "Of all attempts, the ten highest.", "massg", (f"topk(10, {GRAMS})", NAME), span=6),
        bars("Budget used", "Share of the CO2e that the job may cause.", "percentunit", (f"{GRAMS} / {budget}", NAME),
             span=6, high=1, steps=((None, "green"), (0.75, "orange"), (0.9, "red"))),
        bars("Per million tokens", "CO2e for each million tokens, the ten highest.", "massg",
             (f"topk(10, {intensity})", NAME), span=6),
        bars("Idle", "Share of the energy used while no rank ran in the pod: waiting, starting, recovering.",
             "percentunit", (f"topk(10, {idle} / ({ENERGY} > 0))", NAME), span=6, high=1,
             steps=((None, "green"), (0.1, "orange"), (0.25, "red"))),
    ]  # fmt: skip


def _trust() -> list[Any]:
    missing = (
        (f'count(trireme_{part}_energy_joules_total{{{IN},source="missing"}}) or vector(0)', part)
        for part in ("gpu", "cpu", "dram")
    )
    return [
        row("How far to trust it"),
        over_time("Energy by source", "Weakest source in each job's sum: nvml, rapl count, declared is a model.",
                  "joule", (f"sum by (source) (max by (namespace, job, source) (trireme_job_energy_joules{{{IN}}}))",
                            "{{source}}"), span=12, stacked=True, low=0),
        over_time("Missing counters", "Pods that cannot read a part's energy: it is left out of all sums.", "none",
                  *missing, span=12, low=0),
    ]  # fmt: skip

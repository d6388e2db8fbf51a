"""Rules that users write about failures: by exit code, pod condition, or what the message and traceback say. Pure."""

from __future__ import annotations

from dataclasses import replace

from trireme_api.job import FailurePolicy, FailureRule
from trireme_api.patterns import pattern

from trireme_operator.decide.recovery import Breakdown


def ruled(policy: FailurePolicy, failure: Breakdown) -> tuple[Breakdown, FailureRule | None]:
    """The failure as the first rule that fits has it, and that rule."""
    rule = next((rule for rule in policy.rules if fits(rule, failure)), None)
    if rule is None:
        return failure, None
    changed = replace(
        failure,
        cause=rule.cause or failure.cause,
        rule=rule.name,
        charged=failure.charged and rule.counts_against_budget,
    )
    return changed, rule


def fits(rule: FailureRule, failure: Breakdown) -> bool:
    if rule.on_exit_codes and shell_code(failure.exit) not in rule.on_exit_codes:
        return False
    if rule.on_pod_conditions and not (failure.disrupted and "DisruptionTarget" in rule.on_pod_conditions):
        return False
    text = f"{failure.message}\n{failure.detail}"
    return not rule.on_log_patterns or any(pattern(one).search(text) for one in rule.on_log_patterns)


def shell_code(code: int | None) -> int | None:
    """Signals as a shell gives them: 128 + number."""
    return 128 - code if code is not None and code < 0 else code

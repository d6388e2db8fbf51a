"""The logbook tells a step log's events in sentences; what is not as this version writes it is told as it stands."""

from __future__ import annotations

from typing import Any

import pytest
from trireme_cli.report.steplog import Event
from trireme_cli.report.told import TOLD, in_words

PATH = "/c/step-00000020"
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("initialised", {"weightBytes": 13207024435, "peakBytes": 2**34},
     "rank 0 holds 12.3 GiB of weights; its memory at its fullest so far: 16.0 GiB"),
    ("resumed", {"step": 1200, "path": PATH, "tier": "storage", "worldSizeThen": 2, "verifySeconds": 0.0337,
                 "readSeconds": 0.7189},
     f"at step 1,200 from {PATH}, written by 2 ranks; verified in 0.0337 s, read in 0.719 s"),
    ("resumed", {"step": 4, "path": "memory of attempt 1", "tier": "memory", "fromPeers": 1, "worldSizeThen": 2,
                 "verifySeconds": 0.05, "moveSeconds": 0.2, "readSeconds": 0.0},
     "at step 4 from memory of attempt 1, written by 2 ranks, 1 shard from other nodes; verified in 0.05 s, moved in "
     "0.2 s"),
    ("rolled-back", {"step": 20, "spikeStep": 32, "lostSteps": 12, "path": PATH, "reason": "loss 9.1 at step 32",
                     "leftOut": [25, 33], "learningRateFactor": 0.5, "rollbacks": 1},
     f"to step 20 ({PATH}), 12 steps lost, because of step 32: loss 9.1 at step 32; batches 25 to 32 are left out, "
     "learning rate × 0.5 from now on; rollback 1"),
    ("checkpoint-abandoned", {"path": PATH, "reason": "cut short"}, f"{PATH}: cut short"),
    ("checkpoint-skipped", {"path": "", "reason": "no good one"}, "no good one"),
    ("checkpoint-failed", {"reason": "no space left"}, "no space left"),
    ("checkpoint-failed", {"tier": "memory", "reason": "no space left"}, "in memory: no space left"),
    ("memory-tier-off", {"reason": "1 GiB of memory is too little"}, "1 GiB of memory is too little"),
    ("evaluation", {"step": 100, "tasks": "path-finding", "heldOut": 12, "shots": [0, 5], "accuracy": [0.5, 0.75],
                    "answerLoss": [0.86, 0.31]},
     "after step 100; path-finding, 12 unseen tasks, 0 examples: 50.0 % of answer tokens right, 0.8600 nats each; "
     "path-finding, 12 unseen tasks, 5 examples: 75.0 % of answer tokens right, 0.3100 nats each"),
    ("evaluation", {"step": 1000, "heldOut": [{"source": "en", "language": None, "tokens": 4096, "loss": 2.3,
                                               "perplexity": 9.974, "bitsPerByte": 1.1}], "tasks": []},
     "after step 1,000; en: perplexity 9.974, 1.1000 bits per byte, 4,096 tokens"),
    ("grown", {"step": 4, "split": [0, 1], "usage": [[1.0]], "difference": 1.5e-7, "parameters": 54596, "splits": "0"},
     "after step 4 to 54,596 parameters: of each layer, expert 0, 1 was split; no logit changed by more than 1.5e-07 "
     "of the largest"),
    ("session-ended", {"megaBatches": 1, "step": 4, "growths": 0, "parameters": 37760, "flops": 359202816.0,
                       "cumulative": {"parameters": 37760.0, "flops": 359202816.0}},
     "at step 4, 1 mega-batch seen, 37,760 parameters, 3.592e+08 FLOPs in this session; cumulative: parameters 37,760, "
     "flops 3.59203e+08"),
    ("ended", {"step": 2150, "seconds": {"step": 45.04, "init": 3.0, "eval": 0.0}, "peakMemoryBytes": 362958848},
     "after step 2,150: init 3.0 s, step 45.0 s; rank 0's memory at its fullest: 346.1 MiB"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "text"), CASES, ids=[name for name, _, _ in CASES])
def test_an_event_is_a_sentence(name: str, fields: dict[str, Any], text: str) -> None:
    told = in_words(Event(name, 1, 0.0, fields))
    assert told is not None
    assert told == (TOLD[name][0], text)


def test_every_event_of_a_logbook_has_a_case() -> None:
    assert {name for name, _, _ in CASES} == set(TOLD)


@pytest.mark.parametrize("name", TOLD)
@pytest.mark.parametrize("fields", [{}, {"step": "x", "reason": ["y"], "seconds": 3, "leftOut": [1]}])
def test_an_event_of_another_version_is_told_as_it_stands(name: str, fields: dict[str, Any]) -> None:
    told = in_words(Event(name, 1, 0.0, fields))
    assert told is not None
    assert isinstance(told[1], str)


def test_what_is_not_understood_keeps_its_figures() -> None:
    told = in_words(Event("resumed", 1, 0.0, {"step": 7, "from": {"tier": "tape", "seconds": 0.123456}}))
    assert told == ("resumed", "step 7, from tier tape, seconds 0.1235")


def test_what_belongs_into_no_logbook_is_not_told() -> None:
    assert in_words(Event("collectives", 1, 0.0, {"order": ["all-gather root 17536 float32"] * 99})) is None

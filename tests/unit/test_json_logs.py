"""Logs as one JSON object a line, of operator, agent and trainer: the same fields everywhere."""

from __future__ import annotations

import io
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from operator_cases import Scene
from trireme_agent.lines import JsonLines, Lines
from trireme_agent.logs import RankLog, Stream
from trireme_agent.settings import BadSettings
from trireme_agent.settings import from_environment as agent_settings
from trireme_api.logs import JsonFormatter
from trireme_api.protocol import Env
from trireme_operator.decide.pods import Images, pod_manifest
from trireme_trainer.telemetry.heartbeat import Pulse
from trireme_trainer.telemetry.logs import log_to

AGENT = {
    Env.COORDINATOR: "https://c", Env.JOB: "j", Env.NAMESPACE: "n", Env.POD: "p", Env.POD_UID: "u",
}  # fmt: skip


@pytest.fixture
def root_logger() -> Any:
    root = logging.getLogger()
    kept, level = root.handlers[:], root.level
    yield root
    root.handlers[:] = kept
    root.setLevel(level)


def record(message: str = "said", **extra: Any) -> logging.LogRecord:
    made = logging.makeLogRecord({"name": "a.b", "levelname": "INFO", "msg": message, "created": 1_800_000_000.5})
    vars(made).update(extra)
    return made


def test_a_record_is_one_object_with_what_came_with_it() -> None:
    line = json.loads(JsonFormatter(lambda: {"rank": 2}).format(record("two\nlines", job="j", attempt=3)))
    assert line == {
        "time": "2027-01-15T08:00:00.500Z", "level": "info", "logger": "a.b", "message": "two\nlines", "rank": 2,
        "job": "j", "attempt": 3,
    }  # fmt: skip


def test_the_trainer_says_where_it_stands(tmp_path: Path, root_logger: logging.Logger) -> None:
    env = {
        Env.LOG_FORMAT: "json", Env.NAMESPACE: "n", Env.JOB: "j", Env.ATTEMPT: "4", Env.RANK: "0",
        Env.HEARTBEAT_DIR: str(tmp_path),
    }  # fmt: skip
    pulse, out = Pulse.from_environment(env, 0.0), io.StringIO()
    log_to(out, env, pulse)
    logging.getLogger("trireme_trainer").info("before")
    pulse.beat("step", step=7)
    logging.getLogger("trireme_trainer").info("after %d", 7)
    first, second = (json.loads(line) for line in out.getvalue().splitlines())
    assert (first["step"], second["step"], second["message"]) == (0, 7, "after 7")
    assert {name: second[name] for name in ("namespace", "job", "attempt", "rank")} == {
        "namespace": "n", "job": "j", "attempt": 4, "rank": 0,
    }  # fmt: skip


def test_the_trainer_stays_readable_unless_asked(root_logger: logging.Logger) -> None:
    out = io.StringIO()
    log_to(out, {Env.RANK: "1"}, Pulse.from_environment({Env.RANK: "1"}, 0.0))
    logging.getLogger("x").info("not of rank 1")
    logging.getLogger("x").warning("careful")
    assert out.getvalue().endswith(" rank 1 WARNING careful\n")
    assert len(out.getvalue().splitlines()) == 1


def stream_of(lines: Lines, tmp_path: Path, output: bytes) -> list[dict[str, Any]]:
    out = io.BytesIO()
    stream = Stream(out, lines=lines)
    read_end, write_end = os.pipe()
    log = RankLog(3, 2, read_end, stream, str(tmp_path))
    os.write(write_end, output)
    os.close(write_end)
    log.tail(5.0)
    stream.say("I am\nthe agent")
    stream.close()
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_the_agent_wraps_what_is_not_json_and_fills_in_what_is(tmp_path: Path) -> None:
    said = b'plain "text" \xff\n{"message": "m", "step": 9, "rank": 30}\n{"loss": 1}\n{broken\n'
    lines = JsonLines("n", "j")
    lines.attempt = 2
    plain, kept, other, broken, *agent = stream_of(lines, tmp_path, said)
    where = {"namespace": "n", "job": "j", "attempt": 2}
    assert plain.items() >= {**where, "rank": 3, "message": 'plain "text" \ufffd', "logger": "rank"}.items()
    assert kept == {**where, "rank": 30, "message": "m", "step": 9}
    assert other["message"] == '{"loss": 1}'
    assert broken["message"] == "{broken"
    assert [line["message"] for line in agent] == ["I am", "the agent"]
    assert all(line.items() >= {**where, "logger": "trireme_agent", "level": "info"}.items() for line in agent)
    assert (tmp_path / "rank-3.log").read_bytes().endswith(said), "files stay as the rank wrote them"


def test_the_agent_reads_the_variable() -> None:
    assert agent_settings([], AGENT).json_logs is False
    assert agent_settings([], {**AGENT, Env.LOG_FORMAT: "json"}).json_logs is True
    with pytest.raises(BadSettings, match="TRIREME_LOG_FORMAT='xml' must be text or json"):
        agent_settings([], {**AGENT, Env.LOG_FORMAT: "xml"})


@pytest.mark.parametrize("as_json", [False, True])
def test_pods_log_as_their_operator_does(as_json: bool) -> None:
    scene = Scene()
    scene.settle()
    job = scene.job
    assert job.spec is not None
    images = Images("t", "a", "https://c", "", json_logs=as_json)
    made = pod_manifest(job, job.spec, job.status.slots[0], images)
    env = {one["name"]: one.get("value") for one in made["spec"]["containers"][0]["env"]}
    assert env.get(Env.LOG_FORMAT) == ("json" if as_json else None)

"""Heartbeat ages, rank contract, settings, logs, metrics text, termination log, and the one-file bundle."""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from trireme_agent import bundle, termination
from trireme_agent.environment import rank_environment
from trireme_agent.heartbeats import Heartbeats
from trireme_agent.logs import RankLog, RotatingFile, Stream
from trireme_agent.metrics import render
from trireme_agent.settings import BadSettings, from_environment
from trireme_api.protocol import (
    Action,
    AgentState,
    Assignment,
    Cause,
    CheckpointRef,
    EnergyReading,
    Env,
    Failure,
    Progress,
    RankReport,
    Report,
)

AGENT = {
    Env.JOB: "job",
    Env.NAMESPACE: "ns",
    Env.POD: "job-0-0",
    Env.POD_UID: "uid",
    Env.COORDINATOR: "https://10.0.0.1:8443/",
    Env.HEARTBEAT_DIR: "/run/trireme",
}


# --- heartbeats -----------------------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def write(folder: Path, local_rank: int, **fields: object) -> None:
    beat = {"step": 1, "phase": "step", "time": 0.0, **fields}
    (folder / f"rank-{local_rank}.json").write_text(json.dumps(beat))


def test_a_heartbeat_ages_by_change_of_content_never_by_its_own_time(tmp_path: Path) -> None:
    clock = Clock()
    beats = Heartbeats(str(tmp_path), 2, 1, clock)
    beats.prepare()
    assert (beats.poll(), beats.age(0), beats.beat(0)) == (False, None, None)
    write(tmp_path, 0, time=9e9)
    clock.now = 10.0
    assert beats.poll()
    clock.now = 13.0
    os.utime(tmp_path / "rank-0.json", (1e9, 1e9))
    assert not beats.poll()
    assert beats.age(0) == 3.0
    write(tmp_path, 0, time=-5.0)
    assert beats.poll()
    assert beats.age(0) == 0.0
    assert beats.age(1) is None


def test_heartbeats_of_another_attempt_or_torn_ones_do_not_count(tmp_path: Path) -> None:
    beats = Heartbeats(str(tmp_path), 1, 2, Clock())
    write(tmp_path, 0, attempt=1, step=99)
    beats.poll()
    assert beats.beat(0) is None
    write(tmp_path, 0, attempt=2, step=3)
    beats.poll()
    (tmp_path / "rank-0.json").write_text('{"step": 4, "pha')
    assert beats.poll()
    beat = beats.beat(0)
    assert beat is not None
    assert beat.step == 3, "the last good one stays"
    assert len(beats.problems()) == 1
    beats.prepare()
    assert not (tmp_path / "rank-0.json").exists()


def test_what_ranks_say_is_merged(tmp_path: Path) -> None:
    beats = Heartbeats(str(tmp_path), 2, 1, Clock())
    write(tmp_path, 0, phases={"rendezvous": 5.0, "firstStep": 9.0}, checkpoint={"step": 10, "path": "a"})
    progress_told = {"step": 21, "loss": 2.0}
    write(tmp_path, 1, phases={"rendezvous": 6.0}, checkpoint={"step": 20, "path": "b"}, progress=progress_told)
    beats.poll()
    assert beats.checkpoint() == CheckpointRef(20, "b")
    progress, phases = beats.progress(), beats.phases()
    assert progress is not None
    assert (progress.step, progress.loss) == (21, 2.0)
    assert (phases.rendezvous, phases.first_step) == (6.0, None), "a phase counts when all are there"


# --- rank contract and settings -------------------------------------------------------------------------------------


def contract(inherited: dict[str, str], **fields: object) -> dict[str, str]:
    values: dict = {"node_rank": 2, "world_size": 3, "procs_per_node": 4, "master_address": "10.1.1.1", **fields}
    assignment = Assignment(attempt=6, action=Action.RUN, master_port=29406, **values)
    return rank_environment(
        inherited, assignment, 1, heartbeat_dir="/h", stop_file="/h/stop", error_file="/h/e", log_dir="/l"
    )


def test_the_rank_contract() -> None:
    env = contract({**AGENT, "PATH": "/bin", "RANK": "7", Env.TOKEN_FILE: "/t", Env.RECIPE: "{}"})
    assert {name: env[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")} == {
        "RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "12", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "2",
    }  # fmt: skip
    assert (env["MASTER_ADDR"], env["MASTER_PORT"], env[Env.ATTEMPT]) == ("10.1.1.1", "29406", "6")
    assert (env[Env.HEARTBEAT_DIR], env[Env.STOP_FILE], env[Env.LOG_DIR]) == ("/h", "/h/stop", "/l")
    assert (env["PATH"], env[Env.RECIPE], env[Env.JOB]) == ("/bin", "{}", "job")
    assert (env["TORCHELASTIC_RESTART_COUNT"], env["TORCHELASTIC_USE_AGENT_STORE"]) == ("5", "False")
    assert not {Env.TOKEN_FILE, Env.COORDINATOR, Env.COORDINATOR_CA, Env.RESUME} & set(env)


def test_resume_is_told_and_threads_are_shared_unless_the_user_says_otherwise() -> None:
    env = contract(dict(AGENT), resume=CheckpointRef(40, "/c/step-40"))
    assert json.loads(env[Env.RESUME]) == {"step": 40, "path": "/c/step-40"}
    assert int(env["OMP_NUM_THREADS"]) >= 1
    assert contract({"OMP_NUM_THREADS": "3", "PYTHONUNBUFFERED": ""})["OMP_NUM_THREADS"] == "3"
    assert "OMP_NUM_THREADS" not in contract({}, procs_per_node=1)


def test_settings_default_to_the_trainer_and_take_a_command_after_two_dashes() -> None:
    settings = from_environment([], AGENT)
    assert settings.command[1:] == ["-m", "trireme_trainer"]
    assert not settings.own_script
    assert settings.coordinator == "https://10.0.0.1:8443"
    assert (settings.metrics_port, settings.log_dir) == (9400, "/run/trireme/logs")
    settings = from_environment(["--", "python", "x.py", "--", "y"], AGENT)
    assert settings.command == ["python", "x.py", "--", "y"]
    assert settings.own_script


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({Env.COORDINATOR: ""}, Env.COORDINATOR),
        ({Env.COORDINATOR: "http://10.0.0.1"}, Env.COORDINATOR),
        ({Env.JOB: ""}, Env.JOB),
        ({Env.AGENT_METRICS_PORT: "99999"}, Env.AGENT_METRICS_PORT),
        ({Env.AGENT_METRICS_PORT: "-1"}, Env.AGENT_METRICS_PORT),
        ({Env.CPU_WATTS_PER_CORE: "lots"}, Env.CPU_WATTS_PER_CORE),
        ({Env.AGENT_PATIENCE_SECONDS: "nan"}, Env.AGENT_PATIENCE_SECONDS),
    ],
)
def test_bad_settings_name_the_variable(change: dict[str, str], names: str) -> None:
    with pytest.raises(BadSettings, match=names):
        from_environment([], {**AGENT, **change})
    with pytest.raises(BadSettings, match="--"):
        from_environment(["--help-me"], AGENT)


# --- logs -----------------------------------------------------------------------------------------------------------


def test_files_rotate_and_stay_bounded(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "rank-0.log"
    file = RotatingFile(str(path), limit=1000)
    for i in range(500):
        file.write(b"line %04d\n" % i)
    file.close()
    old = Path(str(path) + ".1")
    assert path.stat().st_size <= 1000
    assert old.stat().st_size <= 1000
    assert (old.read_bytes() + path.read_bytes()).endswith(b"line 0499\n")
    assert sorted(p.name for p in path.parent.iterdir()) == ["rank-0.log", "rank-0.log.1"]


def test_a_log_folder_that_cannot_be_made_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    RotatingFile(str(tmp_path / "file" / "rank-0.log")).write(b"x")


def collect(tmp_path: Path, *chunks: bytes) -> tuple[list[str], list[str]]:
    out = io.BytesIO()
    stream = Stream(out)
    read_end, write_end = os.pipe()
    log = RankLog(3, 1, read_end, stream, str(tmp_path))
    for chunk in chunks:
        os.write(write_end, chunk)
    os.close(write_end)
    tail = log.tail(5.0)
    stream.close()
    return tail, out.getvalue().decode(errors="replace").splitlines()


def test_lines_are_prefixed_whole_whatever_the_pieces(tmp_path: Path) -> None:
    tail, shown = collect(tmp_path, b"he", b"llo\nwor", b"ld\n\nend \xff")
    assert tail == ["hello", "world", "", "end \ufffd"]
    assert shown == ["[rank 3] hello", "[rank 3] world", "[rank 3] ", "[rank 3] end \ufffd"]
    assert (tmp_path / "rank-3.log").read_bytes() == b"--- attempt 1 ---\nhello\nworld\n\nend \xff"


def test_progress_bars_become_their_last_state_and_endless_lines_are_cut(tmp_path: Path) -> None:
    tail, _ = collect(tmp_path, b"1%\r2%\r", b"99%\r", b"100%\n", b"x" * 40_000)
    assert tail[-4] == "100%"
    assert len(tail) <= 5
    assert [len(line) for line in tail[-3:]] == [16384, 16384, 40_000 - 2 * 16384]


def test_the_tail_is_bounded(tmp_path: Path) -> None:
    tail, _ = collect(tmp_path, *(b"%d\n" % i for i in range(1000)))
    assert (len(tail), tail[-1]) == (400, "999")


# --- metrics and last words -----------------------------------------------------------------------------------------


def report() -> Report:
    return Report(
        "uid", 3, AgentState.RUNNING,
        ranks=[RankReport(0, pid=10, step=7, heartbeat_age=0.5), RankReport(1, pid=11, exit=-9)],
        energy={"cpu": EnergyReading(12.5, "declared"), "gpu": EnergyReading(None, "missing")},
    )  # fmt: skip


def test_the_metrics_text_parses_and_a_missing_source_is_nan_not_zero() -> None:
    families = {f.name: f for f in text_string_to_metric_families(render(report(), 1.5, 2))}
    states = {s.labels["state"]: s.value for s in families["trireme_agent_state"].samples}
    assert states == {"waiting": 0, "starting": 0, "running": 1, "stopping": 0, "exited": 0}
    cpu = families["trireme_cpu_energy_joules"]
    assert (cpu.type, cpu.samples[0].labels, cpu.samples[0].value) == ("counter", {"source": "declared"}, 12.5)
    gpu = families["trireme_gpu_energy_joules"].samples[0]
    assert gpu.labels == {"source": "missing"}
    assert gpu.value != gpu.value
    assert {s.labels["local_rank"]: s.value for s in families["trireme_agent_rank_up"].samples} == {"0": 1, "1": 0}
    assert all(family.documentation for family in families.values())
    assert render(None, 0.0, 0) == ""


@pytest.mark.parametrize("text", ["x" * 5000, "ü" * 5000, '"\n\\' * 3000, ""])
def test_last_words_fit_and_keep_the_end(text: str) -> None:
    failure = Failure(Cause.OOM, text + "the reason", rank=3, exit=-9, traceback=text + "the end")
    content = termination.render(
        attempt=2, state=AgentState.EXITED, exit_code=137, failure=failure, progress=Progress(step=5),
        checkpoint=CheckpointRef(4, "/c"),
    )  # fmt: skip
    assert len(content) <= 4096
    body = json.loads(content)
    assert (body["exit"], body["step"], body["failure"]["cause"]) == (137, 5, "oom")
    assert body["failure"]["message"].endswith("the reason")
    if not text:
        assert body["failure"]["traceback"] == "the end"


# --- the bundle -----------------------------------------------------------------------------------------------------


def test_the_bundle_is_the_same_bytes_every_time_and_everywhere(tmp_path: Path) -> None:
    first = bundle.build()
    for path in (Path(bundle.__file__).parent / "agent.py", Path(bundle.__file__).parent / "link.py"):
        os.utime(path)
    assert bundle.build() == first
    with zipfile.ZipFile(io.BytesIO(first)) as archive:
        names = archive.namelist()
        assert names == sorted(names)
        assert {info.date_time for info in archive.infolist()} == {bundle.EPOCH}
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}


def test_the_bundle_holds_the_agent_and_what_it_imports_and_nothing_else() -> None:
    with zipfile.ZipFile(io.BytesIO(bundle.build())) as archive:
        names = set(archive.namelist())
        sources = {name: archive.read(name).decode() for name in names}
    assert {name.split("/")[0] for name in names} == {"__main__.py", "trireme_agent", "trireme_api"}
    assert "trireme_agent/bundle.py" not in names
    modules = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in names}
    for name, source in sources.items():
        for imported in _imports(source):
            top = imported.partition(".")[0]
            assert top in sys.stdlib_module_names or imported in modules, f"{name} imports {imported}"


def _imports(source: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(source, feature_version=(3, 9))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_the_bundle_runs_alone(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "agent.pyz"
    assert bundle.main([str(out)]) == 0
    assert os.access(out, os.X_OK)
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(out)], env={}, capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 64
    assert "TRIREME_COORDINATOR is not set" in done.stderr
    assert bundle.main([]) == 64
    assert bundle.main([str(tmp_path / "deep" / "agent.pyz" / "x")]) == 74

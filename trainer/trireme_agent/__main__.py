"""`python -m trireme_agent [-- command …]`, or the zipapp: PID 1 of a training pod."""

from __future__ import annotations

import os
import sys
from typing import Optional, Sequence

from trireme_api.protocol import AgentState, Cause, ExitCode, Failure

from trireme_agent import processes, termination
from trireme_agent.agent import Agent, folder_writable
from trireme_agent.lines import JsonLines
from trireme_agent.link import tls_context, token_readable
from trireme_agent.logs import Stream
from trireme_agent.settings import DEFAULT_TERMINATION_LOG, BadSettings, from_environment

STOP_WITH_PARENT = "TRIREME_AGENT_STOP_WITH_PARENT"
"""1: whoever started the agent is a person's shell; when it dies, save and stop."""


def main(arguments: Optional[Sequence[str]] = None) -> int:
    if os.environ.pop(STOP_WITH_PARENT, "") == "1":
        processes.die_with_parent()
    try:
        settings = from_environment(sys.argv[1:] if arguments is None else arguments, os.environ)
        problem = folder_writable(settings)
        if problem:
            raise BadSettings(problem)
        token_readable(settings)
        if settings.coordinator.startswith("https:"):
            tls_context(settings.coordinator_ca)
    except BadSettings as error:
        return _refuse(str(error))
    stream = Stream(lines=JsonLines(settings.namespace, settings.job) if settings.json_logs else None)
    try:
        return Agent(settings, stream).run()
    finally:
        stream.close()


def _refuse(message: str) -> int:
    print(f"[agent] {message}", file=sys.stderr, flush=True)
    failure = Failure(Cause.USER_ERROR, message, exit=int(ExitCode.BAD_RECIPE))
    path = os.environ.get("TRIREME_TERMINATION_LOG") or DEFAULT_TERMINATION_LOG
    termination.write(
        path, termination.render(attempt=0, state=AgentState.EXITED, exit_code=failure.exit, failure=failure)
    )
    return int(ExitCode.BAD_RECIPE)


if __name__ == "__main__":
    sys.exit(main())

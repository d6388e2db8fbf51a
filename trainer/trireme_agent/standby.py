"""Runs in a standby process: imports the trainer, waits, and becomes a rank when its environment arrives.

Started as `python -c <this source> <control fd> <module to import> <module to run>`: it imports nothing of the agent.
"""

import importlib
import json
import os
import runpy
import sys


def main() -> None:
    control, to_import, to_run = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    importlib.import_module(to_import)
    with os.fdopen(control, "rb") as pipe:
        line = pipe.readline()
    if not line:
        return  # the agent is gone
    os.environ.clear()
    os.environ.update(json.loads(line))
    sys.argv = [to_run]
    runpy.run_module(to_run, run_name="__main__", alter_sys=True)


main()

"""Warm start: one process per local rank that has the trainer imported and waits to take over.

Importing torch is most of the time between a restart and its first collective. It costs the memory of one more
interpreter with torch per rank, hence an option.
"""

from __future__ import annotations

import json
import os
import pkgutil
import subprocess
from typing import Dict, List, Optional

from trireme_api.protocol import clean_text

from trireme_agent.environment import base_environment
from trireme_agent.settings import TRAINER_MODULE, Settings
from trireme_agent.supervisor import Supervisor

TO_IMPORT = TRAINER_MODULE + ".train"


class StandbyProcess:
    def __init__(self, settings: Settings, ranks: int) -> None:
        """Raises OSError."""
        source = pkgutil.get_data("trireme_agent", "standby.py")
        if source is None:
            raise OSError("standby.py is not in the bundle")
        self.output, output = os.pipe()
        control, self._control = os.pipe()
        try:
            process = subprocess.Popen(
                [settings.command[0], "-c", source.decode(), str(control), TO_IMPORT, TRAINER_MODULE],
                env=base_environment(settings.environment, ranks), stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True, pass_fds=(control,),
            )
        except OSError:
            os.close(self.output)
            os.close(self._control)
            raise
        finally:
            os.close(output)
            os.close(control)
        process.returncode = 0
        self.pid = process.pid

    def wake(self, environment: Dict[str, str]) -> None:
        """Raises OSError when the process is gone."""
        os.set_blocking(self._control, True)
        data = json.dumps(environment).encode() + b"\n"
        try:
            while data:
                data = data[os.write(self._control, data) :]
        finally:
            os.close(self._control)

    def discard(self) -> None:
        """It sees the end of its control pipe and leaves."""
        os.close(self._control)
        os.close(self.output)


class WarmPool:
    """At most one standby per local rank. Only for the trainer: an own script may do anything while it is imported."""

    def __init__(self, settings: Settings, supervisor: Supervisor) -> None:
        self._settings, self._supervisor = settings, supervisor
        self._ready: List[StandbyProcess] = []
        self.enabled = settings.warm_start and not settings.own_script
        self.problem = ""

    def refill(self, ranks: int) -> None:
        if not self.enabled:
            return
        for standby in [s for s in self._ready if not self._supervisor.keeps(s.pid)]:
            # It died while importing; once is enough to know that it does not work here.
            self.problem = clean_text(os.read(standby.output, 65536).decode("utf-8", "replace"))
            self._ready.remove(standby)
            standby.discard()
            self.enabled = False
        while self.enabled and len(self._ready) < ranks:
            try:
                standby = StandbyProcess(self._settings, ranks)
            except OSError as error:
                self.enabled, self.problem = False, str(error)
                return
            self._supervisor.keep(standby.pid)
            self._ready.append(standby)

    def take(self) -> Optional[StandbyProcess]:
        while self._ready:
            standby = self._ready.pop(0)
            if self._supervisor.keeps(standby.pid):
                return standby
            standby.discard()
        return None

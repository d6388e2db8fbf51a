"""`python -m trireme_trainer`: one rank, configured by its environment (protocol.Env), that answers by exit code."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from typing import NoReturn

from trireme_api.families import check_recipe
from trireme_api.schema import InvalidSpec

from trireme_trainer.lifecycle.hang import answer_with_stacks
from trireme_trainer.lifecycle.outcome import BadRecipe, TrainingEnd
from trireme_trainer.lifecycle.parent import end_with_parent
from trireme_trainer.settings import Settings
from trireme_trainer.telemetry.heartbeat import Pulse, process_start
from trireme_trainer.telemetry.logs import log_to

log = logging.getLogger("trireme_trainer")
RUNTIME = {
    # FSDP allocates and frees in changing sizes; without this the CUDA allocator fragments.
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    # Where ranks share cores, threads that spin for their peers starve them: 11 times slower, measured on 2 cores.
    "OMP_WAIT_POLICY": "PASSIVE",
    # torch's flight recorder: the last collectives, for the record that is written when the gang hangs. Without stacks
    # of its own, for taking them can wait for an interpreter lock that a hanging thread holds.
    "TORCH_FR_BUFFER_SIZE": "2000",
    "TORCH_INCLUDE_STACK_TRACE": "0",
}
"""Read by libraries when torch loads them; the environment wins."""


def main() -> int:
    started = process_start()
    end_with_parent()
    pulse = Pulse.from_environment(os.environ, started)
    log_to(sys.stdout, os.environ, pulse)
    pulse.answers(answer_with_stacks(os.environ))
    try:
        settings = Settings.from_environment()
        # Before torch is imported: a recipe that cannot work is refused within a second.
        check_recipe(settings.recipe)
        settings.recipe.parallelism.check_ranks(settings.world_size)
        for name, value in RUNTIME.items():
            os.environ.setdefault(name, value)
        from trireme_trainer.train import train

        pulse.reached("imported")
        return train(settings, pulse)
    except (TrainingEnd, InvalidSpec) as error:
        end = error if isinstance(error, TrainingEnd) else BadRecipe(str(error))
        return _end(pulse, end)
    except Exception as error:
        from trireme_trainer.lifecycle.failures import classify

        return _end(pulse, classify(error), traceback.format_exc())


def _end(pulse: Pulse, end: TrainingEnd, trace: str | None = None) -> int:
    """Says it three times, for the agent, the log and a person, before the process goes."""
    if trace:
        print(trace, file=sys.stderr, flush=True)
    log.error("%s", end)
    pulse.fail(end.cause, str(end), exit_code=end.code, traceback=trace)
    return end.code


def run() -> NoReturn:
    """Ends this process with the exit code that tells what happened."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not through the interpreter's own end, which threads of gloo, or of a save whose peer is gone, can block for ever.
    os._exit(code)


if __name__ == "__main__":
    run()

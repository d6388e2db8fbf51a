"""What a run will need and cost, before anything is spent. Pure arithmetic; docs/plan.md explains it.

    setting      a recipe on a number of devices: who holds what, how often
    traffic      bytes that travel in a step
    speed        seconds of a step: a model with two numbers per kind of device
    published    runs of others, which these numbers were fitted to
    costs        energy and carbon, checkpoints, failures
    fitting      other ways to spread the same recipe, and what would fit
    report       all of it together
"""

from trireme_api.planning.report import Plan as Plan
from trireme_api.planning.report import make as make
from trireme_api.planning.setting import Setting as Setting

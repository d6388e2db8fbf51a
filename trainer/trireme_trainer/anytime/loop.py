"""A stream from its first mega-batch to its last: train or wait, then answer the whole test set (2106.09563)."""

from __future__ import annotations

import torch

from trireme_trainer.anytime.learners import Learner
from trireme_trainer.anytime.metrics import Course, Moment
from trireme_trainer.anytime.session import Data, Fit
from trireme_trainer.anytime.stream import Plan, stream


def run(learner: Learner, data: Data, test: Data, plan: Plan, fit: Fit, seed: int = 0) -> Course:
    """While the learner waits, the model before serves; at the start, one that was never trained."""
    moments = []
    for session in stream(len(data), plan, seed):
        spent = 0.0
        if session is not None:
            parts = [data.rows(torch.from_numpy(rows)) for rows in (session.train, session.validation)]
            spent = learner.train(session.number, *parts)
        errors = fit.errors(learner.scores(test.inputs), test.targets)
        moments.append(Moment(errors, learner.parameters, spent))
    return Course(moments, test.targets.numel())

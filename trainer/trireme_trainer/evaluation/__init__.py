"""What a language model is worth: perplexity of held-out text, and tasks answered by log-likelihood."""

from trireme_trainer.evaluation.errors import EvaluationError

__all__ = ["EvaluationError"]

from trireme_trainer.data.errors import DataError


class EvaluationError(DataError):
    """What cannot be evaluated; the text names the file, the field and the remedy."""

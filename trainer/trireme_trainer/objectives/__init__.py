"""What is learned: from a model and a micro-batch to a loss already divided by the whole step's valid tokens."""

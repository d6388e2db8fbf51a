"""What is learned: from a model and a micro-batch to a loss that is already divided by the whole step's valid tokens."""

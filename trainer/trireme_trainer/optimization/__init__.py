"""What a step does to the weights: AdamW, the learning rate, the loss scale, and steps that do not count."""

"""The chaos suite: breaks a training job in every way there is, and measures how it comes back. See docs/chaos.md."""

"""How a rank ends: asked to stop, failed, hung, or without the process that started it."""

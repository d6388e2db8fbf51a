"""How a model is spread over ranks. The models know nothing of it."""

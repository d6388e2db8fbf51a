"""Pieces that families combine. They know nothing of how they are spread over devices."""

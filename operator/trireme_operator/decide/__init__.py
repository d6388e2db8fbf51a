"""What should be: pure functions of (job, what is observed, now), from `reconcile` down.

No I/O, no clock, no randomness: tests/unit/test_house.py holds it.
"""

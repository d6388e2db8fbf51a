"""Whether every figure of a job agrees with every other, and with what was measured beside it: docs/monitoring.md."""

"""PID 1 of every training pod: supervises the local ranks. Standard library only."""

"""The control plane: turns TrainingJobs into gangs of pods. Never imports torch."""

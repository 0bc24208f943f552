"""Training a classifier: losses, the optimizer, schedules, checkpoints of a run."""

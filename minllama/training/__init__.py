"""Train classifiers: losses, the optimizer, schedules, checkpoints of a run."""

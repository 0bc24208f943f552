"""Faster implementations of the model's operations, for CPUs (`cpu`) and GPUs (`gpu`)."""

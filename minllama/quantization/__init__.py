"""Quantized and half-precision weights, and the modules that multiply with them."""

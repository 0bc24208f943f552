"""Weights in fewer bits, and what multiplies with them."""

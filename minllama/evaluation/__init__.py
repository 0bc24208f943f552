"""Metrics of predictions, their intervals, comparisons, baselines and reports."""

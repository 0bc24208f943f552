"""Metrics of predictions, confidence intervals, comparisons, baselines and reports."""

"""Predictions and their metrics, for people to look at: a page, files, a summary in the terminal.

Takes plain values. Knows nothing of models, and nothing of how predictions are made.
"""

from minllama.evaluation.report.content import Report, ReportedSplit, ReportedValues
from minllama.evaluation.report.files import write_report
from minllama.evaluation.report.terminal import print_summary

__all__ = ["Report", "ReportedSplit", "ReportedValues", "print_summary", "write_report"]

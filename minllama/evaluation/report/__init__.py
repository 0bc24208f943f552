"""Reports of predictions and metrics: an HTML page, JSON files, a summary in the terminal."""

from minllama.evaluation.report.content import Report, ReportedSplit, ReportedValues
from minllama.evaluation.report.files import write_report
from minllama.evaluation.report.terminal import print_summary

__all__ = ["Report", "ReportedSplit", "ReportedValues", "print_summary", "write_report"]

"""Measure how fast a model runs on this machine; `minllama bench` prints it.

`measurements` are rates of one kind of work each, which the repository's own comparison with its
peers (`benchmarks/`) uses as well; `run` interleaves them; `results` keeps them with the
machine and compares two runs; `table` shows them.
"""

from minllama.benchmark.results import BenchmarkResult, Measurement, read_result
from minllama.benchmark.run import run_benchmark

__all__ = ["BenchmarkResult", "Measurement", "read_result", "run_benchmark"]

"""Plan what fits before it is tried: memory of a method, time and cost of a job.

`minllama plan` calls it with a config, whose weights need not exist. The formulas are those of the
tensors that training allocates; `tests/planning` compares them with measured peaks.
"""

from minllama.planning.job import JobPlan, plan_job
from minllama.planning.memory import Memory, most_texts, plan_memory

__all__ = ["JobPlan", "Memory", "most_texts", "plan_job", "plan_memory"]

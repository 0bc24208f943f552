"""`--method auto`: a ladder of ways to get a classifier, each measured, in a given time.

`climb` tries the rungs (`tfidf`, `zero_shot`, `frozen`, `lora`) one after the other; `scoring` says
how good each is on rows that it was not fitted to, `choice` which is taken, `budget` what time is
left; `state` and `candidate` keep what a resumed run needs.
"""

from minllama.experiment.ladder.run import Climbed, run_ladder

__all__ = ["Climbed", "run_ladder"]

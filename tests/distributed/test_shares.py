"""How the texts of a step are divided among processes."""

import random

import pytest

from minllama.options import TrainingOptions
from minllama.training.schedule import Schedule

LENGTHS = [random.Random(0).randint(1, 40) for _ in range(1)] + [
    random.Random(i).randint(1, 40) for i in range(1, 47)
]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_each_text_of_a_step_is_in_one_share(size: int, accumulation: int) -> None:
    options = TrainingOptions(batch_size=6, gradient_accumulation=accumulation, epochs=2)
    schedule = Schedule(LENGTHS, options, max_tokens=60)
    alone = Schedule(LENGTHS, options, max_tokens=60)
    seen = []
    for step in range(1, schedule.total_steps + 1):
        shares = schedule.shares(step, size)
        assert len(shares) == size
        # As many forward and backward passes for all, or some would wait forever.
        assert len({len(share) for share in shares}) == 1
        texts = [text for share in shares for batch in share for text in batch]
        assert sorted(texts) == sorted(t for batch in alone.batches(step) for t in batch)
        assert sorted(texts) == sorted(schedule.texts(step))
        for batch in (batch for share in shares for batch in share if len(batch) > 1):
            assert len(batch) * max(LENGTHS[text] for text in batch) <= 60
        seen += texts
    assert sorted(seen) == sorted([*range(len(LENGTHS))] * 2)


def test_shares_of_a_batch_differ_by_one_text_at_most() -> None:
    schedule = Schedule([5] * 45, TrainingOptions(batch_size=8, epochs=1))
    for step in range(1, schedule.total_steps + 1):
        counts = [sum(map(len, share)) for share in schedule.shares(step, 3)]
        assert max(counts) - min(counts) <= 1

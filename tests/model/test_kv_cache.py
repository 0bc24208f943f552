"""The cache's bookkeeping; what it is for is tested with the model."""

import pytest
import torch

from minllama.errors import MinllamaError
from minllama.model.config import LlamaConfig
from minllama.model.kv_cache import KVCache

CONFIG = LlamaConfig(dim=8, n_layers=2, n_heads=2, vocab_size=3)


def filled(lengths, capacity=6):
    """A cache whose slot s of row b in layer i holds 100 i + 10 b + s + 1."""
    cache = KVCache(CONFIG, len(lengths), capacity)
    for layer in range(2):
        for row, length in enumerate(lengths):
            for slot in range(length):
                cache.keys[layer][row, :, slot] = 100 * layer + 10 * row + slot + 1
                cache.values[layer][row, :, slot] = -(100 * layer + 10 * row + slot + 1)
    cache.lengths = list(lengths)
    return cache


def first_channel(cache, layer=1):
    return [
        cache.keys[layer][row, 0, :length, 0].tolist() for row, length in enumerate(cache.lengths)
    ]


def test_rows_of_one_length_are_written_behind_their_end():
    cache = filled([2, 2])
    new = torch.full((2, 2, 3, 4), 7.0)
    keys, values = cache.update(1, new, -new, torch.arange(2, 5).unsqueeze(0))
    assert keys.shape == (2, 2, 5, 4)
    assert keys[1, 0, :, 0].tolist() == [111, 112, 7, 7, 7]
    assert values[0, 1, :, 3].tolist() == [-101, -102, -7, -7, -7]
    assert cache.keys[0][:, :, 2:].abs().sum() == 0
    cache.advance([3, 1])
    assert cache.lengths == [5, 3]


def test_rows_of_different_lengths_are_written_each_behind_its_own_end():
    cache = filled([3, 1])
    new = torch.tensor([7.0, 8.0]).view(2, 1, 1, 1).expand(2, 2, 1, 4)
    keys, _ = cache.update(1, new, new, torch.tensor([[3], [1]]))
    assert keys[0, 0, :, 0].tolist() == [101, 102, 103, 7]
    assert keys[1, 1, :, 2].tolist() == [111, 8, 0, 0]


@pytest.mark.parametrize("lengths", [[2, 2], [2, 1]])
def test_a_cache_in_halves_takes_and_gives_the_models_numbers(lengths):
    cache = KVCache(CONFIG, 2, 6, dtype=torch.float16)
    cache.lengths = lengths
    new = torch.full((2, 2, 1, 4), 1 / 3)
    positions = torch.tensor(lengths).unsqueeze(-1)
    keys, values = cache.update(1, new, -new, positions)
    assert keys.dtype == values.dtype == torch.float32
    assert keys[1, 0, lengths[1], 0] == torch.tensor(1 / 3).half().float()
    assert cache.keys[1].dtype == torch.float16


def test_a_dropped_row_is_replaced_by_the_last():
    cache = filled([2, 3, 1])
    cache.drop_row(0)
    assert cache.lengths == [1, 3]
    assert first_channel(cache) == [[121], [111, 112, 113]]
    cache.drop_row(1)
    assert first_channel(cache) == [[121]]


def test_repeated_rows_stand_side_by_side_in_a_larger_cache():
    copy = filled([2, 1], capacity=2).repeated(2, capacity=5)
    assert copy.lengths == [2, 2, 1, 1]
    assert first_channel(copy) == [[101, 102], [101, 102], [111], [111]]
    assert copy.keys[0].shape == (4, 2, 5, 4)
    copy.reserve(3)


def test_truncate_forgets_what_lies_beyond():
    cache = filled([4, 2])
    cache.truncate(3)
    assert cache.lengths == [3, 2]


def test_truncate_takes_a_length_for_each_row():
    cache = filled([4, 2])
    cache.truncate([1, 5])
    assert cache.lengths == [1, 2]


@pytest.mark.parametrize("lengths", [-1, [-1, 0], [1], [1, 1, 1]])
def test_lengths_that_no_cache_has_are_refused(lengths):
    cache = filled([4, 2])
    with pytest.raises(
        MinllamaError, match="of 2 sequences must be truncated to as many lengths >= 0"
    ):
        cache.truncate(lengths)
    assert cache.lengths == [4, 2]


def test_what_grew_in_inference_can_be_written_to_outside_of_it():
    with torch.inference_mode():
        cache = filled([2, 1], capacity=2)
        cache.grow(7)
        copy = cache.repeated(2, 8)
    for tensor in (*cache.keys, *cache.values, *copy.keys, *copy.values):
        assert not tensor.is_inference()


def test_a_cache_grows_and_keeps_what_it_holds():
    cache = filled([2, 1], capacity=2)
    cache.grow(7)
    assert first_channel(cache) == [[101, 102], [111]]
    cache.reserve(5)
    cache.grow(3)
    assert cache.capacity == 7


def test_a_growth_that_fails_changes_nothing(monkeypatch):
    cache = KVCache(CONFIG, 1, 4)
    copied, calls = KVCache._copied, []

    def fails(self, *args):
        calls.append(1)
        if len(calls) > CONFIG.n_layers:  # the keys are there, the values are not
            raise MemoryError
        return copied(self, *args)

    monkeypatch.setattr(KVCache, "_copied", fails)
    with pytest.raises(MemoryError):
        cache.grow(8)
    assert {stored.shape[2] for stored in (*cache.keys, *cache.values)} == {cache.capacity} == {4}


def test_more_than_the_capacity_is_refused():
    with pytest.raises(
        MinllamaError, match="room for 6 tokens per sequence: 4 are filled, and 3 more"
    ):
        filled([4, 2]).reserve(3)

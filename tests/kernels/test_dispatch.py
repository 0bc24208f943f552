"""Each registered kernel computes what the body of its operation does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from minllama.generation import sampling
from minllama.kernels import dispatch
from minllama.kernels.cpu.library import best_level, library
from minllama.kernels.dispatch import accelerated, register, registered
from minllama.lora import layer
from minllama.model import llama, rope
from minllama.model.attention_layout import PackedSequences
from minllama.options import SamplingOptions
from minllama.training import optimizer

OPERATIONS: dict[str, Any] = {
    "rms_norm": llama.rms_norm,
    "swiglu": llama.swiglu,
    "linear": llama.linear,
    "attention": llama.attention,
    "apply_rotary_embedding": rope.apply_rotary_embedding,
    "low_rank": layer.low_rank,
    "add_low_rank": layer.add_low_rank,
    "adamw_update": optimizer.adamw_update,
    "draw_tokens": sampling.draw_tokens,
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def arguments(name: str, dtype: torch.dtype) -> list[list[Any]]:
    """Some arguments of an operation, in the dtype where it is given."""
    x, weight = numbers(2, 5, 24).to(dtype), numbers(24).to(dtype)
    queries, keys = numbers(1, 4, 7, 8).to(dtype), numbers(1, 2, 7, 8).to(dtype)
    expand, compact = torch.tensor([0, 1, 2, 0, 1, 3, 4, 5, 6]), torch.tensor([0, 1, 2, 5, 6, 7, 8])
    packed = PackedSequences(torch.tensor([0, 3, 7]), 4)
    shared = PackedSequences(torch.tensor([0, 3, 9]), 6, expand, compact)
    a, b = numbers(3, 24), numbers(10, 3)
    of_one = [numbers(4, 6), numbers(5)]
    moments = [x.abs() for x in of_one]
    return {
        "rms_norm": [[x, weight, 1e-5]],
        "swiglu": [[x, 0.5 * x]],
        "linear": [[x, numbers(9, 24).to(dtype)], [x, numbers(9, 24).to(dtype), weight[:9]]],
        "attention": [
            [queries, keys, 2 * keys, None, True],
            [queries, keys, 2 * keys, None, True, packed],
            [queries, keys, 2 * keys, None, True, shared],
        ],
        "apply_rotary_embedding": [
            [numbers(2, 5, 3, 8).to(dtype), torch.polar(torch.ones(5, 1, 4), numbers(5, 1, 4))]
        ],
        "draw_tokens": [
            [numbers(3, 700), SamplingOptions(temperature=0.7, **kept), [0.1, 0.6, 0.95]]
            for kept in ({}, {"top_p": 0.8}, {"min_p": 0.1})
        ],
        "low_rank": [[x, a, b, 0.5]],
        "add_low_rank": [[numbers(2, 5, 10).to(dtype), x, a, b, 0.5]],
        "adamw_update": [[of_one, of_one, of_one, moments, (0.9, 0.99), 1e-6, 0.1, 0.98]],
    }[name]


def copied(values: list[Any]) -> list[Any]:
    def copy(value: Any) -> Any:
        if isinstance(value, list):
            return [copy(each) for each in value]
        return value.clone() if isinstance(value, torch.Tensor) else value

    return [copy(value) for value in values]


def result(compute: Callable[..., Any], values: list[Any]) -> list[torch.Tensor]:
    """What an operation gives, or what it wrote to."""
    values = copied(values)
    found = compute(*values)
    if found is not None:
        return [found]
    return [tensor for value in values if isinstance(value, list) for tensor in value]


def test_every_operation_with_kernels_is_tried_here() -> None:
    dispatch.load_backends()
    assert set(dispatch._registered) >= set(OPERATIONS)
    unknown = {name for name, ways in dispatch._registered.items() if ways} - set(OPERATIONS)
    assert not unknown - {"of_this_test"}


@pytest.mark.skipif(library() is None, reason="minllama was installed without a C++ compiler")
@pytest.mark.parametrize("level", range(best_level() + 1))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_kernel_computes_what_the_reference_does(
    name: str, dtype: torch.dtype, level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minllama.kernels.cpu.library.best_level", lambda: level)
    for values in arguments(name, dtype):
        ways = [way for way in registered(name) if way.supports(*copied(values))]
        assert ways or name == "linear", values
        expected = result(OPERATIONS[name].reference, values)
        for compute in (*(way.compute for way in ways), OPERATIONS[name]):
            for ours, theirs in zip(result(compute, values), expected, strict=True):
                assert ours.dtype == theirs.dtype
                atol = TOLERANCES[dtype] * max(1.0, float(theirs.abs().max()))
                torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def test_the_first_way_that_supports_the_arguments_is_taken() -> None:
    @accelerated
    def of_this_test(x: int) -> str:
        return "reference"

    register("of_this_test", lambda x: x > 10, lambda x: "first")
    register("of_this_test", lambda x: x > 5, lambda x: "second")
    assert [of_this_test(x) for x in (1, 7, 11)] == ["reference", "second", "first"]
    assert of_this_test.reference(11) == "reference"

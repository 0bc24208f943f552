"""Memory that is planned, beside what training allocates and what the system counts."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from minllama.engine.states import pooled_states
from minllama.kernels.cpu.library import library
from minllama.kernels.hardware import fast_bfloat16
from minllama.lora import add_lora_wrapper
from minllama.model.config import LlamaConfig
from minllama.model.llama import Llama
from minllama.options.planning import PlanOptions
from minllama.planning import most_texts, plan_memory
from minllama.planning.memory import kept_per_token
from minllama.planning.parameters import all_parameters, trained_parameters
from minllama.quantization.modules import QuantizedWeight

PROGRAM = Path(__file__).with_name("measured_peak.py")
CONFIG = LlamaConfig(
    dim=64, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=176, vocab_size=128
)
# 88 million parameters in two matrices of words and 12 layers; 61 million with tied words.
WIDE = {
    "dim": 768,
    "n_layers": 12,
    "n_heads": 12,
    "n_kv_heads": 4,
    "hidden_dim": 2048,
    "vocab_size": 8192,
    "max_seq_len": 1024,
}
DEEP = {
    "dim": 512,
    "n_layers": 18,
    "n_heads": 8,
    "n_kv_heads": 8,
    "hidden_dim": 1408,
    "vocab_size": 16384,
    "max_seq_len": 1024,
    "tie_embeddings": True,
}

needs_kernels = pytest.mark.skipif(library() is None, reason="the plan is of compiled code")
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists() or platform.libc_ver()[0] != "glibc",
    reason="peaks are read from Linux's /proc, with glibc's malloc",
)


def saved_bytes(config: LlamaConfig, method: str, dtype: torch.dtype, autocast: bool) -> int:
    """Bytes that autograd keeps in a forward pass over 3 x 32 tokens, weights left out."""
    torch.manual_seed(0)
    llama = Llama(config).to(dtype)
    llama.requires_grad_(method == "full")
    if method == "lora":
        add_lora_wrapper(llama, r=8)
    llama.train()
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    ids = torch.randint(0, config.vocab_size, (3, 32))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        pooled_states(llama, ids, None, config.n_layers, "mean")
    matrices = {tuple(p.shape) for p in llama.parameters() if p.dim() == 2}
    own = {p.untyped_storage().data_ptr() for p in llama.parameters()}
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in kept
        # Neither weights nor their copies in bfloat16, which are transposed.
        if tuple(tensor.shape) not in matrices and tuple(tensor.shape[::-1]) not in matrices
    }
    return sum(size for place, size in storages.items() if place not in own)


@needs_kernels
@pytest.mark.parametrize(
    ("method", "dtype", "autocast"),
    [
        ("lora", "bfloat16", False),
        ("lora", "float32", False),
        ("lora", "float32", True),
        ("full", "float32", False),
        ("full", "float32", True),
    ],
)
def test_a_layer_keeps_what_is_planned_byte_for_byte(
    method: str, dtype: str, autocast: bool
) -> None:
    options = PlanOptions(device="cpu", dtype=dtype, no_autocast=not autocast)
    precision = getattr(torch, dtype)
    more = saved_bytes(CONFIG.replace(n_layers=4), method, precision, autocast)
    layer = more - saved_bytes(CONFIG, method, precision, autocast)
    assert layer == 96 * kept_per_token(CONFIG, method, options)


def measured(settings: dict[str, Any]) -> dict[str, int]:
    # With small blocks returned to the system, the resident set is what is allocated.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(PROGRAM), json.dumps(settings)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    sizes: dict[str, int] = json.loads(result.stdout)
    return sizes


@needs_kernels
@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("shape", [WIDE, DEEP], ids=["wide", "deep"])
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "frozen", "dtype": "bfloat16", "batch_size": 16, "texts": 16},
        {"method": "lora", "dtype": "bfloat16", "batch_size": 6, "texts": 12},
        {"method": "lora", "dtype": "bfloat16", "batch_size": 12, "texts": 24},
        {"method": "lora", "dtype": "float32", "batch_size": 6, "texts": 12, "autocast": "off"},
        {"method": "full", "dtype": "float32", "batch_size": 6, "texts": 12, "autocast": "on"},
        {"method": "full", "dtype": "float32", "batch_size": 6, "texts": 12, "autocast": "off"},
        {"method": "full", "dtype": "float32", "batch_size": 32, "texts": 64, "autocast": "off"},
        {
            "method": "lora",
            "dtype": "float32",
            "batch_size": 6,
            "texts": 12,
            "autocast": "off",
            "gradient_checkpointing": True,
        },
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_the_planned_peak_is_the_measured_one_within_15_percent(
    shape: dict[str, Any], settings: dict[str, Any]
) -> None:
    if settings["dtype"] == "bfloat16" and not fast_bfloat16("cpu"):
        pytest.skip("this CPU only emulates bfloat16")
    peak = measured({"config": shape, "length": 128, **settings})["peak"]
    options = PlanOptions(
        device="cpu",
        seq_len=128,
        batch_size=settings["batch_size"],
        dtype=settings["dtype"],
        no_autocast=settings.get("autocast") != "on",
        gradient_checkpointing=settings.get("gradient_checkpointing", False),
    )
    planned = plan_memory(LlamaConfig(**shape), settings["method"], "replicated", options).peak
    print(f"\nplanned {planned / 1e6:.0f} MB, measured {peak / 1e6:.0f} MB")
    assert planned == pytest.approx(peak, rel=0.15)


def test_parameters_are_those_of_the_model() -> None:
    for tied in (False, True):
        config = CONFIG.replace(tie_embeddings=tied)
        llama = Llama(config)
        assert all_parameters(config) == sum(p.numel() for p in llama.parameters())
        add_lora_wrapper(llama, r=5)
        of_layer, beside = trained_parameters(config, "lora", 5)
        trained = sum(p.numel() for p in llama.parameters() if p.requires_grad)
        assert (3 * of_layer, beside) == (trained, 0)


@pytest.mark.parametrize(("quantize", "bits"), [("int8", 8), ("int4", 4)])
def test_quantized_weights_have_their_bytes(quantize: str, bits: int) -> None:
    quants = torch.zeros(4, 2, bits, 16, 4, dtype=torch.uint8)
    weight = QuantizedWeight(quants, torch.zeros(4, 2, 16, dtype=torch.float16), None, 64)
    stored = sum(buffer.nbytes for buffer in weight.buffers())
    config = CONFIG.replace(vocab_size=2**20)  # nearly all of it is one matrix
    options = PlanOptions(quantize=quantize)
    planned = plan_memory(config, "frozen", "replicated", options).weights
    assert planned / all_parameters(config) == stored / (64 * 64)


def test_sharding_divides_what_is_stored_and_nothing_that_is_computed() -> None:
    config = LlamaConfig(**WIDE)
    one = plan_memory(config, "full", "replicated", PlanOptions(gpus=1))
    eight = plan_memory(config, "full", "sharded", PlanOptions(gpus=8))
    replicated = plan_memory(config, "full", "replicated", PlanOptions(gpus=8))
    assert one.weights == 8 * eight.weights == replicated.weights == 4 * all_parameters(config)
    assert one.optimizer == 8 * eight.optimizer
    assert replicated.gradients == 2 * one.gradients == 16 * eight.gradients  # with buckets
    assert eight.working > one.working  # gathered layers


def test_the_largest_batch_fits_and_one_more_text_does_not() -> None:
    config, options = LlamaConfig(**WIDE), PlanOptions(method="lora", seq_len=256)

    def peak(n_texts: int) -> float:
        return plan_memory(config, "lora", "replicated", options, batch_size=n_texts).peak

    most = most_texts(config, "lora", "replicated", options, 8e9)
    assert peak(most) <= 8e9 < peak(most + 1)
    assert most_texts(config, "lora", "replicated", options, 1e8) == 0

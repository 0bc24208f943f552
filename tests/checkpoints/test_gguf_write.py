"""Writing GGUF files: read again, by the gguf package and by llama.cpp."""

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from minllama.checkpoints.gguf import open_gguf, read_gguf, write_gguf
from minllama.checkpoints.open import open_checkpoint
from minllama.errors import MinllamaError
from minllama.model.config import RopeScaling
from minllama.model.llama import Llama
from minllama.quantization.gguf_blocks import quantize_q8_0
from tests.gguf_file import CONFIG, loaded, our_name


def tiny_model(**changes: Any) -> Llama:
    torch.manual_seed(0)
    model = Llama(CONFIG.replace(**changes)).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return model


SCALINGS = [
    None,
    RopeScaling("linear", factor=4.0),
    RopeScaling("yarn", factor=4.0, original_max_seq_len=32),
    RopeScaling("yarn", factor=4.0, original_max_seq_len=32, attention_factor=1.5),
    RopeScaling("llama3", factor=8.0, original_max_seq_len=32),
    RopeScaling("factors", factors=(1.0, 1.5, 2.5, 7.0)),
]
CONFIGS = [
    *({"rope_scaling": scaling} for scaling in SCALINGS),
    {"tie_embeddings": True},
    {"head_dim": 16, "n_kv_heads": 1},
    {"attention_bias": True, "ffn_bias": True},
    {"causal": False},
]


def config_id(changes: dict[str, Any]) -> str:
    scaling = changes.get("rope_scaling")
    return scaling.kind if scaling else ",".join(changes)


@pytest.mark.parametrize("changes", CONFIGS, ids=config_id)
def test_written_and_read_again_a_model_is_the_same(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    model = tiny_model(**changes)
    write_gguf(tmp_path / "model", model.config, model.state_dict(), None, "f32")
    checkpoint = read_gguf(tmp_path / "model")
    assert checkpoint.config == model.config
    assert checkpoint.ignored == ()
    found = loaded(checkpoint)
    assert found.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("dtype", "file_type"), [("f32", 0), ("f16", 1), ("bf16", 32), ("q8_0", 7)]
)
def test_the_gguf_package_reads_what_is_written(tmp_path: Path, dtype: Any, file_type: int) -> None:
    model = tiny_model(attention_bias=True)
    write_gguf(tmp_path / "model", model.config, model.state_dict(), None, dtype)
    reader = gguf.GGUFReader(tmp_path / "model")
    assert reader.fields["general.file_type"].contents() == file_type
    assert reader.fields["general.architecture"].contents() == "llama"
    state = model.state_dict()
    assert {our_name(tensor.name) for tensor in reader.tensors} == state.keys()
    for tensor in reader.tensors:
        values = state[our_name(tensor.name)]
        wanted = Type.F32 if values.dim() == 1 else Type[dtype.upper()]
        assert tensor.tensor_type == wanted, tensor.name
        assert tuple(reversed(tensor.shape.tolist())) == tuple(values.shape)
        expected = gguf.quants.quantize(values.numpy(), wanted)
        assert tensor.data.tobytes() == expected.tobytes(), tensor.name


def test_rows_that_q8_0_cannot_hold_are_float16(tmp_path: Path) -> None:
    model = tiny_model(hidden_dim=48)
    write_gguf(tmp_path / "model", model.config, model.state_dict(), None, "q8_0")
    tensors = read_gguf(tmp_path / "model").tensors
    assert tensors["layers.0.feed_forward.w2.weight"].stored_as == "float16"
    assert tensors["layers.0.feed_forward.w1.weight"].stored_as == "Q8_0"
    expected = model.state_dict()["layers.0.feed_forward.w2.weight"].half()
    assert torch.equal(tensors["layers.0.feed_forward.w2.weight"].load(), expected)


def test_q8_0_is_quantized_bit_for_bit_as_the_gguf_package_does() -> None:
    values = torch.randn(70, 96)
    values[0] = 0
    values[1] = torch.arange(96) / 2  # halves, which round away from zero
    values[2] = -values[1]
    values[3] *= 1e-7
    values[4] = torch.arange(96) % 32 - 15.5  # halves still, once they are over their scale of 1
    values[4, ::32] = 127
    expected = gguf.quants.quantize(values.numpy(), Type.Q8_0)
    np.testing.assert_array_equal(quantize_q8_0(values).numpy(), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": RopeScaling("dynamic", factor=2.0)}, "'dynamic'"),
        ({"max_seq_len": 2**32}, "context_length is 4294967296, which does not"),
        ({"rope_theta": 1e39}, r"rope\.freq_base is 1e\+39, which does not"),
        (
            {"rope_scaling": RopeScaling("yarn", factor=2.0, original_max_seq_len=9, beta_fast=8)},
            "beta_fast",
        ),
        (
            {
                "rope_scaling": RopeScaling(
                    "yarn", factor=2.0, original_max_seq_len=9, truncate=False
                )
            },
            "truncate",
        ),
    ],
)
def test_what_the_format_has_no_words_for_is_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    state = tiny_model().state_dict()
    with pytest.raises(MinllamaError, match=message):
        write_gguf(tmp_path / "model", CONFIG.replace(**changes), state, None)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(b"old")
    model = tiny_model()
    state = model.state_dict()
    state["layers.1.feed_forward.w1.weight"] = state["layers.1.feed_forward.w1.weight"] * 1e6
    for dtype in ("f16", "q8_0"):
        if dtype == "q8_0":
            state["layers.1.feed_forward.w1.weight"] *= 1e6
        with pytest.raises(MinllamaError, match=r"layers\.1\.feed_forward\.w1\.weight has values"):
            write_gguf(path, model.config, state, None, dtype)  # type: ignore[arg-type]
    state["norm.weight"] = torch.ones(31)
    with pytest.raises(MinllamaError, match=r"norm\.weight has shape \(31,\)"):
        write_gguf(path, model.config, state, None, "bf16")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# --- against llama.cpp -----------------------------------------------------------------------


@pytest.fixture(scope="session")
def llama_cpp() -> Iterator[Any]:
    """llama-cpp-python, whose import leaves two files open."""
    module = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    yield module
    module._utils.outnull_file.close()
    module._utils.errnull_file.close()


def llama_cpp_model(llama_cpp: Any, path: Path, **options: Any) -> Any:
    # Its caches default to float16, which is all that its logits would then be good for.
    f32 = llama_cpp.GGML_TYPE_F32
    return llama_cpp.Llama(
        str(path), verbose=False, n_threads=2, type_k=f32, type_v=f32, flash_attn=False, **options
    )


@pytest.mark.parametrize("changes", CONFIGS, ids=config_id)
def test_llama_cpp_computes_the_same_logits(
    tmp_path: Path, llama_cpp: Any, changes: dict[str, Any]
) -> None:
    model = tiny_model(**changes)
    write_gguf(tmp_path / "model", model.config, model.state_dict(), None, "f32")
    ids = torch.randint(0, 40, (1, 100), generator=torch.Generator().manual_seed(1))
    theirs = llama_cpp_model(llama_cpp, tmp_path / "model", n_ctx=128, n_batch=128, logits_all=True)
    theirs.eval(ids[0].tolist())
    logits = torch.from_numpy(np.array(theirs.scores[:100]))
    torch.testing.assert_close(model(ids).logits[0], logits, atol=1e-3, rtol=1e-3)


PROMPTS = ("Once upon a time", "The capital of France is", "def fibonacci(n):", "1, 2, 3, 4,")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
def test_llama_cpp_continues_texts_as_we_do(
    tmp_path: Path, llama_cpp: Any, default_model: Path, dtype: Any
) -> None:
    original = read_gguf(default_model)
    path = tmp_path / "model"
    write_gguf(path, original.config, loaded(original), original.vocabulary, dtype)
    checkpoint = read_gguf(path)
    assert checkpoint.config == original.config
    assert checkpoint.vocabulary == original.vocabulary
    ours = Llama.from_checkpoint(checkpoint, device="cpu")
    theirs = llama_cpp_model(llama_cpp, path, n_ctx=128)
    before = llama_cpp_model(llama_cpp, default_model, n_ctx=128, vocab_only=True)
    for prompt in PROMPTS:
        ids = theirs.tokenize(prompt.encode(), add_bos=False)
        assert ids == before.tokenize(prompt.encode(), add_bos=False)
        theirs.reset()
        stream = theirs.generate(ids, temp=0.0, repeat_penalty=1.0)
        continued = [next(stream) for _ in range(32)]
        text = torch.tensor([[*ids, *continued]])
        logits = ours(text).logits[0, len(ids) - 1 : -1]
        chosen = logits.gather(-1, text[0, len(ids) :, None])
        # With Q8_0 weights llama.cpp rounds activations to 8 bits too, so near-ties may fall
        # the other way.
        tolerance = 0.5 if dtype == "q8_0" else 0.0
        assert (logits.amax(-1, keepdim=True) - chosen).max() <= tolerance, prompt


@pytest.mark.slow
def test_q8_0_files_are_the_ones_that_llama_cpp_makes(
    llama_cpp: Any, default_model: Path, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(default_model)
    model = Llama.from_checkpoint(checkpoint, device="cpu")
    for dtype in ("f32", "q8_0"):
        write_gguf(tmp_path / dtype, model.config, model.state_dict(), checkpoint.vocabulary, dtype)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    source, target = (os.fsencode(tmp_path / name) for name in ("f32", "theirs"))
    assert llama_cpp.llama_model_quantize(source, target, ctypes.byref(settings)) == 0
    ours, theirs = (open_gguf(tmp_path / name) for name in ("q8_0", "theirs"))
    assert ours.header.tensors.keys() == theirs.header.tensors.keys()
    for name, tensor in ours.header.tensors.items():
        other = theirs.header.tensors[name]
        assert tensor.type == other.type, name
        assert np.array_equal(ours.raw(tensor), theirs.raw(other)), name

"""The embedded default model, for real: against transformers, and against itself."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from minllama.checkpoints.open import open_checkpoint
from minllama.generation.api import generate, stream
from minllama.generation.conversation import Conversation
from minllama.model.kv_cache import KVCache
from minllama.model.llama import Llama, load_pretrained
from minllama.options import GenerationOptions
from minllama.tokenizer.tokenizer import Tokenizer

PROMPTS = [
    "Once upon a time",
    "The capital of France is",
    "def fibonacci(n):\n",
    "<|im_start|>user\nWhat is the sun?<|im_end|>\n<|im_start|>assistant\n",
    "1, 2, 3, 5, 8, 13,",
    "Dear Sir or Madam,\n\nI am writing to",
    "Le petit chat est",
    "Review: a gorgeous, witty, seductive movie.\nSentiment:",
    "In physics, the second law of thermodynamics states that the entropy of an isolated system",
    "A",
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(default_model):
    return open_checkpoint(default_model)


@pytest.fixture(scope="module")
def model(checkpoint):
    return Llama.from_checkpoint(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return Tokenizer(checkpoint.vocabulary)


@pytest.fixture(scope="module")
def theirs(default_model):
    return AutoModelForCausalLM.from_pretrained(
        default_model.parent, gguf_file=default_model.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def prompt_ids(tokenizer):
    return [tokenizer.encode(prompt, special=True) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def greedy(model, tokenizer, prompt_ids):
    """64 greedy tokens of each prompt, all in one batch."""
    return generate(model, tokenizer, prompt_ids, max_new_tokens=64, ignore_eos=True)


def test_weights_and_logits_equal_transformers(model, theirs, prompt_ids):
    ids = torch.tensor([prompt_ids[8] * 12])  # long: a wrong rotation shows after tens of tokens
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, atol=1e-3, rtol=0)


def test_64_greedy_tokens_of_ten_prompts_equal_transformers(greedy, theirs, prompt_ids):
    # Greedy decoding takes at each place the likeliest token given all before it, so one forward
    # pass over prompt and continuation shows whether transformers takes the same.
    for ids, result in zip(prompt_ids, greedy, strict=True):
        assert len(result.token_ids) == 64
        with torch.no_grad():
            logits = theirs(torch.tensor([ids + result.token_ids])).logits[0, len(ids) - 1 : -1]
        assert logits.argmax(-1).tolist() == result.token_ids, ids


def test_cached_equals_uncached(greedy, model, prompt_ids):
    for ids, result in zip(prompt_ids, greedy, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([ids + result.token_ids])).logits[0, len(ids) - 1 : -1]
        assert logits.argmax(-1).tolist() == result.token_ids


def test_batch_equals_alone_and_streamed_equals_whole(greedy, model, tokenizer, prompt_ids):
    for ids, result in zip(prompt_ids, greedy, strict=True):
        alone = stream(model, tokenizer, ids, max_new_tokens=64, ignore_eos=True)
        text = "".join(piece.text for piece in alone)
        assert alone.results == [result]
        assert text == result.text == tokenizer.decode(result.token_ids, continuation=True)


def test_it_knows_the_capital_of_france(greedy):
    assert greedy[1].text.startswith(" Paris")


def test_a_conversation_reads_only_what_is_new(model, tokenizer):
    options = GenerationOptions(max_new_tokens=12)
    conversation = Conversation(model, tokenizer, options)
    texts, read = [], []
    for question in ("What is the sun?", "And the moon?"):
        texts.append("".join(piece.text for piece in conversation.answer(question)))
        read.append(conversation.stream.timings.prefill_tokens)
        # Without the cache of the answers before, the same answer comes out.
        [afresh] = generate(model, tokenizer, conversation.stream.results[0].prompt_ids, options)
        assert afresh.text == texts[-1]
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"] * 2
    assert read[1] < 20 < read[0] + 12 < len(conversation.stream.results[0].prompt_ids)


def test_hugging_face_form_gives_the_same_logits_in_transformers(
    model, checkpoint, theirs, prompt_ids, tmp_path
):
    from minllama.checkpoints.huggingface import write_huggingface

    write_huggingface(
        tmp_path / "hf", model.config, model.state_dict(), vocabulary=checkpoint.vocabulary
    )
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    back = load_pretrained(tmp_path / "hf", device="cpu")
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_bfloat16_continues_sensibly(checkpoint, tokenizer):
    model = Llama.from_checkpoint(checkpoint, dtype=torch.bfloat16, device="cpu")
    [result] = generate(model, tokenizer, "The capital of France is", max_new_tokens=4)
    assert result.text.startswith(" Paris")


def test_a_long_text_decodes_as_it_prefills(model, tokenizer):
    ids = tokenizer.encode("The old lighthouse keeper climbed the stairs. " * 40)[:300]
    cache = KVCache(model.config, 1, 320)
    with torch.no_grad():
        full = model(torch.tensor([ids]), logits="last").logits
        model(torch.tensor([ids[:150]]), cache=cache, logits=None)
        parts = model(torch.tensor([ids[150:299]]), cache=cache, logits=None)
        assert parts.logits is None
        last = model(torch.tensor([ids[299:]]), cache=cache, logits="last").logits
    torch.testing.assert_close(last, full, atol=1e-3, rtol=0)


def test_opening_it_costs_no_second_copy_of_the_weights():
    # The float32 weights are 538 MB and the file 97: a second copy would be above 1.1 GB. What
    # torch takes depends on its build. VmHWM, since getrusage's peak begins with the parent's.
    code = (
        "import re, pathlib, minllama.model.llama; "
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', "
        "pathlib.Path('/proc/self/status').read_text())[1]); "
        "before = peak(); model = minllama.load_pretrained(); print(peak() - before)"
    )
    kilobytes = int(subprocess.check_output([sys.executable, "-c", code]))
    assert 500_000 < kilobytes < 850_000

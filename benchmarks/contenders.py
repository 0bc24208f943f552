"""One measurement of one contender in a process of its own: `contenders.py TASK WHO`.

Prints one JSON object: the measured number and the process's peak memory in bytes.
`benchmarks/speed.py` runs these in turns. All contenders of a task do the same work on the same
weights; transformers and PEFT read the folder that `minllama convert` made.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

THREADS = 2
STORY = "The old lighthouse keeper climbed the stairs once more, and"
LABELS = (" terrible", " bad", " okay", " good", " incredible")
LONG_LABELS = (" really quite terrible", " rather bad", " just okay", " pretty good", " wonderful!")
PROMPT = "{text}\nIn one word, this movie is"
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
FOLDER = Path(os.environ.get("MINLLAMA_BENCH_FOLDER", "/tmp/minllama-bench"))


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def median(work: Callable[[], float], n: int = 5) -> float:
    n = min(n, int(os.environ.get("MINLLAMA_BENCH_RUNS", n)))
    work()  # what is compiled, mapped or allocated once is no part of it
    return statistics.median(work() for _ in range(n))


def fast_dtype() -> str:
    """The dtype in which this machine multiplies large matrices fastest."""
    from minllama.kernels.hardware import fast_bfloat16

    return "bfloat16" if fast_bfloat16("cpu") else "float32"


def sentences(n: int) -> tuple[list[str], list[int]]:
    """The first lines of SST-5's training file."""
    lines = (DATA / "sst-train.txt").read_text(encoding="utf-8").splitlines()[:n]
    labels, texts = zip(*(line.split(" ||| ", 1) for line in lines), strict=True)
    return list(texts), [int(label) for label in labels]


# ---------------------------------------------------------------- generation


def open_ours(**options: Any) -> tuple[Any, Any]:
    from minllama import Tokenizer, load_pretrained

    options.setdefault("quantize", "auto")
    return load_pretrained(device="cpu", **options), Tokenizer.from_pretrained()


def form_to_read(dtype: str | None = None) -> dict[str, Any]:
    """How `minllama train` and `classify` open the default model on this machine.

    In another dtype than it would be of its own accord, all weights are in numbers of that.
    """
    from minllama.checkpoints.open import open_checkpoint
    from minllama.checkpoints.weight_format import resolve_weight_format
    from minllama.options.loading import LoadOptions

    options = LoadOptions(device="cpu", quantize="auto")
    found = resolve_weight_format(open_checkpoint(None), options, "read")
    own, quantize = str(found.dtype).removeprefix("torch."), found.quantize
    same = dtype is None or dtype == own
    return {"dtype": dtype or own, "quantize": quantize if same else None}


def open_theirs(dtype: str) -> tuple[Any, Any]:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = FOLDER / "bfloat16"
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def open_llama_cpp(path: Path | None = None, **options: Any) -> Any:
    from llama_cpp import Llama

    from minllama.checkpoints.resolve import resolve_source

    settings = {"n_threads": THREADS, "n_threads_batch": THREADS, "verbose": False, **options}
    return Llama(str(path or resolve_source(None)), **settings)


def decode_ours(
    batch: int = 1, context: int = 0, new: int = 64, n: int = 5, path: Path | None = None
) -> float:
    from minllama.benchmark.measurements import decode_rate

    model, tokenizer = open_ours(source=path)
    ids = tokenizer.encode(STORY)
    prompt = (ids * (context // len(ids) + 1))[: context or len(ids)]
    return median(lambda: decode_rate(model, [prompt] * batch, new), n)


def decode_theirs(dtype: str, batch: int = 1, context: int = 0, new: int = 64, n: int = 5) -> float:
    import torch

    model, tokenizer = open_theirs(dtype)
    row = tokenizer(STORY)["input_ids"]
    ids = torch.tensor([(row * (context // len(row) + 1))[: context or len(row)]] * batch)
    with torch.inference_mode():
        return median(lambda: their_decode_rate(model, ids, new), n)


def their_decode_rate(model: Any, ids: Any, new: int) -> float:
    """Tokens per second after the first, all rows (B, T) of transformers' model together."""
    import torch
    import transformers

    times: list[float] = []

    def look(*_: Any, **__: Any) -> torch.Tensor:
        """Called by transformers after each token: note the time, and go on."""
        if ids.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    settings = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
    stops = transformers.StoppingCriteriaList([look])
    mask = torch.ones_like(ids)
    model.generate(ids, attention_mask=mask, **settings, pad_token_id=0, stopping_criteria=stops)
    return len(ids) * (len(times) - 1) / (times[-1] - times[0])


def decode_llama_cpp(
    batch: int = 1, context: int = 0, new: int = 64, n: int = 5, path: Path | None = None
) -> float:
    if batch == 1:
        # Flash attention is faster here for short texts, and slower for long ones.
        size = max(2048, context + new)
        model = open_llama_cpp(path, n_ctx=size, flash_attn=context < 1000)
        ids = model.tokenize(STORY.encode())
        ids = (ids * (context // len(ids) + 1))[: context or len(ids)]

        def rate() -> float:
            model.reset()
            model.eval(ids)
            # Any token will do: what it is does not change what reading it costs.
            return new / seconds(lambda: [model.eval([100]) for _ in range(new)])

        return median(rate, n)
    return _decode_llama_cpp_batch(batch, new)


def _decode_llama_cpp_batch(batch: int, new: int) -> float:
    """Rows as sequences of one llama_batch, as llama.cpp's own batched benchmark has them."""
    import llama_cpp

    model = open_llama_cpp(n_ctx=2048, n_batch=512)
    ids = model.tokenize(STORY.encode())
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.n_seq_max = max(4096, batch * (len(ids) + new)), batch
    settings.n_threads = settings.n_threads_batch = THREADS
    context = llama_cpp.llama_init_from_model(model.model, settings)
    part = llama_cpp.llama_batch_init(512, 0, 1)

    def read(tokens: list[tuple[int, int, int]]) -> None:
        part.n_tokens = len(tokens)
        for i, (token, position, row) in enumerate(tokens):
            part.token[i], part.pos[i] = token, position
            part.n_seq_id[i], part.seq_id[i][0], part.logits[i] = 1, row, True
        assert llama_cpp.llama_decode(context, part) == 0

    def rate() -> float:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        for row in range(batch):
            read([(token, position, row) for position, token in enumerate(ids)])

        def decode() -> None:
            for step in range(new):
                read([(100, len(ids) + step, row) for row in range(batch)])

        return batch * new / seconds(decode)

    return median(rate, 3)


def prefill_ours(length: int = 512, path: Path | None = None) -> float:
    from minllama.benchmark.measurements import prefill_rate

    model, tokenizer = open_ours(source=path)
    ids = (tokenizer.encode(STORY) * length)[:length]
    return median(lambda: prefill_rate(model, ids))


def prefill_theirs(dtype: str, length: int = 512) -> float:
    import torch

    model, tokenizer = open_theirs(dtype)
    ids = torch.tensor([(tokenizer(STORY)["input_ids"] * length)[:length]])
    with torch.inference_mode():
        return median(lambda: length / seconds(lambda: model(ids, logits_to_keep=1)))


def prefill_llama_cpp(length: int = 512, path: Path | None = None) -> float:
    model = open_llama_cpp(path, n_ctx=2048, flash_attn=True)
    ids = (model.tokenize(STORY.encode()) * length)[:length]

    def rate() -> float:
        model.reset()
        return length / seconds(lambda: model.eval(ids))

    return median(rate)


def open_gguf_ours() -> float:
    import torch  # noqa: F401  (imports are another row's)

    import minllama.model.llama  # noqa: F401

    return seconds(lambda: open_ours())


def open_gguf_theirs() -> float:
    import torch
    import transformers

    from minllama.checkpoints.resolve import resolve_source

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    path = resolve_source(None)
    load = transformers.AutoModelForCausalLM.from_pretrained
    return seconds(lambda: load(path.parent, gguf_file=path.name, dtype=torch.float32))


def open_gguf_llama_cpp() -> float:
    import llama_cpp  # noqa: F401

    return seconds(lambda: open_llama_cpp(n_ctx=512))


def whole_ours() -> float:
    from minllama.cli import main

    sys.argv = ["minllama", "generate", STORY, "--model", str(FOLDER / "bfloat16")]
    sys.argv += ["--max-new-tokens", "1"]
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        main(sys.argv[1:])
    except SystemExit as ended:
        if ended.code:  # to fail is not to be fast
            raise
    return 0.0


def whole_theirs() -> float:
    model, tokenizer = open_theirs("bfloat16")
    ids = tokenizer(STORY, return_tensors="pt")
    tokenizer.decode(model.generate(**ids, max_new_tokens=1, do_sample=False)[0])
    return 0.0


SUMMARY = """The ferry from Kilmore to Tarsk runs three times a day in winter, at seven in the
morning, at noon and at six in the evening. The crossing takes fifty minutes in calm weather.
Cars must be at the pier half an hour before departure, passengers on foot ten minutes. Tickets
cost four pounds for adults and two pounds for children, and bicycles travel free of charge. In
storms the noon ferry is the first to be cancelled, and notices are posted at the pier and read
on the radio at half past six."""


def lookup(drafts: int, new: int = 120) -> float:
    """Tokens per second of a summary, which takes many of its words from what it sums up."""
    from minllama import GenerationOptions
    from minllama.generation.conversation import chat_template, encode_messages
    from minllama.generation.decode import Decoder

    model, tokenizer = open_ours()
    asked = f"Summarize the following notice, keeping its numbers:\n\n{SUMMARY}"
    messages = [{"role": "user", "content": asked}]
    prompt = encode_messages(chat_template(tokenizer), tokenizer, messages, 2048)
    options = GenerationOptions(max_new_tokens=new, prompt_lookup=drafts)

    def rate() -> float:
        decoder = Decoder(model, [prompt], options, stop_ids=tokenizer.stop_ids)
        for _ in decoder:
            pass
        return decoder.timings.decode_rate

    return median(rate)


# ---------------------------------------------------------------- scoring labels


def zero_shot_ours(labels: tuple[str, ...], n: int = 256) -> float:
    from minllama import LlamaZeroShotClassifier

    model, tokenizer = open_ours(**form_to_read())
    names = [label.strip() for label in labels]
    classifier = LlamaZeroShotClassifier(model, tokenizer, names, prompt=PROMPT)
    texts, _ = sentences(n)
    return median(lambda: n / seconds(lambda: classifier.predict_proba(texts)), 3)


def zero_shot_harness(labels: tuple[str, ...], n: int = 256, size: int = 16) -> float:
    """Every label a full sequence, sorted by length, in padded batches, as harnesses do.

    Of the texts that the others read, every fifth by length: they are as long on average, and the
    rate is of texts a second.
    """
    import torch

    model, tokenizer = open_theirs(fast_dtype())
    tokenizer.pad_token_id = tokenizer.pad_token_id or 0
    texts = sorted(sentences(n)[0], key=len)[2::5]
    rows = [PROMPT.format(text=text) + label for text in texts for label in labels]
    rows.sort(key=len, reverse=True)

    def score() -> None:
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            encoded = tokenizer(batch, return_tensors="pt", padding=True, padding_side="right")
            logits = model(**encoded).logits.float().log_softmax(-1)
            logits[:, :-1].gather(-1, encoded["input_ids"][:, 1:, None])

    with torch.inference_mode():
        return median(lambda: len(texts) / seconds(score), 3)


def zero_shot_by_hand(n: int = 256, size: int = 16) -> float:
    """One-token labels: one forward a text, sorted by length, logits of the last token only."""
    import torch

    model, tokenizer = open_theirs(fast_dtype())
    texts, _ = sentences(n)
    prompts = sorted((PROMPT.format(text=text) for text in texts), key=len)
    ids = [tokenizer(label)["input_ids"][0] for label in LABELS]

    def score() -> None:
        for start in range(0, n, size):
            batch = prompts[start : start + size]
            encoded = tokenizer(batch, return_tensors="pt", padding=True, padding_side="left")
            model(**encoded, logits_to_keep=1).logits[:, -1, ids].float().log_softmax(-1)

    with torch.inference_mode():
        return median(lambda: n / seconds(score), 3)


# ---------------------------------------------------------------- training

BATCH, STEPS = 16, int(os.environ.get("MINLLAMA_BENCH_STEPS", "12"))


def train_ours(method: str, dtype: str, *, blocks: bool = True) -> float:
    """Examples per second of the training loop that `minllama train` runs.

    A frozen base is opened as that command does, in the file's blocks where they are fastest; with
    `blocks` false in numbers of the dtype, as that of PEFT is.
    """
    import torch

    from minllama import LlamaEmbeddingClassifier, add_lora_wrapper
    from minllama.data import Dataset
    from minllama.options import TrainingOptions
    from minllama.training.trainer import fit

    torch.manual_seed(0)
    form: dict[str, Any] = {"dtype": dtype, "quantize": None}
    if method == "full":
        form["dtype"] = "float32"
    elif blocks:
        form = form_to_read(dtype)
    llama, tokenizer = open_ours(**form)
    names = [str(i) for i in range(5)]
    classifier = LlamaEmbeddingClassifier(llama, tokenizer, names)
    if method == "lora":
        add_lora_wrapper(classifier, ["compute_query", "compute_value"], r=8, lora_alpha=16)
    texts, labels = sentences(BATCH * STEPS)
    options = TrainingOptions(
        epochs=1, batch_size=BATCH, lr=1e-4, autocast="off" if dtype == "float32" else "auto"
    )
    result = fit(classifier, Dataset(texts, labels, names, source="SST-5"), None, options)
    took = [BATCH / row["examples_per_second"] for row in result.history[2:]]
    return BATCH * len(took) / sum(took)


def their_classifier(method: str, dtype: str) -> Any:
    """A model of transformers with a head of five classes, in training, as it is or with PEFT."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.LlamaForSequenceClassification.from_pretrained(
        FOLDER / "bfloat16", num_labels=5, pad_token_id=0, dtype=getattr(torch, dtype)
    )
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        modules = ["q_proj", "v_proj"]
        lora = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=modules)
        model = get_peft_model(model, lora)
    model.config.use_cache = False
    return model.train()


def train_theirs(method: str, dtype: str) -> float:
    """The same with transformers (and PEFT): shuffled batches, padded to their longest text."""
    import torch
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "bfloat16")
    model = their_classifier(method, dtype)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    texts, labels = sentences(BATCH * STEPS)
    order = torch.randperm(len(texts)).tolist()
    took = []
    for start in range(0, len(texts), BATCH):
        began = time.perf_counter()
        chosen = order[start : start + BATCH]
        encoded = tokenizer([texts[i] for i in chosen], return_tensors="pt", padding=True)
        loss = model(**encoded, labels=torch.tensor([labels[i] for i in chosen])).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        took.append(time.perf_counter() - began)
    return BATCH * len(took[2:]) / sum(took[2:])


def frozen(features_once: bool, n: int = 256, epochs: int = 10) -> float:
    """Texts times epochs per second of a frozen head on the last layer's mean.

    Ours reads each text once and keeps what it says; transformers, as a training loop with frozen
    parameters does it, runs the body in each epoch (one is timed, and counts for all).
    """
    import torch
    import torch.nn.functional as F

    texts, names = sentences(n)
    labels = torch.tensor(names)
    if features_once:
        from minllama import LlamaEmbeddingClassifier
        from minllama.classification.features import extract_features

        llama, words = open_ours(**form_to_read())
        classifier = LlamaEmbeddingClassifier(llama, words, [str(i) for i in range(5)])
    else:
        model, tokenizer = open_theirs(fast_dtype())
    head = torch.nn.Linear(576, 5)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)

    def learn(vectors: torch.Tensor, chosen: torch.Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(head(vectors), labels[chosen]).backward()
        optimizer.step()

    def ours() -> None:
        kept = torch.from_numpy(extract_features(classifier, texts, [(30, "mean")])[30, "mean"])
        for _ in range(epochs):
            for chosen in torch.randperm(n).split(BATCH):
                learn(kept[chosen], chosen)

    def theirs() -> None:
        for chosen in torch.randperm(n).split(BATCH):
            some = [texts[i] for i in chosen]
            batch = tokenizer(some, return_tensors="pt", padding=True, padding_side="right")
            with torch.no_grad():
                states = model.model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"].unsqueeze(-1)
            learn((states * mask).sum(1) / mask.sum(1), chosen)

    if features_once:
        return median(lambda: n * epochs / seconds(ours), 3)
    return median(lambda: n / seconds(theirs), 3)


def adamw(which: str) -> float:
    """Steps per second over 135 million parameters."""
    import torch

    from minllama.training.optimizer import AdamW

    torch.manual_seed(0)
    shapes = [(49152, 576), *[(576, 576), (192, 576), (192, 576), (576, 576)] * 30]
    shapes += [(1536, 576), (1536, 576), (576, 1536)] * 30
    parameters = [torch.nn.Parameter(torch.randn(shape) * 0.02) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    make: dict[str, Callable[[], Any]] = {
        "minllama": lambda: AdamW(parameters, lr=1e-4),
        "torch-fused": lambda: torch.optim.AdamW(parameters, lr=1e-4, fused=True),
        "torch-foreach": lambda: torch.optim.AdamW(parameters, lr=1e-4, foreach=True),
    }
    optimizer = make[which]()
    return median(lambda: 1 / seconds(optimizer.step), 7)


def beside_a_busy_process(work: Callable[[], float]) -> float:
    """What is measured while another process computes all the time."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbor:
        try:
            return work()
        finally:
            neighbor.kill()


def outside_the_model(**sampling: float) -> float:
    """The part of a server's step of 16 sequences that is not the forward pass, in percent."""
    import torch

    from minllama.engine.choose import engine_for
    from minllama.engine.scheduler import Scheduler
    from minllama.generation.decode import request_of
    from minllama.options import GenerationOptions

    model, tokenizer = open_ours()
    engine = engine_for(model)
    options = GenerationOptions(max_new_tokens=64, ignore_eos=True, **sampling)
    scheduler, forward, in_model = Scheduler(engine), engine.forward, [0.0]

    def timed(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return forward(*arguments, **named)
        finally:
            in_model[0] += time.perf_counter() - began

    def part() -> float:
        for number in range(16):
            ids = tokenizer.encode(f"{STORY} {number}")
            scheduler.add(request_of(ids, options, seed=str(number)))
        scheduler.step()  # which reads the prompts
        in_model[0], began = 0.0, time.perf_counter()
        while scheduler.is_busy:
            scheduler.step()
        return 100 * (1 - in_model[0] / (time.perf_counter() - began))

    engine.forward = timed
    with torch.inference_mode():
        return median(part)


TASKS: dict[str, dict[str, Callable[[], float]]] = {
    "decode": {
        "minllama": decode_ours,
        "llama.cpp": decode_llama_cpp,
        "transformers-bfloat16": lambda: decode_theirs("bfloat16"),
        "transformers-float32": lambda: decode_theirs("float32"),
    },
    "decode-16": {
        "minllama": lambda: decode_ours(16),
        "llama.cpp": lambda: decode_llama_cpp(16),
        "transformers-bfloat16": lambda: decode_theirs("bfloat16", 16),
        "transformers-float32": lambda: decode_theirs("float32", 16),
    },
    "decode-busy": {
        "minllama": lambda: beside_a_busy_process(decode_ours),
        "llama.cpp": lambda: beside_a_busy_process(decode_llama_cpp),
        "transformers-float32": lambda: beside_a_busy_process(lambda: decode_theirs("float32")),
    },
    "scheduling": {
        "minllama": outside_the_model,
        "minllama-top-p": lambda: outside_the_model(temperature=0.8, top_p=0.9),
    },
    "prefill": {
        "minllama": prefill_ours,
        "llama.cpp": prefill_llama_cpp,
        "transformers-bfloat16": lambda: prefill_theirs("bfloat16"),
        "transformers-float32": lambda: prefill_theirs("float32"),
    },
    "lookup": {"minllama": lambda: lookup(3), "minllama-without": lambda: lookup(0)},
    "open": {
        "minllama": open_gguf_ours,
        "llama.cpp": open_gguf_llama_cpp,
        "transformers": open_gguf_theirs,
    },
    "process": {"minllama": whole_ours, "transformers-bfloat16": whole_theirs},
    "zero-shot": {
        "minllama": lambda: zero_shot_ours(LABELS),
        "minllama-long-labels": lambda: zero_shot_ours(LONG_LABELS),
        "transformers-full-sequences": lambda: zero_shot_harness(LABELS),
        "transformers-by-hand": zero_shot_by_hand,
    },
    "lora-bfloat16": {
        "minllama": lambda: train_ours("lora", "bfloat16"),
        "peft": lambda: train_theirs("lora", "bfloat16"),
    },
    "lora-float32": {
        "minllama": lambda: train_ours("lora", "float32", blocks=False),
        "minllama-blocks": lambda: train_ours("lora", "float32"),
        "peft": lambda: train_theirs("lora", "float32"),
    },
    "full": {
        "minllama": lambda: train_ours("full", "float32"),
        "minllama-autocast": lambda: train_ours("full", "bfloat16"),
        "transformers": lambda: train_theirs("full", "float32"),
    },
    "frozen": {"minllama": lambda: frozen(True), "transformers": lambda: frozen(False)},
    "adamw": {
        "minllama": lambda: adamw("minllama"),
        "torch-fused": lambda: adamw("torch-fused"),
        "torch-foreach": lambda: adamw("torch-foreach"),
    },
}

# Weight formats beside llama.cpp: a prompt of 512 tokens, and decoding behind contexts.
FORMATS = ("Q4_0", "Q4_1", "Q4_K_M", "Q8_0", "F16")
FORMAT_CONTEXTS = (512, 4096)
for _name in FORMATS:
    _path = FOLDER / f"{_name}.gguf"
    TASKS[f"prefill-{_name}"] = {
        "minllama": lambda path=_path: prefill_ours(path=path),
        "llama.cpp": lambda path=_path: prefill_llama_cpp(path=path),
    }
    for _n in FORMAT_CONTEXTS:
        TASKS[f"decode-{_name}-at-{_n}"] = {
            "minllama": lambda n=_n, path=_path: decode_ours(context=n, new=32, n=3, path=path),
            "llama.cpp": lambda n=_n, path=_path: decode_llama_cpp(
                context=n, new=32, n=3, path=path
            ),
        }

# Those that read the sentences of `DATA`.
OF_TEXTS = ("zero-shot", "lora-bfloat16", "lora-float32", "full", "frozen")


# ---------------------------------------------------------------- growth


def lora_on_a_text(who: str, length: int, checkpointing: bool = False, batch: int = 4) -> float:
    """Tokens per second of forward and backward passes of texts of one length, in float32.

    The attention's memory, and all else that grows with a text, shows in the process's peak.
    """
    import torch

    torch.manual_seed(0)
    ids = torch.randint(0, 49152, (batch, length))
    labels = torch.zeros(batch, dtype=torch.long)
    if who == "minllama":
        from minllama import LlamaEmbeddingClassifier, add_lora_wrapper
        from minllama.training.malloc import give_back_freed_memory

        llama, tokenizer = open_ours(**form_to_read("float32"))
        ours = LlamaEmbeddingClassifier(llama, tokenizer, ["a", "b"])
        add_lora_wrapper(ours, ["compute_query", "compute_value"], r=8, lora_alpha=16)
        llama.gradient_checkpointing = checkpointing
        if checkpointing:
            give_back_freed_memory()  # as `minllama.training.trainer` does
        ours.train()

        def step() -> None:
            torch.nn.functional.nll_loss(ours(ids), labels).backward()

    else:
        theirs = their_classifier("lora", "float32")

        def step() -> None:
            theirs(input_ids=ids, labels=labels).loss.backward()

    return median(lambda: batch * length / seconds(step), 1)


CONTEXTS = (64, 512, 1024, 2048, 4096, 8000)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (64, 128, 256, 512, 1024)
GROWTH: dict[str, dict[str, Callable[[], float]]] = {}
for _n in CONTEXTS:
    GROWTH[f"decode-at-{_n}"] = {
        "minllama": lambda n=_n: decode_ours(context=n, new=32, n=1),
        "llama.cpp": lambda n=_n: decode_llama_cpp(context=n, new=32, n=1),
    }
    if _n <= 2048:
        GROWTH[f"decode-at-{_n}"]["transformers-float32"] = lambda n=_n: decode_theirs(
            "float32", context=n, new=16, n=1
        )
for _n in BATCHES:
    GROWTH[f"decode-of-{_n}"] = {
        "minllama": lambda n=_n: decode_ours(n),
        "llama.cpp": lambda n=_n: decode_llama_cpp(n),
        "transformers-float32": lambda n=_n: decode_theirs("float32", n, new=16, n=1),
    }
for _n in LENGTHS:
    GROWTH[f"lora-of-{_n}"] = {
        "minllama": lambda n=_n: lora_on_a_text("minllama", n),
        "minllama-checkpointing": lambda n=_n: lora_on_a_text("minllama", n, checkpointing=True),
        "peft": lambda n=_n: lora_on_a_text("peft", n),
    }


def main() -> None:
    task, who = sys.argv[1:3]
    if who != "llama.cpp":
        os.environ["OMP_NUM_THREADS"] = str(THREADS)
    shown = sys.stdout
    value = {**TASKS, **GROWTH}[task][who]()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"value": value, "peak": peak}), file=shown)


if __name__ == "__main__":
    main()

"""`minllama serve` under load: chats, classifications, `/health`, and a soak at twice its capacity.

    python benchmarks/serving.py [chats] [open] [classify] [soak] [--clients 1 4 16 64]
        [--rounds 3] [--beside /path/to/llama-server --model FILE.gguf] [--seconds 600]
        [--results FILE]

Clients and server share the machine, which needs to be without other work. Chats have prompts of
some 200 tokens, of which a system message of some 150 is the same for all, and get 128 new ones;
classifications are sentences of SST-5 (`../shared/data`), by a head on the default model. With
--beside, llama.cpp's server answers the same chats from the same file, in turns with ours.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SYSTEM_TOKENS, USER_TOKENS, NEW_TOKENS = 150, 50, 128
N_SENTENCES = 1000
START_SECONDS = 120.0
SYSTEM = (
    "You are the assistant of a small shop that sells tea, coffee and cups by mail. Answer in a "
    "few friendly sentences. Parcels leave the house on the day of the order if it comes before "
    "noon, and take two days within the country and five days abroad. Whoever is not content may "
    "send back what has not been opened within thirty days, and gets the money back within a week. "
    "Do not promise what you cannot know, such as the day on which a parcel that is late will "
    "arrive; offer to ask the carrier instead. Prices are in euros and contain all taxes. Never "
    "give advice on health, nor on other shops. If a message is rude, stay polite. If it is not "
    "clear what somebody wants, ask one question. Sign with the name of the shop, which is Kettle "
    "and Leaf."
)


class Answered(NamedTuple):
    """One request: seconds to the first token and in all, and new tokens."""

    first: float
    total: float
    tokens: int


class Served(NamedTuple):
    """A server that runs."""

    url: str
    process: psutil.Process


def sentences() -> list[str]:
    """Those of SST-5's dev split."""
    lines = (DATA / "sst-dev.txt").read_text("utf-8").splitlines()
    return [line.partition("|||")[2].strip() or line for line in lines]


def chat_messages(number: int) -> list[dict[str, str]]:
    """A system message that all share, and a user's own."""
    rng = random.Random(number)
    words = " ".join(rng.sample(sentences(), 6)).split()[: int(USER_TOKENS * 0.8)]
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": " ".join(words)}]


@contextlib.contextmanager
def serving(command: list[str], port: int) -> Iterator[Served]:
    """A server for as long as it lasts."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        url = f"http://127.0.0.1:{port}"
        try:
            end = time.monotonic() + START_SECONDS
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"{url}/health").status_code == 200:
                        with contextlib.suppress(httpx.HTTPError):
                            ready = httpx.get(f"{url}/ready").status_code
                            if ready in (200, 404):  # llama.cpp's has /health only
                                break
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    raise SystemExit(log.read().decode("utf-8", "replace")[-2000:])
                time.sleep(0.1)
            yield Served(url, psutil.Process(process.pid))
        finally:
            process.terminate()
            process.wait(60)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def our_command(port: int, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "minllama", "serve", "--port", str(port), *arguments]


def their_command(program: str, model: str, port: int) -> list[str]:
    """llama.cpp's server: 16 slots, flash attention, two threads."""
    options = ["--parallel", "16", "--ctx-size", str(16 * 512), "--flash-attn", "on"]
    threads = str(os.cpu_count())
    return [program, "-m", model, "--port", str(port), "--threads", threads, *options]


class Health:
    """How long `/health` takes meanwhile, asked by a process of its own."""

    def __init__(self, url: str) -> None:
        code = (
            "import sys, time, httpx\n"
            "client = httpx.Client(timeout=30)\n"
            "while True:\n"
            "    start = time.perf_counter()\n"
            f"    ok = client.get('{url}/health').status_code == 200\n"
            "    print(time.perf_counter() - start if ok else 99.0, flush=True)\n"
            "    time.sleep(0.05)\n"
        )
        self._process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        self.seconds: list[float] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.seconds.append(float(line))

    def end(self) -> list[float]:
        self._process.terminate()
        self._process.wait()
        self._thread.join(5)
        return self.seconds


async def chat(url: str, model: str, number: int) -> Answered:
    """One streamed chat, over a connection of its own.

    Of HTTP it reads no more than it needs, since clients take their time from the server's.
    """
    body = {
        "model": model,
        "messages": chat_messages(number),
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    content = json.dumps(body).encode()
    host = url.removeprefix("http://")
    start, first, last = time.perf_counter(), 0.0, b""
    reader, writer = await asyncio.open_connection(*host.split(":"), limit=2**20)
    try:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        writer.write(head.encode() + content)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(status.decode().partition(" ")[2].strip())
        async for line in reader:
            if not line.startswith(b"data: "):
                continue
            if line.startswith(b"data: [DONE]"):
                break
            last = line
            if not first and b'"content":"' in line and b'"content":""' not in line:
                first = time.perf_counter() - start
    finally:
        writer.close()
    event = json.loads(last[6:] or b"{}")
    if not event.get("usage"):
        raise RuntimeError(f"an answer without an end: {event}")
    return Answered(first, time.perf_counter() - start, event["usage"]["completion_tokens"])


def first_model(url: str) -> str:
    """The name of the first model that is served."""
    name: str = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    return name


async def closed(url: str, n_clients: int, n_requests: int, seed: int) -> dict[str, Any]:
    """Clients that send their next chat when they have the answer to the last one."""
    numbers = iter(range(seed * 10_000, seed * 10_000 + n_requests))
    answers: list[Answered] = []

    model = first_model(url)

    async def one() -> None:
        for number in numbers:
            answers.append(await chat(url, model, number))

    start = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(n_clients)))
    seconds = time.perf_counter() - start
    return summary(answers, seconds)


async def arriving(url: str, rate: float, n_requests: int, seed: int) -> dict[str, Any]:
    """Chats that arrive at random, so many a second, whether or not others are answered."""
    rng = random.Random(seed)
    answers: list[Answered] = []

    model = first_model(url)

    async def one(number: int) -> None:
        answers.append(await chat(url, model, number))

    start = time.perf_counter()
    tasks = []
    for number in range(n_requests):
        tasks.append(asyncio.create_task(one(seed * 10_000 + number)))
        await asyncio.sleep(rng.expovariate(rate))
    await asyncio.gather(*tasks)
    seconds = time.perf_counter() - start
    return {"rate": rate, **summary(answers, seconds)}


def summary(answers: list[Answered], seconds: float) -> dict[str, Any]:
    firsts, totals = [a.first for a in answers], [a.total for a in answers]
    return {
        "requests": len(answers),
        "tokens/s": round(sum(a.tokens for a in answers) / seconds, 1),
        "first p50": percentile(firsts, 50),
        "first p99": percentile(firsts, 99),
        "all p50": percentile(totals, 50),
        "all p99": percentile(totals, 99),
    }


def percentile(values: list[float], percent: float) -> float:
    """The smallest value that so many percent do not exceed."""
    ordered = sorted(values)
    place = max(0, -(-len(ordered) * percent // 100) - 1)
    return round(ordered[int(place)], 4)


RESULTS: list[Path] = []


def report(task: str, who: str, **fields: Any) -> dict[str, Any]:
    """A row, printed, and appended to the file of results, if there is one."""
    row = {"task": task, "who": who, **fields}
    print(json.dumps(row), flush=True)
    for path in RESULTS:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return row


def with_health(served: Served, run: Any) -> dict[str, Any]:
    """What a load gives, `/health` meanwhile, and memory after it."""
    health = Health(served.url)
    time.sleep(0.5)
    fields = dict(run) if isinstance(run, dict) else asyncio.run(run)
    seconds = health.end()
    return {
        **fields,
        "health p99": percentile(seconds, 99),
        "health max": round(max(seconds), 4),
        "MB": memory(served),
    }


def memory(served: Served) -> int:
    return int(served.process.memory_info().rss / 1e6)


def chats(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for number in range(options.rounds):
        contenders = [("minllama", lambda port: our_command(port, *options.serve))]
        if options.beside:
            contenders.append(
                ("llama.cpp", lambda port: their_command(options.beside, options.model, port))
            )
        for who, command in contenders:
            port = free_port()
            with serving(command(port), port) as served:
                asyncio.run(closed(served.url, 1, 1, 99))  # what is made at the first request
                for n_clients in options.clients:
                    n_requests = max(4, 3 * n_clients) if n_clients < 64 else 2 * n_clients
                    run = closed(served.url, n_clients, n_requests, 1 + number)
                    fields = with_health(served, run)
                    rows.append(report(f"chats of {n_clients}", who, **fields))
    return rows


def open_arrival(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for number in range(options.rounds):
        port = free_port()
        with serving(our_command(port, *options.serve), port) as served:
            asyncio.run(closed(served.url, 1, 1, 99))
            for rate in options.rates:
                n_requests = max(20, int(20 * rate))
                fields = with_health(served, arriving(served.url, rate, n_requests, 1 + number))
                rows.append(report("chats that arrive", "minllama", **fields))
    return rows


def make_classifier(folder: Path) -> None:
    """A head of five classes on the default model: what it says does not matter here."""
    import torch

    import minllama

    torch.manual_seed(0)
    llama = minllama.load_pretrained(quantize="auto")
    tokenizer = minllama.Tokenizer.from_pretrained()
    labels = ["awful", "bad", "average", "good", "excellent"]
    minllama.LlamaEmbeddingClassifier(llama, tokenizer, labels).save_pretrained(folder)


def library_rate(folder: Path) -> float:
    """Texts a second of `predict_proba`, in a process of its own."""
    code = (
        "import sys, time, minllama\n"
        "from serving import sentences\n"
        f"texts = sentences()[:{N_SENTENCES}]\n"
        "classifier = minllama.load_classifier(sys.argv[1])\n"
        "classifier.predict_proba(texts[:64])\n"
        "start = time.perf_counter()\n"
        "classifier.predict_proba(texts)\n"
        "print(len(texts) / (time.perf_counter() - start))\n"
    )
    here = str(Path(__file__).resolve().parent)
    paths = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-c", code, str(folder)]
    result = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=True
    )
    return float(result.stdout)


async def classify(url: str, model: str, texts: list[str], per_request: int, n_clients: int) -> Any:
    """Texts a second, so many in a request, and so many requests at a time."""
    parts = iter([texts[i : i + per_request] for i in range(0, len(texts), per_request)])
    seconds_each: list[float] = []

    async def one(client: httpx.AsyncClient) -> None:
        for part in parts:
            begin = time.perf_counter()
            answer = await client.post("/classify", json={"model": model, "input": part})
            answer.raise_for_status()
            assert len(answer.json()["data"]) == len(part)
            seconds_each.append(time.perf_counter() - begin)

    async with httpx.AsyncClient(base_url=url, timeout=900) as client:
        start = time.perf_counter()
        await asyncio.gather(*(one(client) for _ in range(n_clients)))
        rate = len(texts) / (time.perf_counter() - start)
    return {
        "texts/s": round(rate, 1),
        "all p50": percentile(seconds_each, 50),
        "all p99": percentile(seconds_each, 99),
    }


def classifications(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    texts = sentences()[:N_SENTENCES]
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "head"
        make_classifier(folder)
        for _ in range(options.rounds):
            rate = library_rate(folder)
            rows.append(report("1000 texts", "library", **{"texts/s": round(rate, 1)}))
            port = free_port()
            with serving(our_command(port, str(folder)), port) as served:
                asyncio.run(classify(served.url, "head", texts[:64], 8, 8))
                for per_request, n_clients in ((1000, 1), (32, 4), (1, 64)):
                    run = classify(served.url, "head", texts, per_request, n_clients)
                    fields = with_health(served, run)
                    task = f"1000 texts, {per_request} a request, {n_clients} at a time"
                    rows.append(report(task, "minllama serve", **fields))
    return rows


async def overload(url: str, n_clients: int, seconds: float, served: Served) -> dict[str, Any]:
    """Clients that do not wait for anything: answered, refused (429), and memory by the minute."""
    counts = {"answered": 0, "refused": 0, "failed": 0, "unanswered": 0}
    end = time.monotonic() + seconds
    memories = [memory(served)]

    model = first_model(url)

    async def one(number: int) -> None:
        while time.monotonic() < end:
            number += n_clients
            try:
                await chat(url, model, number)
                counts["answered"] += 1
            except RuntimeError as error:
                counts["refused" if str(error).startswith("429") else "failed"] += 1
                await asyncio.sleep(0.2)
            except (OSError, asyncio.IncompleteReadError, ValueError):
                counts["unanswered"] += 1

    async def watch() -> None:
        while time.monotonic() < end:
            await asyncio.sleep(max(1.0, seconds / 20))
            memories.append(memory(served))

    await asyncio.gather(watch(), *(one(number) for number in range(n_clients)))
    return {**counts, "MB by twentieths": memories}


def soak(options: argparse.Namespace) -> list[dict[str, Any]]:
    port = free_port()
    # Twice as many clients as may run and wait together.
    bounds = ["--max-sequences", "16", "--max-queue", "16"]
    with serving(our_command(port, *bounds, *options.serve), port) as served:
        asyncio.run(closed(served.url, 1, 1, 99))
        fields = with_health(served, overload(served.url, 64, options.seconds, served))
        return [report("soak of 64 clients", "minllama", seconds=options.seconds, **fields)]


TASKS = {"chats": chats, "open": open_arrival, "classify": classifications, "soak": soak}


def medians(rows: list[dict[str, Any]]) -> None:
    """Median [min, max] of each figure of each task."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["task"] + f" {row.get('rate', '')}", row["who"]), []).append(row)
    for (task, who), some in groups.items():
        parts = []
        for name in some[0]:
            values = [row[name] for row in some]
            if isinstance(values[0], int | float) and name not in ("requests", "rate"):
                low, high = min(values), max(values)
                parts.append(f"{name} {statistics.median(values):g} [{low:g}, {high:g}]")
        print(f"{task} · {who}: {', '.join(parts)}, n = {len(some)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--beside", metavar="LLAMA-SERVER")
    parser.add_argument("--model", help="the GGUF that --beside serves")
    parser.add_argument("--serve", nargs="*", default=[], help="arguments for minllama serve")
    parser.add_argument("--seconds", type=float, default=600, help="of the soak")
    parser.add_argument("--results", metavar="FILE", help="rows as JSON lines, too")
    options = parser.parse_args()
    if options.results:
        RESULTS.append(Path(options.results))
    rows: list[dict[str, Any]] = []
    for task in options.tasks or list(TASKS):
        rows += TASKS[task](options)
    medians(rows)


if __name__ == "__main__":
    main()

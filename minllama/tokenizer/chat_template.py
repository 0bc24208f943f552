"""Render messages with a chat model's Jinja template.

A template is untrusted, so it is rendered in a separate process with limits on time and memory
(`minllama.tokenizer.template_worker`). Users' messages cannot imitate a model's special tokens:
`render_masked` keeps the two apart. Conversations and prompts call it.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from minllama.errors import MinllamaError
from minllama.text import cut, printable

RENDER_SECONDS = 5.0  # most take well under a millisecond
RENDER_MEMORY_BYTES = 512 * 2**20
RENDER_MAX_CHARS = 2**24  # several times the longest context
MAX_DEPTH = 100  # of lists and objects in a message
_OUT_OF_MEMORY_STATUS = 77  # with which the worker exits
_FAULT_CHARS = 300  # of a template's own words in an error message

_WORKER = Path(__file__).with_name("template_worker.py")
# The worker renders downloaded text: it gets no access tokens or keys from the environment.
_WORKER_ENVIRONMENT = ("PATH", "PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")

# Supplementary private-use area A: no character there has a meaning, nor counts as white space.
_PRIVATE_USE = range(0xF0000, 0xFFFFE)

# Names of a message's reasoning, as in transformers: the first that is present counts.
REASONING = ("reasoning_content", "thinking", "reasoning")

COMPARES_WITH_NONE = re.compile(r"\bis\s+(not\s+)?none\b", re.IGNORECASE)

Message = Mapping[str, Any]


class ChatTemplate:
    """A checkpoint's chat template.

    Renders as `apply_chat_template` of transformers does: the same Jinja settings, filters and
    functions, and `tools` and `documents` are there, as None, when not given. What is None in a
    message counts as absent; a template that needs a content anyway, to join it to other
    text, gets an empty one. Safe to use from several threads, which take turns.

    Args:
        source: the template, in Jinja.
        bos_token: text of the token that begins a text; templates know it by this name.
        eos_token: text of the token that ends one.
        special_tokens: further ones by the names that templates have for them (`unk_token`,
            `pad_token`), each a text or a list of texts.
    """

    def __init__(
        self,
        source: str,
        *,
        bos_token: str = "",
        eos_token: str = "",
        special_tokens: Mapping[str, str | list[str]] | None = None,
    ) -> None:
        self.source = source
        self.special_tokens = {
            "bos_token": bos_token,
            "eos_token": eos_token,
            **_plain(special_tokens or {}, "the special tokens"),
        }
        self._lock = threading.Lock()
        self._worker: _Worker | None = None

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text of `messages`, in order.

        Args:
            messages: each with a `role`, and with `content`: a string, a list of parts, or None.
            add_generation_prompt: end with what opens the assistant's next turn.
            variables: whatever else the template reads: `tools`, `date_string`.

        Raises:
            MinllamaError: a message is malformed; the template has an error, refuses the messages,
                takes longer than RENDER_SECONDS, or needs too much memory.
        """
        checked = _checked_messages(messages)
        return self._render(checked, add_generation_prompt, _plain(variables, "the variables"))

    def render_masked(
        self,
        messages: Sequence[Message],
        special_tokens: Collection[str],
        *,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> tuple[str, dict[str, str]]:
        """Render with every special token in users' text masked by a placeholder.

        A placeholder is one private-use character that occurs nowhere else; it stands for exactly
        the special token's text, so that a template's `trim` and its like act as usual. Pieces of
        neighboring contents that would make up a special token once a template joins them are
        masked too.

        Args:
            messages: as in `render`.
            special_tokens: the texts of the tokens that users must not be able to write.
            add_generation_prompt: as in `render`.
            variables: as in `render`; the strings inside them are masked too.

        Returns:
            The text, and placeholder -> the text it stands for, to be encoded as plain text. With
            nothing to mask, the text is exactly that of `render`.
        """
        checked = _checked_messages(messages)
        plain = _plain(variables, "the variables")
        shown = [self.source, self.special_tokens, *special_tokens, checked, plain]
        mask = _Mask(special_tokens, shown)
        checked, plain = mask.apply(checked), mask.apply(plain)
        mask.apply_across(_contents(checked))
        return self._render(checked, add_generation_prompt, plain), mask.literals

    def _render(
        self, messages: list[Any], add_generation_prompt: bool, variables: dict[str, Any]
    ) -> str:
        request = {
            **self.special_tokens,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **variables,
            "messages": messages,
        }
        n_chars = sum(map(len, _strings([messages, variables])))
        if n_chars > RENDER_MAX_CHARS:
            raise MinllamaError(
                f"the messages have {n_chars} characters, but at most {RENDER_MAX_CHARS} are "
                "supported; shorten them"
            )
        with self._lock:
            reply = self._ask(request)
            if "fault" in reply and any("content" not in message for message in messages):
                reply = self._ask_with_contents(request, reply)
        if "text" in reply:
            return str(reply["text"])
        raise MinllamaError(_fault_line(reply))

    def _ask_with_contents(self, request: dict[str, Any], fault: dict[str, Any]) -> dict[str, Any]:
        """The reply when messages without content get one; `fault`, the reply without, if none.

        Some templates join contents to other text, and some ask first whether one is none.
        """
        for content in (None, "") if COMPARES_WITH_NONE.search(self.source) else ("",):
            filled = [{"content": content, **message} for message in request["messages"]]
            reply = self._ask({**request, "messages": filled})
            if "text" in reply:
                return reply
        return fault

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._worker is None or not self._worker.is_usable():
            self._worker = _Worker(self.source)
        return self._worker.ask(request)


class _Worker:
    """One running process that renders one template, ended with this object at the latest."""

    def __init__(self, source: str) -> None:
        environment = {name: os.environ[name] for name in _WORKER_ENVIRONMENT if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        try:
            # -P: the worker's neighbors (config.py, errors.py) are not top-level modules.
            self._process = subprocess.Popen(
                [sys.executable, "-P", _WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        except OSError as error:
            raise MinllamaError(
                f"cannot start a process to render the chat template: {error.strerror}"
            ) from error
        weakref.finalize(self, _end, self._process)
        settings = {
            "source": source,
            "seconds": RENDER_SECONDS,
            "memory_bytes": RENDER_MEMORY_BYTES,
            "max_chars": RENDER_MAX_CHARS,
            "out_of_memory_status": _OUT_OF_MEMORY_STATUS,
        }
        self._first_line = _to_line(settings)

    def is_usable(self) -> bool:
        """Whether it runs; after a fork the child finds that it has no such process."""
        return self._process.poll() is None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The worker's reply; `{"died": exit status}` where there is none."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line, self._first_line = self._first_line + _to_line(request), b""
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
            reply = self._process.stdout.readline(8 * RENDER_MAX_CHARS)
        except BrokenPipeError:
            reply = b""
        except BaseException:  # Ctrl-C: the worker's next reply would answer another request
            self._process.kill()
            self._process.wait()
            raise
        if not reply.endswith(b"\n"):
            return {"died": self._process.wait()}
        answer: dict[str, Any] = json.loads(reply.decode("utf-8", "surrogatepass"))
        return answer


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with process:  # closes the pipes and waits
        pass


def _to_line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _fault_line(reply: dict[str, Any]) -> str:
    """One line for people from a reply without text."""
    if "refusal" in reply:
        return f"the chat template rejects these messages: {_one_line(reply['refusal'])}"
    if "fault" in reply:
        where = "" if reply["line"] is None else f" at line {reply['line']}"
        fault = f"fails{where}: {_one_line(reply['fault'])}"
    elif reply["died"] == -signal.SIGALRM:
        fault = f"takes more than {RENDER_SECONDS:g} s"
    elif reply["died"] == _OUT_OF_MEMORY_STATUS:
        fault = f"needs more than {RENDER_MEMORY_BYTES // 2**20} MiB of memory"
    else:
        fault = f"crashes the rendering process (status {reply['died']})"
    return f"the chat template {fault.rstrip('.')}; use another template"


def _one_line(words: str) -> str:
    """A template's own words: no control characters for the terminal, and not too many."""
    words = " ".join(str(words)[: 2 * _FAULT_CHARS].split())
    return cut(printable(words), _FAULT_CHARS)


def _checked_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """A copy of `messages` in plain JSON types; a MinllamaError where one is malformed."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise MinllamaError(f"messages must be a list of messages, not {type(messages).__name__}")
    result = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise MinllamaError(
                f"{where} must be an object with role and content, not {type(message).__name__}"
            )
        plain = _plain(message, where)
        if not isinstance(plain.get("role"), str) or not plain["role"]:
            raise MinllamaError(f"{where} must have a role, such as 'user'")
        # An assistant's tool call comes without content.
        if not {"content", "tool_calls", "function_call"} & set(plain):
            raise MinllamaError(f"{where} must have content")
        content = plain.get("content")
        parts = isinstance(content, list) and all(isinstance(part, dict) for part in content)
        if not (content is None or isinstance(content, str) or parts):
            raise MinllamaError(f"{where}: content must be a string or a list of parts")
        result.append(_without_nothing(plain))
    return result


def _without_nothing(message: dict[str, Any]) -> dict[str, Any]:
    """A message without what is None, and with its reasoning under the names that templates read.

    As transformers has it (`apply_chat_template`): templates would write None as a word.
    """
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[key] for key in REASONING if key in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of `value` in plain JSON types, which have no methods of their own."""
    if depth > MAX_DEPTH:
        raise MinllamaError(f"{where}: nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        if other_keys := [key for key in value if not isinstance(key, str)]:
            raise MinllamaError(f"{where}: the key {other_keys[0]!r} must be a string")
        return {key: _plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where, depth + 1) for item in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise MinllamaError(f"{where}: contains a {type(value).__name__}, which templates cannot read")


class _Mask:
    """Placeholders for the special tokens in users' strings.

    Attributes:
        literals: placeholder -> the text it stands for.
    """

    def __init__(self, special_tokens: Collection[str], shown: list[Any]) -> None:
        # The longest first, as a tokenizer matches them.
        tokens = sorted(filter(None, special_tokens), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
        self._shown = shown
        self._free: Iterator[str] | None = None
        self._placeholders: dict[str, str] = {}

    @property
    def literals(self) -> dict[str, str]:
        return {placeholder: text for text, placeholder in self._placeholders.items()}

    def apply(self, value: Any) -> Any:
        """A copy of `value` in which every special token in a string or key is masked."""
        if isinstance(value, str):
            return self._pattern.sub(lambda match: self._placeholder(match[0]), value)
        if isinstance(value, list):
            return [self.apply(item) for item in value]
        if isinstance(value, dict):
            return {self.apply(key): self.apply(item) for key, item in value.items()}
        return value

    def apply_across(self, contents: list[tuple[dict[str, Any], str]]) -> None:
        """Mask, in place, the pieces of special tokens that span neighboring `contents`.

        Templates trim contents and may put them side by side: `<|im_` and `end|>`.
        """
        texts = [holder[key].strip() for holder, key in contents]
        starts = [0]
        for text in texts:
            starts.append(starts[-1] + len(text))
        pieces = list(texts)
        # From the back, so that masking does not shift positions still to be masked.
        for match in reversed(list(self._pattern.finditer("".join(texts)))):
            for i in range(len(texts)):
                begin = max(match.start() - starts[i], 0)
                end = min(match.end() - starts[i], len(texts[i]))
                if begin < end:
                    masked = self._placeholder(texts[i][begin:end])
                    pieces[i] = pieces[i][:begin] + masked + pieces[i][end:]
        for (holder, key), text, piece in zip(contents, texts, pieces, strict=True):
            if piece != text:
                holder[key] = holder[key].replace(text, piece)

    def _placeholder(self, text: str) -> str:
        if text not in self._placeholders:
            if self._free is None:
                taken = set().union(*_strings(self._shown))
                self._free = (chr(code) for code in _PRIVATE_USE if chr(code) not in taken)
            placeholder = next(self._free, None)
            if placeholder is None:
                raise MinllamaError("the messages use up all private-use characters of Unicode")
            self._placeholders[text] = placeholder
        return self._placeholders[text]


def _contents(messages: list[dict[str, Any]]) -> list[tuple[dict[str, Any], str]]:
    """Where the texts of the messages are, in order: a dict and the key in it."""
    parents = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            parents.append((message, "content"))
        else:
            parents += [
                (part, "text") for part in content or [] if isinstance(part.get("text"), str)
            ]
    return parents


def _strings(value: Any) -> Iterator[str]:
    """Every string in `value`, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, dict):
        yield from value
        yield from _strings(list(value.values()))

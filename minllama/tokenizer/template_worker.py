"""The process that renders an untrusted chat template.

`minllama.tokenizer.chat_template` starts this file as a program. It reads one JSON object per line:
first the template and its limits, then the variables of each rendering, and answers each with one
line. Jinja's sandbox prevents access to attributes and changes to the variables, but not endless
loops or huge allocations; the operating system's resource limits do. Imports nothing of minllama.
"""

import contextlib
import json
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, Undefined, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Refusal(TemplateError):
    """The message of a template's own `raise_exception`."""


class GenerationBlock(Extension):
    """`{% generation %}`: marks an assistant's words for training; rendered as its content."""

    tags = {"generation"}  # noqa: RUF012  Jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, as in transformers: variables set inside are local.
        return nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Callable[[], str]) -> str:
        return caller()


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which any unsafe access raises an error immediately."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:
        raise SecurityError(f"it accesses {attribute!r} of a {type(obj).__name__}")


def environment() -> Sandbox:
    """Jinja as chat templates expect it: transformers' settings, filters and functions."""
    result = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, LoopControlExtension]
    )
    del result.globals["lipsum"]
    result.globals["raise_exception"] = _raise_exception
    result.globals["strftime_now"] = _strftime_now
    result.filters["tojson"] = _tojson
    return result


def _raise_exception(message: str) -> None:
    raise Refusal(str(message))


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _fault(error: Exception) -> dict[str, Any]:
    """An error and its line in the template, as values for JSON."""
    if isinstance(error, TemplateSyntaxError):
        return {"fault": error.message, "line": error.lineno}
    line, step = None, error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == "<template>":
            line = step.tb_lineno
        step = step.tb_next
    if isinstance(error, Refusal):
        return {"refusal": error.message}
    if isinstance(error, RecursionError):
        return {"fault": "it is nested too deeply, or recurses endlessly", "line": line}
    return {"fault": str(error) or type(error).__name__, "line": line}


def _warm_up(jinja: Sandbox) -> None:
    """Make Python and Jinja load the files that they would load on first use."""
    source = (
        r"{{ 'caf\xe9\n'|pprint|wordwrap|tojson }}{{ strftime_now('%c %Z') }}{{ nothing.at_all }}"
    )
    with contextlib.suppress(TemplateError):
        jinja.from_string(source).render()


def _limit(memory_bytes: int) -> None:
    """Give up memory beyond `memory_bytes`, core dumps, and all further files and sockets."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))
    # macOS has this limit but refuses to set it: only the deadline applies there.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))


def serve() -> None:
    """Answer requests until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent process
    # By default, SIGALRM ends the process even inside one long operation. The parent process may
    # have set another handling.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    settings = _receive(sys.stdin.buffer.readline())
    jinja = environment()
    _warm_up(jinja)
    _limit(settings["memory_bytes"])
    try:
        _answer_all(jinja, settings)
    except MemoryError:  # in a template, or while reading the messages
        sys.exit(settings["out_of_memory_status"])


def _answer_all(jinja: Sandbox, settings: dict[str, Any]) -> None:
    template = None
    for request in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, settings["seconds"])
        try:
            template = template or jinja.from_string(settings["source"])
            text = template.render(_receive(request))
            too_long = len(text) > settings["max_chars"]
            reply = (
                {"fault": "its output is too long", "line": None} if too_long else {"text": text}
            )
        except MemoryError:
            raise
        except Exception as error:
            reply = _fault(error)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(reply)


def _receive(line: bytes) -> Any:
    return json.loads(line.decode("utf-8", "surrogatepass"))


def _send(reply: dict[str, Any]) -> None:
    line = json.dumps(reply, ensure_ascii=False) + "\n"
    sys.stdout.buffer.write(line.encode("utf-8", "surrogatepass"))
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve()

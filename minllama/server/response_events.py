"""The answer of OpenAI's Responses API: as one object, and as the events that make it up."""

import time
from collections.abc import Iterator
from typing import Any

from minllama.generation.tool_calls import ToolCall
from minllama.server.chat_turn import Part
from minllama.server.openai_fields import new_id
from minllama.server.routing import compact
from minllama.server.texts import Texts

Item = dict[str, Any]


class ResponseEvents:
    """One response while it is made, and the events that tell of it.

    Args:
        echoed: fields of the request that the response repeats.
    """

    def __init__(self, echoed: dict[str, Any]) -> None:
        self._id, self._created = _id("resp"), int(time.time())
        self._echoed = echoed
        self._number = 0
        self._output: list[Item] = []  # items that are complete
        self._message: Item | None = None  # that is being written
        self._text = ""
        self._logprobs: list[Any] = []
        self._held: list[Any] = []  # log-probabilities whose text has not come

    def response(
        self,
        status: str,
        *,
        usage: dict[str, Any] | None = None,
        error: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The response so far."""
        is_cut = status == "incomplete"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            **self._echoed,
            "output": list(self._output),
            "usage": usage,
        }

    # Events

    def begin(self) -> Iterator[bytes]:
        """The first two events."""
        for name in ("created", "in_progress"):
            yield self._event(name, response=self.response("in_progress"))

    def add(self, part: Part, logprobs: list[Any]) -> Iterator[bytes]:
        """A bit of the reply, and all that ends with it where it is the last.

        Args:
            part: of the reply.
            logprobs: of its tokens, in the form of chats.
        """
        is_last = part.finish_reason is not None
        self._held += logprobs  # of a call, until there is text
        if part.text or (is_last and not part.calls):
            yield from self._open_message()
            if part.text or self._held:
                yield from self._write(part.text)
        if is_last:
            status = "incomplete" if part.finish_reason == "length" else "completed"
            yield from self._close_message(status)
            for call in part.calls:
                yield from self._call(call)

    def end(self, part: Part, usage: dict[str, Any]) -> bytes:
        """The last event."""
        status = status_of(part)
        return self._event(status, response=self.response(status, usage=usage))

    def fail(self, content: dict[str, Any]) -> bytes:
        """The last event where an error has ended the reply; its content in OpenAI's form."""
        error = content["error"]
        code = "rate_limit_exceeded" if error["type"] == "rate_limit_error" else "server_error"
        said = {"code": code, "message": error["message"]}
        return self._event("failed", response=self.response("failed", error=said))

    def _open_message(self) -> Iterator[bytes]:
        if self._message is not None:
            return
        self._message = {"id": _id("msg"), "type": "message", "role": "assistant"}
        item = {**self._message, "status": "in_progress", "content": []}
        yield self._event("output_item.added", output_index=0, item=item)
        yield self._of_content("content_part.added", part=_text_part("", []))

    def _write(self, text: str) -> Iterator[bytes]:
        logprobs, self._held = self._held, []
        self._text += text
        self._logprobs += logprobs
        yield self._of_content("output_text.delta", delta=text, logprobs=logprobs)

    def _close_message(self, status: str) -> Iterator[bytes]:
        if self._message is None:
            return
        part = _text_part(self._text, self._logprobs)
        yield self._of_content("output_text.done", text=self._text, logprobs=self._logprobs)
        yield self._of_content("content_part.done", part=part)
        self._output.append({**self._message, "status": status, "content": [part]})
        yield self._event("output_item.done", output_index=0, item=self._output[-1])

    def _call(self, call: ToolCall) -> Iterator[bytes]:
        place = len(self._output)
        item = {
            "id": _id("fc"),
            "type": "function_call",
            "call_id": _id("call"),
            "name": call.name,
        }
        of_call = {"item_id": item["id"], "output_index": place}
        begun = {**item, "arguments": "", "status": "in_progress"}
        yield self._event("output_item.added", output_index=place, item=begun)
        name, arguments = "function_call_arguments", call.arguments
        yield self._event(f"{name}.delta", **of_call, delta=arguments)
        yield self._event(f"{name}.done", **of_call, name=call.name, arguments=arguments)
        self._output.append({**item, "arguments": arguments, "status": "completed"})
        yield self._event("output_item.done", output_index=place, item=self._output[-1])

    def _of_content(self, name: str, /, **fields: Any) -> bytes:
        assert self._message is not None
        place = {"item_id": self._message["id"], "output_index": 0, "content_index": 0}
        return self._event(name, **place, **fields)

    def _event(self, name: str, /, **fields: Any) -> bytes:
        kind, number = f"response.{name}", self._number
        self._number += 1
        content = compact({"type": kind, "sequence_number": number, **fields})
        return f"event: {kind}\ndata: {content}\n\n".encode(errors="replace")


def status_of(part: Part) -> str:
    """The status of a response whose reply has ended."""
    return "incomplete" if part.finish_reason == "length" else "completed"


def response_usage(texts: Texts) -> dict[str, Any]:
    """What a response has cost."""
    n_prompt, n_new = texts.n_prompt_tokens, texts.n_new_tokens
    details = {"cached_tokens": texts.n_cached_tokens, "cache_write_tokens": 0}
    return {
        "input_tokens": n_prompt,
        "input_tokens_details": details,
        "output_tokens": n_new,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": n_prompt + n_new,
    }


def _text_part(text: str, logprobs: list[Any]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": list(logprobs)}


def _id(prefix: str) -> str:
    return new_id(prefix).replace("-", "_", 1)

"""Token ids of texts and texts of token ids, as vLLM has them; evaluation harnesses use them."""

from typing import Any

from fastapi import Request, Response
from pydantic import Field

from minllama.generation.api import check_can_fit
from minllama.generation.conversation import encode_messages
from minllama.server.chat_turn import chosen_tools
from minllama.server.errors import RequestError
from minllama.server.openai_fields import TokenId, check_ids, shown_token
from minllama.server.registry import ServedModel
from minllama.server.routes.chat import Message
from minllama.server.routing import Body, check_count, compact, service_of
from minllama.server.routing import router as make_router
from minllama.server.service import Service
from minllama.tokenizer.tokenizer import Tokenizer

router = make_router()

# A text may be counted that is longer than a context, but not one that takes minutes.
MOST_TOKENS = 2**14


class TokenizeBody(Body):
    """A text, or messages; `parse_special` is llama.cpp's."""

    model: str | None = Field(None, max_length=512)
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = None
    parse_special: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template: Any = None
    chat_template_kwargs: Any = None

    def check_supported(self) -> None:
        """Refuse what would change the tokens and is not done here.

        Raises:
            RequestError: there is such a field, or not one of a text and messages.
        """
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("give either prompt, a text, or messages", param="prompt")
        for name in ("chat_template", "chat_template_kwargs"):
            if getattr(self, name):
                message = f"{name} is not supported: the template is the model's own"
                raise RequestError(message, param=name)
        if self.continue_final_message:
            raise RequestError(
                "continue_final_message is not supported: messages are complete",
                param="continue_final_message",
            )


class DetokenizeBody(Body):
    """Token ids."""

    model: str | None = Field(None, max_length=512)
    tokens: list[TokenId]


@router.post("/tokenize", response_model=None)
async def tokenize(request: Request, body: TokenizeBody) -> Response:
    """The token ids of a text, or of messages in the model's chat template.

    A text is read as templates' output is: special tokens that it spells are these tokens, unless
    `parse_special` is false. What messages spell is text.
    """
    service = service_of(request)
    service.check_accepting()
    model = service.registry.get(body.model)
    body.check_supported()
    ids = await (_of_text if body.messages is None else _of_messages)(service, model, body)
    words = model.tokenizer

    def written() -> str:  # takes its time where there are many
        spelled = [shown_token(words.token_bytes(i)) for i in ids if body.return_token_strs]
        return compact(
            {
                "count": len(ids),
                "max_model_len": model.context_len,
                "tokens": ids,
                "token_strs": spelled if body.return_token_strs else None,
            }
        )

    content = await service.in_thread(written)
    return Response(content.encode(errors="replace"), media_type="application/json")


async def _of_text(service: Service, model: ServedModel, body: TokenizeBody) -> list[int]:
    words, text = model.tokenizer, body.prompt or ""
    has_ends = body.add_special_tokens is not False
    special = body.parse_special is not False

    def encoded() -> list[int]:
        check_can_fit(text, words, max(model.context_len, MOST_TOKENS))
        if not has_ends:
            return words.encode(text, bos=False, eos=False, special=special)
        ids = words.encode(text, special=special)
        is_twice = ids[:2] == [words.bos_id, words.bos_id]  # the text has begun with it
        return ids[1:] if words.add_bos and is_twice else ids

    return await service.in_thread(encoded)


async def _of_messages(service: Service, model: ServedModel, body: TokenizeBody) -> list[int]:
    messages = [message.plain(place) for place, message in enumerate(body.messages or ())]
    tools = chosen_tools(service, body.tools).tools
    opens = body.add_generation_prompt is not False
    words = model.tokenizer

    def encoded() -> list[int]:
        ids = encode_messages(
            model.template(),
            words,
            messages,
            max(model.context_len, MOST_TOKENS),
            tools=tools,
            add_generation_prompt=opens,
        )
        has_bos = body.add_special_tokens and words.add_bos and words.bos_id is not None
        return [words.bos_id, *ids] if has_bos else ids  # type: ignore[list-item]

    return await service.in_thread(encoded)


@router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeBody) -> dict[str, str]:
    """The text of token ids, special tokens included."""
    service = service_of(request)
    service.check_accepting()
    model = service.registry.get(body.model)
    check_count("tokens", len(body.tokens), max(model.context_len, 2**20), least=0)
    check_ids("tokens", body.tokens, model)
    text = await service.in_thread(model.tokenizer.decode, body.tokens, skip_special=False)
    return {"prompt": text}


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request, model: str | None = None) -> dict[str, Any]:
    """What Hugging Face's `tokenizer_config.json` says of a tokenizer."""
    served = service_of(request).registry.get(model)
    words = served.tokenizer
    named = {
        f"{name}_token": None if token_id is None else words.token_text(token_id)
        for name, token_id in (
            ("bos", words.bos_id),
            ("eos", words.eos_id),
            ("pad", words.pad_id),
        )
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model": served.id,
        "vocab_size": words.vocab_size,
        "model_max_length": served.context_len,
        **named,
        "unk_token": _unknown(words),
        "bos_token_id": words.bos_id,
        "eos_token_id": words.eos_id,
        "pad_token_id": words.pad_id,
        "add_bos_token": words.add_bos,
        "add_eos_token": words.add_eos,
        "added_tokens_decoder": {
            str(token_id): {"content": text, "special": True}
            for text, token_id in words.special_tokens.items()
        },
        "chat_template": _template(served),
    }


def _unknown(words: Tokenizer) -> str | None:
    named = words.vocabulary.named_tokens.get("unk_token")
    return named if isinstance(named, str) else None


def _template(model: ServedModel) -> str | None:
    """The default template's source; None where there is none."""
    try:
        return model.template().source
    except RequestError:
        return None

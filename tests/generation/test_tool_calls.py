"""Tool calls: prompts of tools, constrained calls, replies read as calls; by literal strings."""

import json
import random
from typing import Any

import pytest

from minllama.errors import MinllamaError, OptionError
from minllama.generation.api import generate
from minllama.generation.constraints import grammar_maker
from minllama.generation.conversation import encode_messages
from minllama.generation.tool_calls import (
    HERMES,
    LLAMA_3,
    ReplyReader,
    Tool,
    ToolCall,
    call_constraint,
    call_form,
    read_reply,
    tools_of,
    with_tools,
)
from minllama.options import GenerationOptions
from minllama.tokenizer.chat_template import ChatTemplate
from tests.generation.test_generation import model, tokenizer  # noqa: F401  (fixtures)
from tests.tokenizer.test_chat_template import CHATML
from tests.tokenizer.test_chat_template import LLAMA_3 as LLAMA_3_TEMPLATE

# In the manner of Qwen's.
QWEN = """{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>\
{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% for c in m.tool_calls or []\
 %}<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\
\n</tool_call>{% endfor %}{% endfor %}"""

PLACE: dict[str, Any] = {
    "type": "object",
    "$defs": {"unit": {"enum": ["C", "F"]}},
    "properties": {"place": {"enum": ["Rome", "Köln"]}, "unit": {"$ref": "#/$defs/unit"}},
    "required": ["place", "unit"],
    "additionalProperties": False,
}
WEATHER = Tool("weather", "What is it like?", PLACE)
NOW = Tool("now")
TOOLS = [WEATHER, NOW]
NAMES = ["weather", "now"]


def test_definitions_are_those_of_openai():
    definitions = [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "description": "What is it like?",
                "parameters": PLACE,
                "strict": True,
            },
        },
        {"type": "function", "function": {"name": "now", "parameters": None}},
    ]
    assert tools_of(definitions) == TOOLS
    assert TOOLS[1].definition == {
        "type": "function",
        "function": {
            "name": "now",
            "description": "",
            "parameters": {"type": "object", "properties": {}, "additionalProperties": False},
        },
    }


@pytest.mark.parametrize(
    ("definitions", "message"),
    [
        ("f", "tools must be a list"),
        ({"type": "function"}, "tools must be a list"),
        ([1], r"tools\[0\] must be"),
        ([{"type": "retrieval"}], r"tools\[0\] must be"),
        ([{"type": "function", "function": "f"}], r"tools\[0\] must be"),
        ([{"type": "function", "function": {}}], "a tool's name has 1 to 64 .* unlike ''"),
        ([{"type": "function", "function": {"name": "a b"}}], "unlike 'a b'"),
        ([{"type": "function", "function": {"name": "a\n"}}], "a tool's name"),
        ([{"type": "function", "function": {"name": 3}}], "unlike 3"),
        ([{"type": "function", "function": {"name": "x" * 65}}], "a tool's name"),
        ([{"type": "function", "function": {"name": "f", "parameters": []}}], "must be a JSON sch"),
        (
            [{"type": "function", "function": {"name": "f", "parameters": {"type": "string"}}}],
            "of type object",
        ),
        ([{"type": "function", "function": {"name": "f", "description": 1}}], "description must"),
        ([{"type": "function", "function": {"name": "f"}}] * 2, "there is a tool f before it"),
    ],
)
def test_what_is_no_definition_is_refused_in_one_line(definitions, message):
    with pytest.raises(OptionError, match=message) as caught:
        tools_of(definitions)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_the_form_of_calls_is_the_templates():
    assert call_form(QWEN) == HERMES
    assert call_form(LLAMA_3_TEMPLATE) == LLAMA_3
    assert call_form("{%- if builtin_tools %}{{ '<|python_tag|>' }}{% endif %}") == LLAMA_3
    assert call_form('in the format {"name": .., "parameters": ..}') == LLAMA_3
    assert call_form(CHATML) == HERMES
    assert HERMES.written("f", "{}") == (
        '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    )
    assert LLAMA_3.written("f", "{}") == '{"name": "f", "parameters": {}}'


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Rain?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "1",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"place": "Köln", "unit": "C"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": "7.5"},
]


def test_a_template_that_knows_tools_gets_them_and_arguments_as_objects():
    messages, variables = with_tools(QWEN, TALK, [NOW])
    assert variables == {"tools": [NOW.definition]}
    rendered = ChatTemplate(QWEN).render(messages, **variables)
    assert rendered == (
        f"<tools>{json.dumps(NOW.definition)}</tools><system>Be brief.<user>Rain?<assistant>"
        '<tool_call>\n{"name": "weather", "arguments": {"place": "Köln", "unit": "C"}}\n'
        "</tool_call><tool>7.5"
    )
    assert TALK[2]["tool_calls"][0]["function"]["arguments"] == '{"place": "Köln", "unit": "C"}'
    llama = ChatTemplate(LLAMA_3_TEMPLATE, bos_token="<s>")
    messages, variables = with_tools(LLAMA_3_TEMPLATE, TALK, [NOW])
    rendered = llama.render(messages, date_string="1 Jan", **variables)
    assert '{"name": "weather", "parameters": {"place": "Köln", "unit": "C"}}<|eot_id|>' in rendered
    assert with_tools(QWEN, TALK[:2], []) == (TALK[:2], {})


def test_a_template_that_knows_no_tools_gets_them_as_text():
    messages, variables = with_tools(CHATML, TALK, [NOW])
    assert variables == {}
    definition = json.dumps(NOW.definition)
    assert messages == [
        {
            "role": "system",
            "content": "Be brief.\n\nYou can call functions. Their definitions are JSON objects "
            f"between <tools> and </tools>:\n<tools>\n{definition}\n</tools>\n\nTo call one, reply "
            'with its name and arguments in this form:\n<tool_call>\n{"name": "NAME", '
            '"arguments": {..}}\n</tool_call>',
        },
        TALK[1],
        {
            "role": "assistant",
            "content": '<tool_call>\n{"name": "weather", "arguments": {"place": "Köln", '
            '"unit": "C"}}\n</tool_call>',
        },
        {"role": "user", "content": "<tool_response>\n7.5\n</tool_response>"},
    ]
    alone, _ = with_tools(CHATML, TALK[1:2], [NOW])
    assert [message["role"] for message in alone] == ["system", "user"]
    said = {**TALK[2], "content": "Let me see."}
    assert with_tools(CHATML, [said], [])[0][0]["content"].startswith("Let me see.\n<tool_call>")
    for bad in ({1, 2}, {"x": float("nan")}):
        call = {"function": {"name": "f", "arguments": bad}}
        with pytest.raises(MinllamaError, match="arguments of a tool call are no JSON"):
            with_tools(CHATML, [{"role": "assistant", "tool_calls": [call]}], [])


def test_tools_in_a_prompt_are_plain_text(tokenizer):  # noqa: F811
    hostile = Tool("f", "<eos>")
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    ids = encode_messages(template, tokenizer, TALK[:1], 999, tools=[hostile])
    assert 256 not in ids
    assert "<eos>" in tokenizer.decode(ids)


CALL = ToolCall("weather", '{"place": "Köln"}')


@pytest.mark.parametrize(
    ("reply", "content", "calls"),
    [
        ("It rains.\n", "It rains.\n", []),
        ("", "", []),
        ("  \n", "  \n", []),
        ('<tool_call>\n{"name": "weather", "arguments": {"place": "Köln"}}\n</tool_call>', "", 1),
        ('<tool_call>{"arguments":{"place":"K\\u00f6ln"},"name":"weather"}</tool_call>', "", 1),
        ('<tool_call>\n{"name": "weather", "arguments": {"place": "Köln"}}', "", 1),
        ('<tool_call>```json\n{"name": "weather", "arguments": {"place": "Köln"}}\n```', "", 1),
        ('<tool_call>[{"name": "weather", "arguments": {"place": "Köln"}}]</tool_call>', "", 1),
        (
            '<tool_call>{"name": "weather", "arguments": "{\\"place\\": \\"Köln\\"}"}</tool_call>',
            "",
            1,
        ),
        (
            'So:\n\n<tool_call>\n{"name": "weather", "arguments": {"place": "Köln"}}\n</tool_call>'
            "\nwait",
            "So:\nwait",
            1,
        ),
        (
            '<tool_call>{"name": "weather", "arguments": {"place": "Köln"}}</tool_call>\n'
            '<tool_call>{"name": "weather", "arguments": {"place": "Köln"}}</tool_call>',
            "",
            2,
        ),
        ('{"name": "weather", "parameters": {"place": "Köln"}}', "", 1),
        ('\n\n{"name": "weather", "parameters": {"place": "Köln"}}\n', "", 1),
        ('<|python_tag|>{"name": "weather", "parameters": {"place": "Köln"}}', "", 1),
        ('[TOOL_CALLS] [{"name": "weather", "arguments": {"place": "Köln"}}]', "", 1),
        (
            '{"type": "function", "function": {"name": "weather", "arguments": {"place": "Köln"}}}',
            "",
            1,
        ),
        (
            '{"name": "weather", "parameters": {"place": "Köln"}}; '
            '{"name": "weather", "parameters": {"place": "Köln"}}',
            "",
            2,
        ),
        ('```json\n{"name": "weather", "parameters": {"place": "Köln"}}\n```', "", 1),
        ('{"name": "weather", "parameters": {"place": "Köln"}} Done.', "Done.", 1),
        (
            'I say <tool_call> often. <tool_call>{"name": "weather", "arguments": '
            '{"place": "Köln"}}</tool_call>',
            "I say\n<tool_call> often.",
            1,
        ),
        ('<tool_call>{"name": "now"}</tool_call>', "", [ToolCall("now", "{}")]),
        ('<tool_call>{"name": "now", "arguments": null}', "", [ToolCall("now", "{}")]),
        ('<tool_call>{"name": "made_up"}</tool_call>', "", [ToolCall("made_up", "{}")]),
        (
            '<tool_call>{"name": "now", "arguments": {"s": "</tool_call> <tool_call>"}}',
            "",
            [ToolCall("now", '{"s": "</tool_call> <tool_call>"}')],
        ),
        (
            '<tool_call>{"name": "now", "arguments": {"s": "\\ud800"}}</tool_call>',
            "",
            [ToolCall("now", '{"s": "\\ud800"}')],
        ),
    ],
)
def test_a_reply_is_read_as_text_and_calls(reply, content, calls):
    calls = [CALL] * calls if isinstance(calls, int) else calls
    assert read_reply(reply, NAMES) == (content, calls)


@pytest.mark.parametrize(
    "reply",
    [
        '{"name": "made_up", "parameters": {}}',  # JSON that somebody asked for
        '{"name": "Anna", "age": 3}',
        "[1, 2]",
        '[{"a": 1}]',
        "[1] is a footnote",
        "{'name': 'now', 'parameters': {}}",
        "```python\nnow()\n```",
        "now()",
        '<tool_call>{"name": "now", "arguments": {"a": 1',
        "<tool_call>",
        "<tool_call>now</tool_call>",
        '<tool_call>{"name": "now", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "now", "arguments": "x"}</tool_call>',
        '<tool_call>{"name": "now", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "now", "arguments": {"a": 1e999}}</tool_call>',
        '<tool_call>{"name": "a b", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
        '<tool_call>{"name": 3}</tool_call>',
        "<tool_call>" + "[" * 100_000,
        '<tool_call>{"name": "now", "arguments": {"a": ' + "9" * 5000 + "}}",
        "a <tool_cal",
        "`x`",
    ],
)
def test_what_is_no_call_is_text_unchanged(reply):
    assert read_reply(reply, NAMES) == (reply, [])


def test_a_reply_in_pieces_is_read_alike_and_shown_early():
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    parts = ["a < b", " \n", call, "{", "[", "```json\n", "```py", "<tool", "_call>", "x", " ",
             '{"name": "now", "parameters": {}}', "<|python_tag|>"]  # fmt: skip
    draws, n_calls = random.Random(2), 0
    for _ in range(3000):
        reply = "".join(draws.choices(parts, k=draws.randint(1, 6)))
        whole = read_reply(reply, NAMES)
        reader, text, place = ReplyReader(NAMES), "", 0
        while place < len(reply):
            step = draws.choice((1, 2, 7))
            text += reader.feed(reply[place : place + step])
            place += step
        rest, calls = reader.finish()
        assert (text + rest, calls) == whole, reply
        assert calls or whole[0] == reply
        n_calls += bool(calls)
    assert 500 < n_calls < 2500
    reader = ReplyReader(NAMES)
    shown = [reader.feed(part) for part in ("Hello", " wor", "ld <", "b> <too", "l", "> {", "x")]
    assert shown == ["Hello", " wor", "ld", " <b>", "", " <tool> {", "x"]


def constrained(words, net, tools, form, **changes):
    """What a random model says that is held to a call."""
    from minllama.engine.base import Engine
    from minllama.engine.scheduler import Scheduler
    from minllama.generation.api import text_request
    from minllama.generation.sequence_text import SequenceText

    options = GenerationOptions(max_new_tokens=200, temperature=1.5, seed=changes.pop("seed", 0))
    make = call_constraint(words, tools, form, net.config.vocab_size, **changes)
    request = text_request(words, [1], options, net.config.vocab_size, make_constraint=make)
    text = SequenceText(words, [1], options, stop_ids=request.stop_ids)
    scheduler = Scheduler(Engine(net))
    scheduler.add(request)
    while scheduler.is_busy:
        for token in scheduler.step():
            text.feed(token)
    return text.result


@pytest.mark.parametrize("form", [HERMES, LLAMA_3])
def test_a_forced_call_has_arguments_by_the_schema(form, model, tokenizer):  # noqa: F811
    pytest.importorskip("llguidance")
    for seed in range(4):
        result = constrained(tokenizer, model, [WEATHER], form, seed=seed)
        assert result.finish_reason == "stop"
        content, [call] = read_reply(result.text, NAMES)
        assert (content, call.name) == ("", "weather")
        arguments = json.loads(call.arguments)
        assert arguments.keys() == {"place", "unit"}
        assert arguments["place"] in ("Rome", "Köln")
        assert arguments["unit"] in ("C", "F")
        assert result.text == form.written("weather", json.dumps(arguments, ensure_ascii=False))


@pytest.mark.slow
def test_a_required_call_is_of_any_tool_and_perhaps_of_several(model, tokenizer):  # noqa: F811
    pytest.importorskip("llguidance")
    names, lengths = set(), set()
    for seed in range(16):
        result = constrained(tokenizer, model, TOOLS, LLAMA_3, seed=seed)
        names.add(read_reply(result.text, NAMES)[1][0].name)
        several = constrained(tokenizer, model, [NOW], HERMES, seed=seed, parallel=True)
        _, calls = read_reply(several.text, NAMES)
        assert {call.name for call in calls} <= {"now"}
        lengths.add(len(calls))
    assert names == {"weather", "now"}
    assert len(lengths) > 1


def test_a_tag_that_is_a_special_token_is_that_token(model):  # noqa: F811
    pytest.importorskip("llguidance")
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    from minllama.tokenizer.tokenizer import Tokenizer
    from minllama.tokenizer.vocabulary import Vocabulary

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Library(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<eos>", "<tool_call>"])
    data = library.to_str().encode()
    words = Tokenizer(Vocabulary("tokenizers", data, "test", eos_id=256))
    result = constrained(words, model, [NOW], HERMES)
    assert result.token_ids[0] == words.special_tokens["<tool_call>"]
    assert result.text == '\n{"name": "now", "arguments": {}}\n</tool_call>'  # special: not shown
    assert read_reply(result.text, NAMES)[1] == [ToolCall("now", "{}")]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"properties": {"a": {"type": "nothing"}}}, "the schema of tool f cannot be followed"),
        ({"properties": {"a": {"$ref": "#/$defs/b"}}}, "the schema of tool f cannot be followed"),
        ({"properties": {"a": {1, 2}}}, "its parameters are no JSON schema"),
        ({"properties": {"a": {"minimum": float("nan")}}}, "its parameters are no JSON schema"),
        ({"properties": {"a": {"pattern": "("}}}, "the schema of tool f cannot be followed"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused_in_one_line(
    parameters, message, tokenizer  # noqa: F811
):  # fmt: skip
    pytest.importorskip("llguidance")
    with pytest.raises(OptionError, match=message) as caught:
        call_constraint(tokenizer, [Tool("f", "", parameters)], HERMES, 258)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250
    assert "call_0" not in str(caught.value)
    with pytest.raises(OptionError, match=message):
        call_constraint(tokenizer, [NOW, Tool("f", "", parameters)], HERMES, 258)
    with pytest.raises(OptionError, match="a tool is required, and there is none"):
        call_constraint(tokenizer, [], HERMES, 258)


def test_a_schema_is_no_part_of_the_grammars_syntax(tokenizer):  # noqa: F811
    pytest.importorskip("llguidance")
    tool = Tool("f", 'x"\nstart: "y"', {"type": "object", "description": '"}\nstart: "y"\n'})
    assert call_constraint(tokenizer, [tool], HERMES, 258) is not None
    with pytest.raises(OptionError, match="mine cannot be followed"):
        grammar_maker(tokenizer, "start: (", 258, "mine")


def test_vocabularies_of_constraints_are_kept(model, tokenizer):  # noqa: F811
    pytest.importorskip("llguidance")
    from minllama.generation.constraints import _vocabulary

    assert _vocabulary(tokenizer, 258) is _vocabulary(tokenizer, 258)
    assert _vocabulary(tokenizer, 258) is not _vocabulary(tokenizer, 300)
    [result] = generate(model, tokenizer, "a", regex="b{3}", max_new_tokens=9)
    assert result.text == "bbb"


PICK = Tool(
    "pick",
    "",
    {
        "type": "object",
        "properties": {"side": {"enum": ["left", "right"]}},
        "required": ["side"],
        "additionalProperties": False,
        "not": {"required": ["x"]},
    },
)


def followed(words, make, text: str) -> str:
    """How far a constraint lets a text come, and whether it may end there."""
    import torch

    constraint = make()
    logits = torch.zeros(words.vocab_size)
    for token_id in words.encode(text, bos=False):
        logits = torch.zeros(words.vocab_size)
        constraint.forbid(logits)
        if logits[token_id] == -torch.inf:
            return "refused"
        constraint.accept(token_id)
    logits = torch.zeros(words.vocab_size)
    constraint.forbid(logits)
    return "may end" if logits[words.eos_id] == 0 else "goes on"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "may end"),
        ('Just {"a": 1} and a < b', "may end"),
        ("<tool", "may end"),
        ('Well.\n<tool_call>\n{"name": "pick", "arguments": {"side": "left"}}', "goes on"),
        (HERMES.written("pick", '{"side": "left"}'), "may end"),
        (HERMES.written("pick", '{"side": "left"}') * 2 + " done", "may end"),
        (HERMES.written("pick", '{"side": "up"}'), "refused"),
        (HERMES.written("other", "{}"), "refused"),
        ("<tool_call> is a word", "refused"),
    ],
)
def test_a_free_reply_is_held_from_a_calls_beginning_on(text, expected, tokenizer):  # noqa: F811
    pytest.importorskip("llguidance")
    make = call_constraint(tokenizer, [PICK], HERMES, 258, required=False)
    assert followed(tokenizer, make, text) == expected


def test_a_free_reply_needs_a_form_with_a_beginning(tokenizer):  # noqa: F811
    pytest.importorskip("llguidance")
    with pytest.raises(OptionError, match="cannot be told from text"):
        call_constraint(tokenizer, [PICK], LLAMA_3, 258, required=False)


def test_any_token_that_ends_a_text_may_end_a_constrained_one(tokenizer):  # noqa: F811
    pytest.importorskip("llguidance")
    import torch

    make = call_constraint(tokenizer, [PICK], HERMES, 258, required=False)
    other = next(i for i in tokenizer.special_tokens.values() if i != tokenizer.eos_id)
    stop_ids = tokenizer.stop_ids
    try:
        tokenizer.stop_ids = (*stop_ids, other)
        constraint = make()
        logits = torch.zeros(tokenizer.vocab_size)
        constraint.forbid(logits)
        assert logits[other] == 0
        constraint.accept(other)
        assert constraint.is_complete()
    finally:
        tokenizer.stop_ids = stop_ids

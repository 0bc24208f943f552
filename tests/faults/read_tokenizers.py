"""Vocabularies in each stored form, the settings beside them, and chat templates."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minllama.checkpoints.open import read_tokenizer
from minllama.tokenizer import huggingface as tokenizer_files
from minllama.tokenizer.tokenizer import Tokenizer
from tests.faults.mutations import Mutator, binary, text
from tests.faults.mutations import json_values as json_mutator
from tests.faults.reader import Reader, reader, writing
from tests.tokenizer_cases import byte_json, tiny_ranks, tiny_sentencepiece


def use_tokenizer(tokenizer: Tokenizer) -> None:
    text = " Hi, it's 12345 <s> \u00e9\u6f22 \n\n x"
    has_bos, has_eos = tokenizer.bos_id is not None, tokenizer.eos_id is not None
    ids = tokenizer.encode(text, bos=has_bos, eos=has_eos)
    tokenizer.decode(ids)
    tokenizer.decode(range(min(tokenizer.vocab_size, 300)))
    assert tokenizer.longest_token
    tokenizer_files.to_files(tokenizer.vocabulary)


def byte_vocabulary(folder: Path) -> Any:
    """The vocabulary of 256 bytes and three markers."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(byte_json()))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<s>", "eos_token": "</s>"})
    )
    return read_tokenizer(folder)


@reader("tokenizer.json", "tokenizer.model", "tokenizer.model of tiktoken", "tokenizer.bin")
def tokenizer_file(folder: Path, name: str) -> Reader:
    words = folder / "words"
    words.mkdir()
    mutate: Mutator = binary
    if name == "tokenizer.json":
        seeds, mutate = tokenizer_jsons(), json_mutator
    elif name == "tokenizer.model":
        seeds = [tiny_sentencepiece(vocab_size=600), unigram()]
    elif name.endswith("tiktoken"):
        seeds, mutate = [tiny_ranks()], text
    else:
        seeds = [tokenizer_bin()]
    path = words / name.partition(" ")[0]
    return Reader(
        seeds, writing(path, lambda: use_tokenizer(Tokenizer.from_pretrained(words))), mutate
    )


def tokenizer_jsons() -> list[bytes]:
    """Byte level, a SentencePiece model's form, WordPiece and one that trims and lowers."""
    from minllama.tokenizer import sentencepiece_form

    spelled = sentencepiece_form.to_tokenizers(_vocabulary_of(tiny_sentencepiece(vocab_size=600)))
    found = [json.dumps(byte_json()).encode(), json.dumps(spelled).encode()]
    raw = byte_json()
    raw["normalizer"] = {
        "type": "Sequence",
        "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}],
    }
    raw["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    return [*found, json.dumps(raw).encode()]


def _vocabulary_of(data: bytes) -> Any:
    from minllama.tokenizer import sentencepiece_form

    return sentencepiece_form.from_model(data, "seed")


def unigram() -> bytes:
    return tiny_sentencepiece(vocab_size=600, model_type="unigram", hard_vocab_limit=False)


def tokenizer_bin() -> bytes:
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = ["<unk>", "\n<s>\n", "\n</s>\n", *byte_pieces, " ", "a", "b", "ab"]
    out = struct.pack("<i", 8)
    for i, token in enumerate(tokens):
        out += struct.pack("<fi", -float(i), len(token)) + token.encode()
    return out


SETTINGS: Mapping[str, list[Any]] = {
    "tokenizer_config.json": [
        {
            "bos_token": "<s>",
            "eos_token": {"content": "</s>", "special": True, "lstrip": True},
            "add_bos_token": True,
            "legacy": False,
            "added_tokens_decoder": {"259": {"content": "<x>", "special": True, "rstrip": False}},
            "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}],
            "extra_special_tokens": ["<x>"],
            "tokenizer_class": "LlamaTokenizer",
        },
        {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}", "pad_token": "<s>"},
    ],
    "added_tokens.json": [{"<x>": 259, "<y>": 260}],
    "special_tokens_map.json": [{"bos_token": "<s>", "additional_special_tokens": ["<|turn|>"]}],
}


@reader(*SETTINGS)
def tokenizer_settings(folder: Path, name: str) -> Reader:
    """Settings beside a tokenizer.json, and beside a tokenizer.model."""
    folders = [folder / "json", folder / "model"]
    for words in folders:
        words.mkdir()
    (folders[0] / "tokenizer.json").write_text(json.dumps(byte_json()))
    (folders[1] / "tokenizer.model").write_bytes(tiny_sentencepiece(vocab_size=600))

    def open_bytes(data: bytes) -> None:
        words = folders[len(data) % 2]
        (words / name).write_bytes(data)
        use_tokenizer(Tokenizer.from_pretrained(words))

    seeds = [json.dumps(content).encode() for content in SETTINGS[name]]
    return Reader(seeds, open_bytes, json_mutator)


@reader("chat template")
def chat_template(folder: Path) -> Reader:
    from minllama.tokenizer.chat_template import ChatTemplate

    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    seeds = [
        b"{% for m in messages %}<|{{ m['role'] }}|>{{ m.content | trim }}{% endfor %}",
        b"{%- set ns = namespace(x=1) -%}{% if tools %}{{ tools | tojson }}{% endif %}"
        b"{% macro f(a) %}{{ a ~ ns.x }}{% endmacro %}{{ f(messages[0].content) }}",
        b"{{ raise_exception('no') if messages|length > 3 }}{{ '%s' % bos_token }}{{ 2 ** 3 }}",
    ]

    def open_bytes(data: bytes) -> None:
        source = data.decode("utf-8", "replace")
        ChatTemplate(source).render(messages, add_generation_prompt=True)

    return Reader(seeds, open_bytes, text)

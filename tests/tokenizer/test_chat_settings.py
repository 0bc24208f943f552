"""Chat templates and the tokens they name, in a tokenizer's files: as transformers reads them."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from minllama.errors import MinllamaError
from minllama.generation.conversation import chat_template
from minllama.tokenizer.gguf import from_gguf, to_gguf
from minllama.tokenizer.huggingface import to_files
from minllama.tokenizer.load import load_vocabulary
from minllama.tokenizer.tokenizer import Tokenizer
from minllama.tokenizer.tokenizers_form import dump
from tests.tokenizer_cases import byte_json, tiny_sentencepiece

HELLO = [{"role": "user", "content": "hi"}]
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
LLAMA = {"tokenizer_class": "LlamaTokenizer"}
ADDED = {"__type": "AddedToken", "content": "<|turn|>", "lstrip": False, "normalized": False}
ADDED |= {"rstrip": False, "single_word": False}
NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask", "image", "foo")
SHOWS_ALL = "".join("{{ " + name + "_token }}|" for name in NAMES)


def write(folder: Path, config: dict[str, Any], pieces: bool = False, **files: str) -> Path:
    """A tokenizer's folder; `files` have `__` for a slash and `.jinja` behind."""
    folder.mkdir(exist_ok=True)
    if pieces:
        (folder / "tokenizer.model").write_bytes(tiny_sentencepiece())
    else:
        (folder / "tokenizer.json").write_bytes(dump(byte_json()))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        path = folder / (name.replace("__", "/") + ".jinja")
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return folder


def theirs(folder: Path) -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    ("config", "pieces"),
    [
        ({**FAST}, False),
        ({**FAST, "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<|turn|>"}, False),
        ({**FAST, "unk_token": "<s>", "sep_token": ADDED, "cls_token": "</s>"}, False),
        ({**FAST, "mask_token": "<s>", "bos_token": None, "eos_token": "</s>"}, False),
        ({**FAST, "image_token": "<s>", "extra_special_tokens": {"foo_token": "</s>"}}, False),
        ({**LLAMA, "bos_token": "<s>", "eos_token": "</s>"}, True),
        ({**LLAMA, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "</s>"}, True),
        ({**LLAMA, "bos_token": None, "eos_token": "</s>", "pad_token": "</s>"}, True),
    ],
)
def test_templates_get_the_tokens_that_transformers_hands_them(
    config: dict[str, Any], pieces: bool, tmp_path: Path
) -> None:
    folder = write(tmp_path, {**config, "chat_template": SHOWS_ALL}, pieces)
    expected = theirs(folder).apply_chat_template(HELLO, tokenize=False)
    tokenizer = Tokenizer.from_pretrained(folder)
    assert chat_template(tokenizer).render(HELLO) == expected
    if pieces and config["bos_token"] is None:
        return  # the model file has one all the same, and that is written
    # The names survive the tokenizer's own files, for whoever reads those.
    saved = tmp_path / "saved"
    tokenizer.save_pretrained(saved)
    assert theirs(saved).apply_chat_template(HELLO, tokenize=False) == expected
    assert chat_template(Tokenizer.from_pretrained(saved)).render(HELLO) == expected


def test_additional_special_tokens_are_a_list_as_in_transformers_4(tmp_path: Path) -> None:
    config = {**FAST, "additional_special_tokens": ["<s>", ADDED]}
    config["chat_template"] = "{{ additional_special_tokens | join(',') }}"
    tokenizer = Tokenizer.from_pretrained(write(tmp_path, config))
    assert chat_template(tokenizer).render(HELLO) == "<s>,<|turn|>"


LISTED = [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]


@pytest.mark.parametrize(
    ("said", "files"),
    [
        ("one", {}),
        (LISTED, {}),
        (LISTED[:1], {}),
        ({"rag": "R", "default": "D"}, {}),
        ("one", {"chat_template": "file é\n"}),
        (LISTED, {"chat_template": "file"}),
        (LISTED, {"additional_chat_templates__tool_use": "T"}),
        ("one", {"chat_template": "file", "additional_chat_templates__tool_use": "T"}),
        ("one", {"chat_template": "file", "additional_chat_templates__default": "T"}),
        (None, {"additional_chat_templates__a": "A", "additional_chat_templates__b": "B"}),
    ],
)
def test_several_templates_are_those_of_transformers(
    said: Any, files: dict[str, str], tmp_path: Path
) -> None:
    folder = write(
        tmp_path / "a", FAST if said is None else {**FAST, "chat_template": said}, **files
    )
    expected = theirs(folder).chat_template
    expected = {"default": expected} if isinstance(expected, str) else expected
    vocabulary = load_vocabulary(folder)
    saved = tmp_path / "b"
    Tokenizer(vocabulary).save_pretrained(saved)
    for again in (vocabulary, load_vocabulary(saved)):
        default = {} if again.chat_template is None else {"default": again.chat_template}
        assert {**again.chat_templates, **default} == expected
    back = theirs(saved).chat_template
    assert ({"default": back} if isinstance(back, str) else back) == expected


def test_a_template_saved_by_transformers_5_is_read(tmp_path: Path) -> None:
    tokenizer = theirs(write(tmp_path / "a", {**FAST, "chat_template": LISTED}))
    tokenizer.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "additional_chat_templates" / "rag.jinja").is_file()
    vocabulary = load_vocabulary(tmp_path / "b")
    assert (vocabulary.chat_template, vocabulary.chat_templates) == ("D", {"rag": "R"})


def test_templates_of_an_earlier_tokenizer_do_not_stay_in_its_folder(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", FAST, additional_chat_templates__old="old", chat_template="old")
    plain = load_vocabulary(write(tmp_path / "b", {**FAST, "chat_template": "new"}))
    Tokenizer(plain).save_pretrained(folder)
    vocabulary = load_vocabulary(folder)
    assert (vocabulary.chat_template, vocabulary.chat_templates) == ("new", {})


def test_what_is_no_file_is_no_template(tmp_path: Path) -> None:
    write(tmp_path, {**FAST, "chat_template": "one"})
    (tmp_path / "additional_chat_templates" / "folder.jinja").mkdir(parents=True)
    os.mkfifo(tmp_path / "additional_chat_templates" / "pipe.jinja")
    vocabulary = load_vocabulary(tmp_path)
    assert (vocabulary.chat_template, vocabulary.chat_templates) == ("one", {})


def test_one_of_several_templates_is_chosen_by_name_or_given(tmp_path: Path) -> None:
    listed = [{"name": "rag", "template": "R"}, {"name": "tool_use", "template": "T"}]
    tokenizer = Tokenizer.from_pretrained(write(tmp_path, {**FAST, "chat_template": listed}))
    with pytest.raises(MinllamaError) as caught:
        chat_template(tokenizer)
    assert str(caught.value) == (
        "this model has chat templates called 'rag', 'tool_use', and none is its default; choose "
        "one by --chat-template NAME"
    )
    assert chat_template(tokenizer, "rag").render(HELLO) == "R"
    assert chat_template(tokenizer, "{{ messages[0].content }}!").render(HELLO) == "hi!"
    with pytest.raises(MinllamaError, match="no chat template is called 'RAG'; this model has 'ra"):
        chat_template(tokenizer, "RAG")


@pytest.mark.parametrize("name", ["\x1b[31m", "a\nb", "x" * 5000])
def test_names_of_templates_are_printable_in_messages(name: str, tmp_path: Path) -> None:
    said = [{"name": name, "template": "R"}] + [
        {"name": f"n{i}", "template": "R"} for i in range(99)
    ]
    tokenizer = Tokenizer.from_pretrained(write(tmp_path, {**FAST, "chat_template": said}))
    for choice in (None, name + "?"):
        with pytest.raises(MinllamaError) as caught:
            chat_template(tokenizer, choice)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 500


def test_gguf_keeps_templates_and_names(tmp_path: Path) -> None:
    config = {**LLAMA, "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    config |= {"sep_token": "<s>", "chat_template": LISTED}
    vocabulary = load_vocabulary(write(tmp_path, config, pieces=True))
    fields = to_gguf(vocabulary, Tokenizer(vocabulary).vocab_size)
    assert fields["tokenizer.chat_template"] == "D"
    assert fields["tokenizer.chat_template.rag"] == "R"
    assert fields["tokenizer.chat_templates"] == ["rag"]
    again = from_gguf(fields, "x")
    assert again is not None
    assert (again.chat_template, again.chat_templates) == ("D", {"rag": "R"})
    for name in ("unk_token", "pad_token", "sep_token"):
        assert again.named_tokens[name] == vocabulary.named_tokens[name], name


def test_a_tokenizer_of_one_template_is_written_as_before(tmp_path: Path) -> None:
    files = to_files(load_vocabulary(write(tmp_path, {**FAST, "chat_template": "one"})))
    assert files["chat_template.jinja"] == b"one"
    assert "chat_template" not in json.loads(files["tokenizer_config.json"])

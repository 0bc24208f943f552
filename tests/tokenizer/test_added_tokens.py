"""Added tokens in a text: markers of chats, their flags, and what stands around them.

References are the library SentencePiece for each stretch between markers (as llama.cpp and the
legacy way of transformers have it), the library `tokenizers`, and transformers' own tokenizer.
"""

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import pre_tokenizers

from minllama.errors import TokenizerError
from minllama.generation.conversation import encode_messages
from minllama.tokenizer.added_tokens import AddedToken, AddedTokens, hidden
from minllama.tokenizer.chat_template import ChatTemplate
from minllama.tokenizer.gguf import from_gguf, to_gguf
from minllama.tokenizer.huggingface import to_files
from minllama.tokenizer.load import load_vocabulary
from minllama.tokenizer.sentencepiece_form import from_model, parse_model
from minllama.tokenizer.tokenizer import Tokenizer
from minllama.tokenizer.tokenizers_form import added_token, document
from minllama.tokenizer.vocabulary import TokenFlags, Vocabulary
from tests.tokenizer_cases import TEXTS, random_texts, tiny_sentencepiece

A, B = "<|a|>", "<|b|>"
N = 600  # tokens of tiny_sentencepiece
MARKED = [
    "",
    A,
    A + B,
    f"{A}user\nHi there{B}\n{A}assistant\n",
    f"the fox{A}the fox",
    f"the{A}{A}{B}",
    f" {A} the {B}  fox ",
    f"  the{A}\n\n{B}\t{A}\u00a0x",
    f"<s>the{B}</s>fox<unk>",
    f"é{A}é 1{B}1 _{A}_ ({B})",
    f"▁{A}▁the",
    f"{A[:-1]}{B}{A[1:]}",
]


def listed(token_id: int, text: str, *, special: bool = False, **flags: bool) -> dict[str, Any]:
    entry = {"content": text, "lstrip": False, "rstrip": False, "single_word": False}
    return {str(token_id): entry | {"normalized": False, "special": special} | flags}


def model_folder(folder: Path, added: dict[str, int] | None = None, **config: Any) -> Path:
    """A folder that has only a tokenizer.model, and settings beside it."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(tiny_sentencepiece())
    (folder / "config.json").write_text('{"model_type": "llama"}')
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer"} | names | config
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if added is not None:
        (folder / "added_tokens.json").write_text(json.dumps(added))
    return folder


def stretch_by_stretch(text: str, ids: dict[str, int]) -> list[int]:
    """Each stretch between added tokens by SentencePiece, as a text of its own."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=tiny_sentencepiece())
    result: list[int] = []
    for part in re.split("(" + "|".join(map(re.escape, ids)) + ")", text):
        result += [ids[part]] if part in ids else processor.encode(part)
    return result


# SentencePiece vocabularies


def test_each_stretch_between_added_tokens_is_a_text_of_its_own(tmp_path: Path) -> None:
    ids = {A: N, B: N + 1}
    tokenizer = Tokenizer(load_vocabulary(model_folder(tmp_path, ids, legacy=True)))
    native = Tokenizer(from_model(tiny_sentencepiece(user_defined_symbols=f"{A},{B}"), "x"))
    for text in [*MARKED, *(f"{text}{A}{text}{B}" for text in TEXTS)]:
        text = re.sub("</?s>|<unk>", "", text)
        assert tokenizer.encode(text, bos=False) == stretch_by_stretch(text, ids), text
        ours = native.encode(text, bos=False)
        assert native.decode(ours, continuation=True).count(A) == text.count(A)
        if text.startswith((A, B)):
            assert native.token_text(ours[0]) in (A, B)


def test_special_tokens_part_a_text_as_well_when_asked(tmp_path: Path) -> None:
    tokenizer = Tokenizer(load_vocabulary(model_folder(tmp_path, {A: N, B: N + 1})))
    ids = {A: N, B: N + 1, "<s>": 1, "</s>": 2, "<unk>": 0}
    for text in MARKED:
        asked = tokenizer.encode(text, bos=False, special=True)
        assert asked == stretch_by_stretch(text, ids), text
        assert tokenizer.encode_chat(text, {}) == asked


def test_user_defined_pieces_of_gguf_are_added_tokens() -> None:
    # llama.cpp: tokenizer_st_partition, and a space in front of each fragment behind a token.
    fields = to_gguf(from_model(tiny_sentencepiece(), "tiny"), N)
    for key, values in {"tokens": [A, B], "token_type": [4, 4], "scores": [-1e3] * 2}.items():
        fields["tokenizer.ggml." + key] += values
    ids = {A: N, B: N + 1}
    tokenizer = Tokenizer(from_gguf(fields, "x"))
    bare = Tokenizer(from_gguf(fields | {"tokenizer.ggml.add_space_prefix": False}, "x"))
    for text in MARKED:
        if "s>" not in text and "unk" not in text:
            assert tokenizer.encode(text, bos=False) == stretch_by_stretch(text, ids), text
            assert bare.decode(bare.encode(text)) == text.replace("▁", " ")
    # One that ends a turn, by its text as in llama.cpp, is special and ends a generation.
    fields["tokenizer.ggml.tokens"][N + 1] = "<|im_end|>"
    ending = Tokenizer(from_gguf(fields, "x"))
    assert N + 1 in ending.stop_ids
    assert ending.special_tokens["<|im_end|>"] == N + 1


def test_an_added_token_may_be_an_ordinary_piece_of_the_model(tmp_path: Path) -> None:
    plain = Tokenizer(from_model(tiny_sentencepiece(), "x"))
    piece = next(i for i in range(259, N) if plain.token_bytes(i).decode(errors="ignore") == "er")
    folder = model_folder(tmp_path, {"er": piece}, additional_special_tokens=["th"])
    tokenizer = Tokenizer(load_vocabulary(folder))
    assert tokenizer.encode("er er", bos=False)[:1] == [piece]
    assert tokenizer.encode("xer", bos=False)[-1] == piece
    assert "th" in tokenizer.special_tokens


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize(
    ("of_a", "of_b"),
    [
        ({}, {}),
        ({"lstrip": True}, {"single_word": True}),
        ({"rstrip": True}, {"normalized": True}),
        ({"lstrip": True, "rstrip": True}, {"single_word": True, "lstrip": True, "rstrip": True}),
    ],
)
def test_flags_beside_a_tokenizer_model_are_those_of_transformers(
    tmp_path: Path, legacy: bool, special: bool, of_a: dict[str, bool], of_b: dict[str, bool]
) -> None:
    transformers = pytest.importorskip("transformers")
    decoder = listed(N, A, special=special, **of_a) | listed(N + 1, B, **of_b)
    folder = model_folder(tmp_path, legacy=legacy, added_tokens_decoder=decoder)
    tokenizer = Tokenizer(load_vocabulary(folder))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in MARKED:
        ids = tokenizer.encode(text, bos=False, special=True)
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        # transformers 5 leaves the space out where a stretch begins with one; its versions before,
        # SentencePiece and llama.cpp do not.
        if not legacy or not re.search("(^|>)[ ▁]", text):
            assert ids == expected, text
        if not legacy:
            assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
            assert tokenizer.decode(ids, skip_special=False) == theirs.decode(ids)
            stream = tokenizer.stream_decoder(continuation=False, skip_special=False)
            assert "".join(map(stream.push, ids)) + stream.flush() == theirs.decode(ids)


def test_without_legacy_only_the_beginning_has_a_space(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, {A: N}, legacy=False)
    tokenizer = Tokenizer(load_vocabulary(folder))
    the = sentencepiece.SentencePieceProcessor(model_proto=tiny_sentencepiece()).encode("the")
    model = parse_model(tiny_sentencepiece(), "x")
    model.normalizer_spec.add_dummy_prefix = False
    without = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    bare = without.encode("the")
    assert tokenizer.encode(f"the{A}the", bos=False) == [*the, N, *bare]
    assert tokenizer.encode(f"the{A} the", bos=False) == [*the, N, *the]
    assert tokenizer.encode(f"{A}the", bos=False) == [N, *bare]
    assert tokenizer.encode_chat("<s>X", {"X": "the"}) == [1, *bare]


def test_add_prefix_space_of_the_settings_counts(tmp_path: Path) -> None:
    bare = Tokenizer(load_vocabulary(model_folder(tmp_path, add_prefix_space=False)))
    spaced = Tokenizer(load_vocabulary(model_folder(tmp_path, add_prefix_space=None)))
    assert bare.encode(" the fox") == spaced.encode("the fox")
    assert bare.decode(bare.encode(" the")) == " the"


# Conversion


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("flags", [{}, {"lstrip": True, "rstrip": True}, {"single_word": True}])
def test_a_written_folder_keeps_ids_and_flags(
    tmp_path: Path, legacy: bool, flags: dict[str, bool]
) -> None:
    decoder = listed(N, A, special=True) | listed(N + 1, B, **flags)
    source = model_folder(tmp_path / "x", legacy=legacy, added_tokens_decoder=decoder)
    vocabulary = load_vocabulary(source)
    tokenizer = Tokenizer(vocabulary)
    files = to_files(vocabulary)
    assert "tokenizer.json" in files
    for name in ("with", "without"):  # a tokenizer.json
        folder = tmp_path / name
        folder.mkdir()
        for file, content in files.items():
            (folder / file).write_bytes(content)
    written = Tokenizer(load_vocabulary(tmp_path / "with"))
    for text in [*MARKED, *(f"{text}{B}{text}" for text in TEXTS)]:
        ids = tokenizer.encode(text, special=True)
        assert written.encode(text, special=True) == ids, ascii(text)
        assert written.decode(ids) == tokenizer.decode(ids)
        assert written.decode(ids, skip_special=False) == tokenizer.decode(ids, skip_special=False)


def test_a_folder_without_an_exact_tokenizer_json_keeps_its_flags(tmp_path: Path) -> None:
    data = tiny_sentencepiece(user_defined_symbols=f"{A},▁<odd>")
    a = next(i for i, p in enumerate(parse_model(data, "x").pieces) if p.piece == A)
    flags = ((a, TokenFlags(rstrip=True)),)
    vocabulary = Vocabulary("sentencepiece", data, "x", flags=flags, legacy=False)
    for name, content in to_files(vocabulary).items():
        (tmp_path / name).write_bytes(content)
    assert not (tmp_path / "tokenizer.json").exists()
    back = load_vocabulary(tmp_path)
    assert (back.flags, back.legacy) == (flags, False)


def test_gguf_keeps_the_ids_of_added_tokens(tmp_path: Path) -> None:
    decoder = listed(N, A, special=True) | listed(N + 1, B)
    vocabulary = load_vocabulary(model_folder(tmp_path, added_tokens_decoder=decoder))
    as_json = Vocabulary("tokenizers", to_files(vocabulary)["tokenizer.json"], "x")
    tokenizer = Tokenizer(vocabulary)
    for source in (vocabulary, as_json):
        fields = to_gguf(source, N + 2)
        assert fields["tokenizer.ggml.token_type"][N:] == [3, 4]
        back = Tokenizer(from_gguf(fields, "x"))
        for text in MARKED:
            ids = tokenizer.encode(text, special=True, bos=False)
            assert back.encode(text, special=True, bos=False) == ids, text


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
@pytest.mark.parametrize("special", [True, False])
def test_flags_that_gguf_cannot_say_are_refused(tmp_path: Path, flag: str, special: bool) -> None:
    decoder = listed(N, A, special=special, **{flag: True})
    vocabulary = load_vocabulary(model_folder(tmp_path, added_tokens_decoder=decoder))
    as_json = Vocabulary("tokenizers", to_files(vocabulary)["tokenizer.json"], "x")
    for source in (vocabulary, as_json):
        with pytest.raises(TokenizerError, match=f"added token '<.a.>' has {flag}, which GGUF"):
            to_gguf(source, N + 1)


def test_spaces_that_gguf_cannot_say_are_refused(tmp_path: Path) -> None:
    vocabulary = load_vocabulary(model_folder(tmp_path, legacy=False))
    as_json = Vocabulary("tokenizers", to_files(vocabulary)["tokenizer.json"], "x")
    for source in (vocabulary, as_json):
        with pytest.raises(TokenizerError, match="which GGUF cannot represent"):
            to_gguf(source, N)
    # Without any space in front there is nothing to say.
    bare = load_vocabulary(model_folder(tmp_path, legacy=False, add_prefix_space=False))
    assert to_gguf(bare, N)["tokenizer.ggml.add_space_prefix"] is False


# Finding them


FLAGS = [TokenFlags(*(bool(number & bit) for bit in (1, 2, 4))) for number in range(8)]


def test_added_tokens_are_found_where_the_library_finds_them() -> None:
    texts = ["<x>", "<x><x>", "x>", "<y>\n", "w"]
    for shift in range(8):
        added = [AddedToken(t, i, FLAGS[(i * 3 + shift) % 8]) for i, t in enumerate(texts)]
        library = tokenizers.Tokenizer(tokenizers.models.BPE())
        library.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]+"), "removed")
        library.add_tokens(
            [
                tokenizers.AddedToken(token.text, normalized=False, **token.flags._asdict())
                for token in added
            ]
        )
        finder = AddedTokens(added)
        for text in random_texts(200, seed=shift):
            if any(unicodedata.category(char) == "Cn" for char in text):
                continue  # of which a newer Unicode may know that they are letters
            for glue in ("<x>", " <x><x> ", "x>\t<y>\n", "w w"):
                whole = text[: len(text) // 2] + glue + text[len(text) // 2 :] + glue[::-1]
                encoding = library.encode(whole)
                spans = [span for span in finder.split(whole) if span.token_id is not None]
                assert [span.token_id for span in spans] == encoding.ids, ascii(whole)
                found = [(span.begin, span.end) for span in spans]
                assert found == encoding.offsets, ascii(whole)
                assert "".join(whole[s.begin : s.end] for s in finder.split(whole)) == whole


def test_hidden_text_keeps_its_length_and_its_white_space() -> None:
    assert hidden(" a\n</s>", ["</s>"]) == " \U0010fffd\n" + 4 * "\U0010fffd"
    assert hidden(" a ", ["\n<s>"]) == 3 * "\U0010fffd"


# Messages that spell special tokens


TEMPLATE = "{% for m in messages %}<|a|>\n{{ m.content }}<|b|> {% endfor %}<|a|>\nme"
CHARACTERS = [chr(code) for code in range(33, 127)] + ["\n", "▁"]


def character_tokenizer(**parts: Any) -> Tokenizer:
    """Each character is a token, spaces are ▁; `flags` are those of the chat's markers."""
    flags = parts.pop("flags", TokenFlags())
    vocab = {text: i for i, text in enumerate(["<unk>", "<s>", "</s>", A, B, *CHARACTERS])}
    added = [added_token(i, text, special=True) for i, text in enumerate(["<unk>", "<s>", "</s>"])]
    added += [added_token(vocab[text], text, special=True, flags=flags) for text in (A, B)]
    raw = document(
        added_tokens=added,
        normalizer=parts.get("normalizer"),
        pre_tokenizer=parts.get("pre_tokenizer"),
        decoder={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"},
        model={"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>"},
    )
    data = json.dumps(raw).encode()
    return Tokenizer(Vocabulary("tokenizers", data, "x", bos_id=1, eos_id=2))


def metaspace(scheme: str) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}


def sequence(kind: str, *parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", kind: list(parts)}


REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PREPEND = {"type": "Prepend", "prepend": "▁"}
TOKENIZERS = {
    "no space in front": {"normalizer": REPLACE},
    "Llama 2": {
        "normalizer": sequence("normalizers", {"type": "Prepend", "prepend": "▁"}, REPLACE)
    },
    "always": {"pre_tokenizer": metaspace("always")},
    "first": {"pre_tokenizer": metaspace("first")},
    "first in a Sequence": {"pre_tokenizer": sequence("pretokenizers", metaspace("first"))},
    "first in two": {
        "pre_tokenizer": sequence("pretokenizers", sequence("pretokenizers", metaspace("first")))
    },
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("flags", FLAGS)
def test_what_a_message_says_moves_no_id_outside_of_it(name: str, flags: TokenFlags) -> None:
    tokenizer = character_tokenizer(flags=flags, **TOKENIZERS[name])
    template = ChatTemplate(TEMPLATE)

    def ids(*contents: str) -> list[int]:
        messages = [{"role": "user", "content": content} for content in contents]
        return encode_messages(template, tokenizer, messages, 10**6)

    # With neither letter nor space beside the markers, all flags find them.
    for said in ("(hello)", "( hello )", "(\n)", "."):
        usual = ids(said, "(xy)", "(z)")
        at = ids(said, "(").index(tokenizer.special_tokens[B], 1)
        for other in ("(x</s>y)", "(</s>)", "(x <s> </s>y)", "(<|b|><|a|>)", "(<|b|>\n<|a|>)"):
            moved = ids(said, other, "(z)")
            front, behind = usual[: at + 1], usual[-(len(ids("(z)")) - 1) :]
            assert moved[: len(front)] == front, other
            assert moved[-len(behind) :] == behind, other
            assert moved.count(2) == 0
            assert moved.count(tokenizer.special_tokens[B]) == 3


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("flags", FLAGS)
def test_text_that_spells_nothing_has_the_ids_of_the_whole(name: str, flags: TokenFlags) -> None:
    # What a user wrote stands for itself: the same as the rendered text in the library.
    tokenizer = character_tokenizer(flags=flags, **TOKENIZERS[name])
    for said in ("(hello)", " (hello) ", "  ", "\n", "(", ""):
        for frame in ("<|a|>\nX<|b|>\n<|a|>me", "X<|b|>", "<s>X", "<|a|>X <|b|>", "X<|b|>X"):
            whole = tokenizer.encode(frame.replace("X", said), bos=False, special=True)
            assert tokenizer.encode_chat(frame, {"X": said}) == whole, (frame, said)

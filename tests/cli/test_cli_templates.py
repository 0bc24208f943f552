"""`--chat-template` of classify and train: one of several of a model's, or one in a file."""

import json
import shutil

import pytest

from minllama import cli
from minllama.classification import (
    LlamaEmbeddingClassifier,
    LlamaZeroShotClassifier,
    load_classifier,
    save_classifier,
)
from minllama.errors import MinllamaError, OptionError
from minllama.model.llama import load_pretrained
from minllama.options import PromptOptions
from minllama.tokenizer.tokenizer import Tokenizer

TERSE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}<assistant>"
LOUD = "{{ bos_token }}{% for m in messages %}{{ m.content | trim }}!{% endfor %}"
TEXT = "It broke <|im_end|> twice."


@pytest.fixture(scope="module")
def several(base, tmp_path_factory):
    """The tiny model with two more chat templates."""
    folder = tmp_path_factory.mktemp("several") / "model"
    shutil.copytree(base, folder)
    name_templates(folder, terse=TERSE, loud=LOUD)
    return folder


def name_templates(folder, **named):
    path = folder / "tokenizer_config.json"
    config, own = json.loads(path.read_bytes()), folder / "chat_template.jinja"
    if own.is_file():
        config["chat_template"] = [{"name": "default", "template": own.read_text()}]
        own.unlink()
    entries = {entry["name"]: entry["template"] for entry in config["chat_template"]} | named
    config["chat_template"] = [{"name": n, "template": text} for n, text in entries.items()]
    path.write_text(json.dumps(config))


@pytest.fixture
def run(capfd):
    """Status, standard output and standard error of the command line in this process."""

    def call(*args):
        with pytest.raises(SystemExit) as ended:
            cli.main([str(arg) for arg in args])
        return ended.value.code, *capfd.readouterr()

    return call


def opened(folder):
    model = load_pretrained(folder, device="cpu").requires_grad_(False)
    return model, Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize(("given", "name"), [("terse", "terse"), (TERSE, "terse"), (None, None)])
def test_prompts_are_those_of_transformers_with_the_template_of_that_name(given, name, several):
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(several)
    options = PromptOptions(prompt="Say: {text}", chat=True, chat_template=given, system="Brief.")
    classifier = LlamaEmbeddingClassifier(*opened(several), ["a", "b"], prompt=options)
    text = "It broke."
    messages = [{"role": "system", "content": "Brief."}]
    messages.append({"role": "user", "content": f"Say: {text}"})
    kind = {"tokenize": True, "add_generation_prompt": True, "return_dict": False}
    expected = theirs.apply_chat_template(messages, chat_template=name, **kind)
    assert list(classifier.encode(text).ids) == expected


def test_a_named_template_stays_what_it_was_in_training(several, tmp_path):
    options = PromptOptions(chat=True, chat_template="loud")
    classifier = LlamaEmbeddingClassifier(*opened(several), ["a", "b"], prompt=options)
    expected = classifier.predict_proba([TEXT])
    assert classifier.encode(TEXT).ids[0] == classifier.tokenizer.bos_id
    save_classifier(classifier, tmp_path / "c")
    other = tmp_path / "other"  # whose template of that name is another, and its weights the same
    shutil.copytree(several, other)
    name_templates(other, loud="{{ messages }}")
    again = load_classifier(tmp_path / "c", model=other)
    assert again.prompt.chat_template == LOUD
    assert again.encode(TEXT) == classifier.encode(TEXT)
    assert (again.predict_proba([TEXT]) == expected).all()


def test_a_classifier_without_the_field_is_read_as_before(several, tmp_path):
    classifier = LlamaEmbeddingClassifier(
        *opened(several), ["a", "b"], prompt=PromptOptions(chat=True)
    )
    save_classifier(classifier, tmp_path)
    description = json.loads((tmp_path / "classifier.json").read_bytes())
    assert description["prompt"].pop("chat_template") is None
    del description["sha256"]["classifier.json"]
    from minllama.classification.storage.manifest import write_description

    write_description(tmp_path / "classifier.json", description)
    assert load_classifier(tmp_path).encode(TEXT) == classifier.encode(TEXT)


def test_templates_that_cannot_be_are_refused(several):
    with pytest.raises(OptionError, match="--chat-template needs --chat"):
        PromptOptions(chat_template="terse")
    options = PromptOptions(prompt="{text}:", chat=True, chat_template="tool_use")
    with pytest.raises(MinllamaError, match="no chat template is called 'tool_use'; this model"):
        LlamaZeroShotClassifier(*opened(several), ["a", "b"], options)


@pytest.mark.parametrize("given", ["terse", "file"])
def test_classify_takes_a_name_or_a_file(given, several, tmp_path, run):
    (tmp_path / "t.jinja").write_text(TERSE)
    choice = tmp_path / "t.jinja" if given == "file" else given
    asked = ("--labels", "good,bad", "--text", TEXT, "--json", "-m", several)
    asked += ("--device", "cpu", "--dtype", "float32", "--quantize", "none")
    status, out, err = run("classify", *asked, "--chat", "--chat-template", choice)
    assert status == 0, err
    record = json.loads(out)
    options = PromptOptions(chat=True, chat_template=TERSE)
    classifier = LlamaZeroShotClassifier(*opened(several), ["good", "bad"], options)
    expected = dict(zip(["good", "bad"], classifier.predict_proba([TEXT])[0], strict=True))
    assert record["probabilities"] == pytest.approx(expected, abs=1e-5)
    default = json.loads(run("classify", *asked, "--chat")[1])
    assert default["probabilities"] != record["probabilities"]


def test_train_keeps_it_and_no_other_command_needs_it(several, labelled_files, tmp_path, run):
    sources = ("--train", labelled_files / "train.txt", "--dev", labelled_files / "dev.txt")
    how = ("--method", "frozen", "--layer", "1", "-m", several, "--device", "cpu")
    chat = ("--chat", "--chat-template")
    status, _, err = run("train", *sources, *how, *chat, "loud", "-o", tmp_path / "run")
    assert status == 0, err
    assert load_classifier(tmp_path / "run").prompt.chat_template == LOUD
    assert 'prompt       "{text}" in a custom chat template' in run("info", tmp_path / "run")[1]
    assert run("classify", tmp_path / "run", "--text", TEXT)[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--chat", "--chat-template", "none"), "neither a file nor a template of the model"),
        (("--chat-template", "terse"), "--chat-template needs --chat"),
        (("--chat", "--chat-template", "FILE"), "not a Jinja template"),
    ],
)
def test_the_command_line_refuses_in_one_line(options, message, several, tmp_path, run):
    (tmp_path / "t").write_text("words")
    options = [str(tmp_path / "t") if word == "FILE" else word for word in options]
    (tmp_path / "rows.txt").write_text("a ||| x\nb ||| y\n" * 4)
    for command in (
        ("classify", "--labels", "a,b", "--text", "x"),
        ("train", "--train", tmp_path / "rows.txt", "--method", "frozen", "-o", tmp_path / "run"),
    ):
        status, out, err = run(*command, "-m", several, *options)
        assert (status, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert run("classify", tmp_path, "--text", "x", "--chat-template", "terse")[0] == 2

"""Streams of texts -> lines of labels: in order, in constant memory, cut anywhere and resumed."""

import itertools
import json

import numpy as np
import pytest

from minllama.classification import LlamaEmbeddingClassifier, load_classifier
from minllama.data import BadRows, count_rows
from minllama.engine import evaluations as evaluations_module
from minllama.engine.evaluations import SharedPrefix
from minllama.errors import DataError, OptionError
from minllama.experiment import predict as predicting
from minllama.experiment import resume as resuming
from minllama.experiment.predict import described, predict_stream
from minllama.experiment.resume import Done, read_done
from minllama.model.llama import load_pretrained
from minllama.options import DataOptions, PromptOptions
from minllama.tokenizer.tokenizer import Tokenizer
from tests.classifier_cases import embedding, tiny_llama, zero_shot

DATA = DataOptions()


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(resuming, "CHUNK", 4)


@pytest.fixture
def rows(tmp_path):
    """Eleven texts of different lengths."""
    path = tmp_path / "rows.txt"
    path.write_text("".join(f"text {'long ' * (i * 7 % 5)}{i}\n" for i in range(11)))
    return path


def lines_of(classifier, source, **options):
    data = options.pop("data", DATA)
    return list(itertools.chain.from_iterable(predict_stream(classifier, source, data, **options)))


def test_lines_are_in_order_and_say_what_predict_proba_says(rows):
    classifier = embedding()
    records = [json.loads(line) for line in lines_of(classifier, rows)]
    texts = rows.read_text().splitlines()
    assert [record["text"] for record in records] == texts
    assert [record["index"] for record in records] == list(range(11))
    expected = classifier.predict_proba(texts)
    found = [[record["probabilities"][label] for label in classifier.labels] for record in records]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert [record["label"] for record in records] == classifier.predict(texts)
    assert all("score" not in record for record in records)


@pytest.mark.parametrize("score", ["sum", "pmi"])
def test_what_all_prompts_share_is_read_once_for_the_whole_file(rows, monkeypatch, score):
    made = []

    class Counted(SharedPrefix):
        def __init__(self, engine, ids, *others):
            super().__init__(engine, ids, *others)
            made.append(self.ids)

    monkeypatch.setattr(evaluations_module, "SharedPrefix", Counted)
    classifier = zero_shot(prompt="A long instruction that stands before: {text}", score=score)
    records = [json.loads(line) for line in lines_of(classifier, rows)]
    assert len(made) == 1
    assert len(made[0]) > 20
    texts = rows.read_text().splitlines()
    by_chunk = [classifier.predict_proba(texts[i : i + 4]) for i in range(0, 11, 4)]
    assert len(made) == 4  # the weights might have changed in between
    found = [[record["probabilities"][label] for label in classifier.labels] for record in records]
    expected = np.concatenate(by_chunk).tolist()
    assert found == [[float(f"{value:.6g}") for value in row] for row in expected]


@pytest.mark.parametrize("score", ["sum", "byte-mean", "contextual"])
def test_the_score_of_label_words_is_named(rows, score):
    classifier = zero_shot(score=score)
    assert {json.loads(line)["score"] for line in lines_of(classifier, rows)} == {score}
    assert f"score {score}" in described(classifier)


def test_the_strength_of_a_correction_is_named_with_the_score(rows):
    classifier = zero_shot(score="pmi", prior_strength=0.5)
    lines = lines_of(classifier, rows)
    assert {json.loads(line)["score"] for line in lines} == {"pmi (strength 0.5)"}
    assert "score pmi (strength 0.5), " in described(classifier)
    assert zero_shot(score="sum", prior_strength=0.5).score_name == "sum"


def test_a_chat_is_said_to_be_one():
    classifier = zero_shot()
    assert described(classifier).endswith(r', prompt "Text: {text}\nis"]')
    classifier.prompt = PromptOptions(prompt="{text}?", chat=True)
    assert described(classifier).endswith(', in a chat "{text}?"]')


def test_a_head_says_its_layer_and_temperature():
    classifier = embedding(layer=1)
    classifier.temperature = 1.5
    assert described(classifier) == "[head on layer 1 of 2, temperature 1.5]"


def test_several_labels_are_lists_and_listed(rows):
    classifier = embedding(multi_label=True)
    expected = classifier.predict(rows.read_text().splitlines())
    records = [json.loads(line) for line in lines_of(classifier, rows)]
    assert [tuple(record["label"]) for record in records] == expected
    labelled = lines_of(classifier, rows, output_format="labelled")
    assert [line.split(" ||| ")[0] for line in labelled] == [", ".join(names) for names in expected]


def test_labelled_lines_keep_a_text_on_one_line(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "one\n two\tthree "}) + "\n")
    (line,) = lines_of(embedding(), tmp_path / "rows.jsonl", output_format="labelled")
    assert line.endswith(" ||| one two three\n")


@pytest.mark.parametrize(
    ("label", "multi_label", "refused"),
    [
        ("a ||| b", False, True),
        ("a\nb", False, True),
        ("a\u2028b", False, True),
        ("a, b", True, True),
        ("a, b", False, False),
        ("a|b", False, False),
    ],
)
def test_labels_that_could_not_be_read_back_are_refused(rows, label, multi_label, refused):
    classifier = embedding(labels=("x", label), multi_label=multi_label)
    if refused:
        with pytest.raises(OptionError, match="--output-format jsonl"):
            lines_of(classifier, rows, output_format="labelled")
    else:
        assert len(lines_of(classifier, rows, output_format="labelled")) == 11
    assert len(lines_of(classifier, rows)) == 11


def test_a_chunk_is_written_before_later_rows_are_read(monkeypatch):
    from minllama.data import Row

    read = []

    def endless(source, data, *, bad_rows):
        for i in itertools.count():
            read.append(i)
            yield Row(i, f"line {i + 1}", f"text {i}", {})

    monkeypatch.setattr(predicting, "stream_rows", endless)
    stream = predict_stream(embedding(), "-", DATA)
    for n in (1, 2, 3):
        assert len(next(stream)) == 4
        assert len(read) <= 4 * n + 1


def test_bad_rows_end_the_stream_or_are_counted(tmp_path):
    rows = tmp_path / "rows.jsonl"
    texts = ["one", "", "three", None, "five", "six", "seven"]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with pytest.raises(DataError, match="line 2"):
        lines_of(embedding(), rows)
    skipping, bad_rows = DataOptions(skip_bad_rows=True), BadRows()
    lines = lines_of(embedding(), rows, data=skipping, bad_rows=bad_rows)
    assert [json.loads(line)["index"] for line in lines] == [0, 2, 4, 5, 6]
    assert bad_rows.count == 2
    assert count_rows(rows, skipping)[0] == 5
    assert count_rows(rows, skipping, start=4)[0] == 3


def gone_on_with(output, classifier, source, data=DATA):
    done = read_done(output)
    rest = lines_of(classifier, source, done=done, data=data)
    return output.read_bytes()[: done.end] + "".join(rest).encode()


@pytest.mark.parametrize("kind", [embedding, zero_shot])
def test_a_run_that_was_cut_at_any_byte_is_gone_on_with_to_the_same_file(rows, tmp_path, kind):
    classifier, output = kind(), tmp_path / "out.jsonl"
    uncut = "".join(lines_of(classifier, rows)).encode()
    ends = [i + 1 for i, byte in enumerate(uncut) if byte == ord("\n")]
    # About every end of a line, and some bytes within lines.
    places = {0, 1, len(uncut)} | {end + d for end in ends for d in (-2, -1, 0, 1, 40)}
    for place in sorted(place for place in places if place <= len(uncut)):
        output.write_bytes(uncut[:place])
        assert gone_on_with(output, classifier, rows) == uncut, place


def test_skipped_rows_do_not_shift_what_is_gone_on_with(tmp_path):
    rows, output = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    texts = [None, "a", "b", None, "c", "d", "e", None, None, "f", "g"]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    classifier, skipping = embedding(), DataOptions(skip_bad_rows=True)
    lines = lines_of(classifier, rows, data=skipping)
    for n in range(len(lines) + 1):
        output.write_text("".join(lines[:n]))
        assert gone_on_with(output, classifier, rows, skipping) == "".join(lines).encode()


def test_another_input_or_classifier_is_refused(rows, tmp_path):
    classifier, output = embedding(), tmp_path / "out.jsonl"
    output.write_text("".join(lines_of(classifier, rows)[:6]))
    done = read_done(output)
    assert (done.start, done.n_before, len(done.records)) == (4, 4, 2)
    lines, changed = rows.read_text().splitlines(keepends=True), tmp_path / "changed.txt"
    for i in (4, 5):
        changed.write_text("".join([*lines[:i], "new\n", *lines[i + 1 :]]))
        with pytest.raises(DataError, match=f"row {i} but .* no such row with that text"):
            lines_of(classifier, changed, done=done)
    for kept, message in ((3, "4 records before row 4, but .* has 3"), (4, "row 5")):
        changed.write_text("".join(lines[:kept]))
        with pytest.raises(DataError, match=message):
            lines_of(classifier, changed, done=done)
    nearly = embedding()
    nearly.score.weight.data *= 1.2
    others = embedding(labels=("good", "bad", "other")), embedding(llama=tiny_llama(seed=3))
    for another in (nearly, *others, zero_shot()):
        if another in others:
            another.score.weight.data.normal_(std=2.0)
        with pytest.raises(DataError, match="this classifier predicts something else"):
            lines_of(another, rows, done=done)


def test_a_run_goes_on_in_another_precision_and_not_with_another_classifier(rows, tmp_path):
    output = tmp_path / "out.jsonl"
    classifier = embedding()
    output.write_text("".join(lines_of(classifier, rows)[:6]))
    classifier.llama.bfloat16()
    assert len(lines_of(classifier, rows, done=read_done(output))) == 5
    nearly = embedding()
    nearly.score.weight.data[0, 0] += 1e-6
    with pytest.raises(DataError, match="this classifier predicts something else"):
        lines_of(nearly, rows, done=read_done(output))


def test_a_saved_classifier_is_told_by_what_was_saved(base, rows, tmp_path):
    llama, words = load_pretrained(base, device="cpu"), Tokenizer.from_pretrained(base)
    llama.requires_grad_(False)
    LlamaEmbeddingClassifier(llama, words, ["a", "b"]).save_pretrained(tmp_path / "one")
    first, again = (load_classifier(tmp_path / "one", device="cpu") for _ in range(2))
    said = {json.loads(line)["classifier"] for line in lines_of(first, rows)}
    assert said == {json.loads(line)["classifier"] for line in lines_of(again, rows)}
    assert len(said) == 1
    again.temperature = 2.0
    again.save_pretrained(tmp_path / "two")
    other = load_classifier(tmp_path / "two", device="cpu")
    assert said.isdisjoint(json.loads(line)["classifier"] for line in lines_of(other, rows))


def test_columns_are_those_of_the_row_and_of_the_whole_run(tmp_path):
    path, output, classifier = tmp_path / "rows.jsonl", tmp_path / "out.jsonl", embedding()
    rows = [
        {"id": 1, "text": "y", "answer": "y"},
        {"id": float("nan"), "text": "no", "answer": ["no", float("inf")]},
        {"text": "7", "answer": {"x": "7"}},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = lines_of(classifier, path, columns=["all"])
    assert [json.loads(line)["columns"] for line in lines] == [
        {"id": 1, "answer": "y"},
        {"id": None, "answer": ["no", None]},
        {"answer": {"x": "7"}},
    ]
    assert "NaN" not in "".join(lines)
    kept = lines_of(classifier, path, columns=["id"])
    assert [json.loads(line)["columns"] for line in kept] == [{"id": 1}, {"id": None}, {"id": None}]
    with pytest.raises(DataError, match="no column 'nosuch' to keep; there are 'id', 'text', 'ans"):
        lines_of(classifier, path, columns=["nosuch"])
    output.write_text(kept[0])
    assert lines_of(classifier, path, columns=["id"], done=read_done(output)) == kept[1:]
    for other in ([], ["answer"], ["all"]):
        with pytest.raises(DataError, match="the run's original --keep-columns"):
            lines_of(classifier, path, columns=other, done=read_done(output))


def test_records_that_are_missing_or_out_of_order_are_found(rows, tmp_path):
    classifier, output = embedding(), tmp_path / "out.jsonl"
    lines = lines_of(classifier, rows)
    for missing in range(6):
        output.write_text("".join([*lines[:missing], *lines[missing + 1 : 7]]))
        with pytest.raises(DataError, match=r"3 records before|no such row"):
            lines_of(classifier, rows, done=read_done(output))
    for order in ((0, 2, 1), (0, 1, 1), (1, 0)):
        output.write_text("".join(lines[i] for i in order))
        with pytest.raises(DataError, match=r"line \d: not a prediction .*row \d after row \d"):
            read_done(output)


NO_RECORDS = {
    "text": b"good ||| fine\n",
    "a list": b"[1]\n",
    "a number": b"7\n",
    "no index": b'{"text": "a", "probabilities": {}}\n',
    "a flag as index": b'{"index": true, "text": "a", "probabilities": {}}\n',
    "no UTF-8": b'{"index": 0, "text": "\xff"}\n',
    "nested": b"[" * 100_000 + b"\n",
    "notes without an end of line": b"my only notes",
    "one character": b"[",
}


@pytest.mark.parametrize("case", NO_RECORDS)
def test_a_file_of_something_else_is_refused_and_kept(tmp_path, case):
    output = tmp_path / "out.jsonl"
    output.write_bytes(NO_RECORDS[case])
    with pytest.raises(DataError, match="line 1: not a prediction") as caught:
        read_done(output)
    assert "\n" not in str(caught.value)
    assert output.read_bytes() == NO_RECORDS[case]


def test_no_file_and_no_whole_line_are_a_start(tmp_path):
    assert read_done(tmp_path / "none.jsonl") == Done()
    assert not (tmp_path / "none.jsonl").exists()
    (tmp_path / "half.jsonl").write_bytes(b'{"index": 0, "te')
    assert read_done(tmp_path / "half.jsonl") == Done()

"""Reports: inert and self-contained pages, files that programs read, numbers that are right."""

import datetime
import fnmatch
import json
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from minllama.errors import MinllamaError
from minllama.evaluation.metrics import evaluate
from minllama.evaluation.report import Report, ReportedSplit, files, write_report
from minllama.evaluation.report.page import breakable, duration, flattened, render_page

ROOT = Path(__file__).resolve().parents[2]
VOID = {"meta", "br", "img", "link", "wbr"}
EVIL = (
    "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&amp;{{ 7*7 }}]]>--></style></svg>"
)
HISTORY = [
    *({"step": i, "epoch": i / 10, "loss": 2 - i / 30, "lr": 1e-3} for i in range(1, 31)),
    {"step": 15, "dev_accuracy": 0.5, "dev_macro_f1": 0.4, "dev_log_loss": 1.4},
    {"step": 30, "dev_accuracy": 0.6, "dev_macro_f1": 0.5, "dev_log_loss": 1.2},
]


class Page(HTMLParser):
    """The elements of a page, its texts, and whether each element is closed where it should be."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.texts, self._open = [], [], []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.texts.append(data)

    @property
    def tags(self):
        return {tag for tag, _ in self.elements}

    @property
    def text(self):
        return "".join(self.texts)


def make_split(names, rows=60, *, name="dev", multi_label=False, texts=None, others=()):
    random = np.random.default_rng(0)
    logits = random.normal(size=(rows, len(names))) * 2
    if multi_label:
        probabilities = (1 / (1 + np.exp(-logits))).astype(np.float32)
        noisy = logits + random.normal(size=logits.shape)
        labels = [tuple(np.flatnonzero(row).tolist()) for row in noisy > 0]
    else:
        probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        labels = (logits + random.normal(size=logits.shape)).argmax(1).tolist()
    result = evaluate(probabilities, labels, names, multi_label=multi_label, bootstrap=20)
    flat = np.full_like(probabilities, 1 / len(names))
    baseline = evaluate(flat, labels, names, multi_label=multi_label, bootstrap=20)
    return ReportedSplit(
        name=name,
        texts=texts or [f"text {i}" for i in range(rows)],
        probabilities=probabilities.astype(np.float32),
        labels=labels,
        evaluation=result,
        others=dict.fromkeys(others or ["majority class"], baseline),
    )


def make_report(names=("bad", "fair", "good"), **changes):
    values = {
        "title": "A report",
        "label_names": list(names),
        "splits": [make_split(list(names))],
        "history": HISTORY,
        "settings": {"lr": 3e-4, "lora": {"r": 8, "dora": False}},
        "versions": {"minllama": "0.1.0"},
        "created": datetime.datetime(2025, 7, 3, 14, 5, tzinfo=datetime.UTC),
        "seconds": 75.0,
    }
    return Report(**values | changes)


def evil_report():
    names = [EVIL, EVIL[::-1], "plain"]
    split = make_split(names, name=EVIL, texts=[EVIL] * 60, others=[EVIL])
    return make_report(
        names,
        title=EVIL,
        splits=[split, ReportedSplit(EVIL, [EVIL], split.probabilities[:1])],
        history=[*HISTORY, {EVIL: 1.0, "step": 31, "dev_" + EVIL: 1.0}],
        settings={EVIL: EVIL, "list": [EVIL], "deep": {EVIL: Path(EVIL)}},
        versions={EVIL: EVIL},
        notes=[EVIL],
    )


def test_no_text_or_name_becomes_markup():
    page = Page(render_page(evil_report()))
    names = ["a", "b", "a_name_of_many_words"]  # may be broken over lines: has <wbr>
    harmless = Page(render_page(make_report(names, splits=[make_split(names)] * 2, notes=["x"])))
    assert page.tags <= harmless.tags | {"table", "tbody"}
    assert not page.tags & {"script", "img", "iframe", "object", "link", "form", "base"}
    names = {name for _, attributes in page.elements for name in attributes}
    assert not [name for name in names if name.startswith("on") or name in ("src", "srcdoc")]
    # It is all there, as text.
    assert page.text.count(EVIL) >= 10
    assert EVIL in page.text.split("Most confident mistakes")[1]


@pytest.mark.parametrize("make", [evil_report, make_report])
def test_the_page_needs_nothing_from_elsewhere(make):
    html = render_page(make())
    page = Page(html)
    for tag, attributes in page.elements:
        assert "src" not in attributes
        for name in ("href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#"), tag
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    assert "@import" not in html
    assert "http://" not in html
    assert "https://" not in html
    policy = next(a["content"] for _, a in page.elements if "http-equiv" in a)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_links_lead_to_sections_and_drawings_to_their_parts():
    page = Page(render_page(make_report(splits=[make_split(["a", "b", "c"])] * 2)))
    assert all("href" in attributes for tag, attributes in page.elements if tag == "use")
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    targets = {attributes["href"][1:] for _, attributes in page.elements if "href" in attributes}
    assert {"split-1", "split-2", "training", "run"} <= targets <= ids


@pytest.mark.parametrize(
    ("classes", "multi_label"),
    [(1, False), (2, False), (25, False), (26, False), (101, False), (1, True), (77, True)],
)
def test_every_number_of_classes_has_a_page(classes, multi_label):
    names = [f"class {i}" for i in range(classes)]
    split = make_split(names, multi_label=multi_label)
    html = render_page(make_report(names, splits=[split], multi_label=multi_label, history=[]))
    page = Page(html)
    assert all(name in page.text for name in names)
    assert ("Confusion matrix" in page.text) == (classes <= 100 and not multi_label)
    assert len(html) < 1_000_000


def test_the_page_says_the_numbers():
    text = " ".join(Page(render_page(make_report(notes=["mind the gap"]))).text.split())
    split = make_report().splits[0]
    low, high = split.evaluation.intervals["accuracy"]
    assert f"{split.evaluation.accuracy:.1%}" in text
    assert f"95% interval {100 * low:.1f} to {100 * high:.1f}%" in text
    assert "3 classes 3 July 2025, 14:05 UTC 1 min 15 s" in text
    assert "mind the gap" in text
    assert "lr0.0003 lora.r8 lora.dorano" in text


def test_the_page_and_the_metrics_say_how_two_systems_differ_row_by_row(tmp_path):
    names = ["no", "yes"]
    split = make_split(names)
    write_report(tmp_path, make_report(names, splits=[split]))
    (paired,) = split.paired.values()
    found = paired.differences["accuracy"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    text = " ".join(Page(page).text.split())
    assert split.verdict in text
    low, high = 100 * found.low, 100 * found.high
    assert f"{100 * found.value:+.1f}{low:+.1f} to {high:+.1f}" in text
    assert "of the positive class, yes" in text
    content = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))["splits"]["dev"]
    assert content["verdict"] == split.verdict
    written = content["paired"]["majority class"]
    assert written["differences"]["accuracy"]["interval"] == [found.low, found.high]
    assert written["p_value"] == paired.p_value
    assert written["only_first_right"] - written["only_second_right"] == round(60 * found.value)


def test_what_is_not_defined_is_said_and_null(tmp_path):
    names, p = ["a", "b"], np.array([[0.4, 0.6], [0.3, 0.7]])
    labels = [(1,), (0, 1)]
    result = evaluate(p, labels, names, multi_label=True)
    split = ReportedSplit("dev", ["x", "y"], p, labels, result, {"other": result})
    write_report(tmp_path, make_report(names, splits=[split], multi_label=True))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "ROC AUC and AP are undefined for b: all texts have the label, or none has." in page
    content = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    rows = content["splits"]["dev"]["evaluation"]["per_class"]
    assert [row["roc_auc"] for row in rows] == [0.0, None]


def test_without_training_there_is_no_training_section():
    page = Page(render_page(make_report(history=[])))
    assert "Training" not in page.text
    assert [tag for tag, _ in page.elements].count("svg") == 1  # calibration
    assert [tag for tag, _ in Page(render_page(make_report())).elements].count("svg") == 3


def test_a_bare_report_has_a_page():
    probabilities = np.array([[0.2, 0.8], [0.6, 0.4], [0.1, 0.9]])
    bare = Report("Bare", ["no", "yes"], [ReportedSplit("in", ["a", "b", "c"], probabilities)])
    text = " ".join(Page(render_page(bare)).text.split())
    assert "These texts have no gold labels" in text
    assert "no1 33.3% yes2 66.7%" in text
    assert "Run" not in text
    empty = Report("Empty", ["no", "yes"], [ReportedSplit("in", [], np.zeros((0, 2)))])
    assert "0 texts" in Page(render_page(empty)).text


def test_predictions_are_lines_of_json(tmp_path):
    probabilities = np.array([[0.3, 0.7], [0.25, 0.75], [1.0, 0.0]], dtype=np.float32)
    split = ReportedSplit("dev", ["a\nb", "ü 🦙", "\ud800"], probabilities, [1, -1, 1])
    only = ReportedSplit("new", ["c"], np.array([[1 / 3, 2 / 3]]))
    write_report(tmp_path, Report("t", ["no", "yes"], [split, only]))
    lines = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert lines[0] == (
        '{"split": "dev", "text": "a\\nb", "label": "yes", "predicted": "yes", '
        '"probabilities": {"no": 0.3, "yes": 0.7}}'
    )
    rows = [json.loads(line) for line in lines]
    assert [row["text"] for row in rows] == ["a\nb", "ü 🦙", "\ud800", "c"]
    assert [row["label"] for row in rows] == ["yes", None, "yes", None]
    assert [row["predicted"] for row in rows] == ["yes", "yes", "no", "yes"]
    assert rows[3]["probabilities"] == {"no": 0.333333, "yes": 0.666667}


def test_predictions_of_several_labels_are_lists(tmp_path):
    split = ReportedSplit("dev", ["x", "y"], np.array([[0.5, 0.7], [0.1, 0.2]]), [(), None])
    write_report(tmp_path, Report("t", ["no", "yes"], [split], multi_label=True))
    text = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["label"] for row in rows] == [[], None]
    assert [row["predicted"] for row in rows] == [["no", "yes"], []]


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-30, 1.2345678e-5, 0.123456789, 1e-44])
def test_rounding_keeps_six_significant_digits(value):
    rounded = files._rounded(np.array([[value]], dtype=np.float32))[0, 0]
    assert rounded == pytest.approx(float(np.float32(value)), rel=5e-6)
    assert value < 1e-20 or len(f"{rounded}") <= 12


def test_metrics_hold_everything_that_was_evaluated(tmp_path):
    tricky = "brackets [\n 1,   2 ] in a string"
    report = make_report(
        history=[],
        settings={"nan": float("nan"), "path": Path("a"), "n": np.int64(3), "s": tricky, "t": (1,)},
    )
    write_report(tmp_path, report)
    text = (tmp_path / "metrics.json").read_text(encoding="utf-8")
    content = json.loads(text)
    split = report.splits[0]
    assert content["splits"]["dev"]["evaluation"] == split.evaluation.to_dict()
    assert content["splits"]["dev"]["others"]["majority class"]["accuracy"] > 0
    assert content["settings"] == {"nan": None, "path": "a", "n": 3, "s": tricky, "t": [1]}
    assert content["created"] == "2025-07-03T14:05:00+00:00"
    row = ", ".join(map(str, split.evaluation.confusion[0].tolist()))
    assert f"\n          [{row}],\n" in text


def test_the_same_report_gives_the_same_bytes(tmp_path):
    names = ("report.html", "metrics.json", "predictions.jsonl")
    for folder in ("one", "two"):
        assert write_report(tmp_path / folder, make_report()) == tmp_path / folder / "report.html"
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted(names)


@pytest.mark.parametrize("broken", ["render_page", "metrics_json", "prediction_lines"])
def test_a_report_that_fails_leaves_the_old_one_whole(tmp_path, monkeypatch, broken):
    folder = tmp_path / "run"
    write_report(folder, make_report(history=[]))
    (folder / "adapter").write_text("kept")
    old = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, broken, fail)
    with pytest.raises((MinllamaError, OSError), match="No space left"):
        write_report(folder, make_report(title="another", history=[]))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == old
    assert list(tmp_path.iterdir()) == [folder]


def test_a_new_report_takes_the_place_of_the_old_one_and_leaves_other_files(tmp_path):
    write_report(tmp_path / "run", make_report(history=[]))
    (tmp_path / "run" / "adapter").write_text("kept")
    write_report(tmp_path / "run", make_report(title="another", history=[]))
    assert "another" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "run" / "adapter").read_text() == "kept"


def test_half_characters_are_written_as_references(tmp_path):
    names = ["\ud800", "b"]
    split = make_split(names, texts=["half \udfff"] * 60)
    write_report(tmp_path, make_report(names, splits=[split], title="\ud83d", history=[]))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "half &#57343;" in html
    assert (
        json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))["label_names"] == names
    )


def test_settings_and_times_are_said_in_words():
    settings = {"a": None, "b": {"c": True, "d": {"e": [1, 2.5], "f": ()}}, "g": 3e-4}
    assert flattened(settings) == [
        ("a", "–"),
        ("b.c", "yes"),
        ("b.d.e", "1, 2.5"),
        ("b.d.f", "–"),
        ("g", "0.0003"),
    ]
    assert [duration(s) for s in (0.25, 59.94, 75, 7260)] == [
        "0.2 s",
        "59.9 s",
        "1 min 15 s",
        "2 h 1 min",
    ]


def test_only_long_words_may_break_inside():
    assert breakable("gate_proj, up_proj") == "gate_proj, up_proj"
    assert breakable("to sci.electronics") == "to sci.<wbr>electronics"
    assert breakable("<a_b>&<a_b>") == "&lt;a_<wbr>b&gt;&amp;&lt;a_<wbr>b&gt;"


def test_templates_and_styles_are_in_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["minllama"]
    package = ROOT / "minllama"
    data = [
        path.relative_to(package).as_posix()
        for path in (package / "evaluation" / "report").iterdir()
        if path.suffix not in (".py", ".pyc") and path.is_file()
    ]
    assert len(data) == 5
    assert [name for name in data if not any(fnmatch.fnmatch(name, p) for p in patterns)] == []

"""Claims about CSV and TSV: what separates, what is quoted, which line names the columns."""

import csv
import io
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minllama.data import load_dataset, stream_rows
from minllama.errors import DataError, OptionError
from minllama.options import DataOptions

pd = pytest.importorskip("pandas")

hypothesis = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# What a quoting writer quotes, and what it need not; no tabs beside line breaks, see below.
written = st.lists(
    st.sampled_from(["a", "é", " ", '"', '""', "\n", "\r\n", ",", ";", "'", "x y"]), min_size=1
).map("".join)


def texts_of(path: Path, content: str | bytes, **options: object) -> list[str]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return [row.text for row in stream_rows(path, DataOptions(**options))]


def refusal(path: Path, content: str, **options: object) -> str:
    path.write_text(content, newline="")
    with pytest.raises(DataError) as caught:
        load_dataset(path, DataOptions(**options))
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{path.parent}/", "")


@hypothesis
@given(
    rows=st.lists(st.tuples(written.filter(str.strip), st.sampled_from("pq")), min_size=1),
    columns=st.sampled_from([["text"], ["text", "label"], ["label", "text"]]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_what_pandas_writes_as_tsv_is_read_back(
    tmp_path: Path, rows: list[tuple[str, str]], columns: list[str], quoting: int
) -> None:
    path = tmp_path / "x.tsv"
    frame = pd.DataFrame(rows, columns=["text", "label"])[columns]
    frame.to_csv(path, sep="\t", index=False, quoting=quoting)
    assert [row.text for row in stream_rows(path)] == [text for text, _ in rows]
    again = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False, lineterminator="\n")
    assert len(again) == len(rows)


@hypothesis
@given(cells=st.lists(written.map(lambda text: text + "\t"), min_size=1))
def test_tabs_in_quoted_cells_are_text(tmp_path: Path, cells: list[str]) -> None:
    path = tmp_path / "x.tsv"
    frame = pd.DataFrame({"id": "i", "text": [f"x{cell}" for cell in cells], "label": "l"})
    frame.to_csv(path, sep="\t", index=False, quoting=csv.QUOTE_ALL)
    assert [row.text for row in stream_rows(path)] == [f"x{cell}" for cell in cells]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('text\n"line one\nline two"\nsecond\n', ["line one\nline two", "second"]),
        ('text\tid\n"a\r\nb"\t1\nc\t2\n', ["a\r\nb", "c"]),
        ('id\ttext\n1\t"a\n\n\nb"\n2\tc\n', ["a\n\n\nb", "c"]),
        ('id\ttext\n1\t"a ""b""\nc"\n2\td', ['a "b"\nc', "d"]),
        ('text\tnote\n"a\nb"\t"c\nd"\ne\tf\n', ["a\nb", "e"]),
        ('text\tid\n5" disk\t1\n"a\nb"\t2\n', ['5" disk', "a\nb"]),
        # A quote that nothing closes, or that closes nothing, is text.
        ('text\n"Hello\nsecond\n', ['"Hello', "second"]),
        ('text\n"Hello\nsay "hi" now\nbye\n', ['"Hello', 'say "hi" now', "bye"]),
        ('text\tid\n"\t1\n"a" and "b"\t2\n', ['"', '"a" and "b"']),
        ('text\tid\n"Great" film\t1\n"x\t2\nb\t3\n', ['"Great" film', '"x', "b"]),
        # Each line is a row by itself: quotes that open and close by chance.
        ('id\ttext\n1\t"Hello there\n2\tbye now"\n', ['"Hello there', 'bye now"']),
        # But not in a file of which another row shows that it was written with quotes.
        ('id\ttext\n1\t"so ""it"" goes"\n2\t"a\nb\tc"\n', ['so "it" goes', "a\nb\tc"]),
    ],
)
def test_quotes_in_tsv_are_a_writers_or_text(
    tmp_path: Path, content: str, texts: list[str]
) -> None:
    assert texts_of(tmp_path / "x.tsv", content, skip_bad_rows=True) == texts
    assert texts_of(tmp_path / "x.tsv", content) == texts


def test_a_quote_in_tsv_reaches_no_further_than_a_thousand_lines(tmp_path: Path) -> None:
    lines = [f"line {i}" for i in range(2000)]
    content = "text\n" + '"open\n' + "\n".join(lines) + '"\n'
    assert texts_of(tmp_path / "x.tsv", content) == ['"open', *lines[:-1], lines[-1] + '"']
    close = "text\n" + '"open\n' + "\n".join(lines[:900]) + '"\n'
    assert texts_of(tmp_path / "x.tsv", close) == ["open\n" + "\n".join(lines[:900])]


def test_places_are_right_behind_cells_of_several_lines(tmp_path: Path) -> None:
    content = 'text\tlabel\n"a\nb"\tx\nc\td\te\n'
    message = refusal(tmp_path / "x.tsv", content)
    assert message.startswith("x.tsv, line 4: columns: 3 here, 2 in the first line")
    content = 'text\tlabel\n"a\nb\xff"\tx\nc\td\n'
    (tmp_path / "y.tsv").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=r"y\.tsv, line 3: byte 2 \(0xff\) is not UTF-8"):
        load_dataset(tmp_path / "y.tsv")


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ('text,label\nx,a\n"open,b\ny,c\n', "line 3"),
        ('text,label\n"two\nlines","open\nz,c\n', "line 3"),
        ('text,label\n"open,a\ny,b\n"closed",c\n', "line 2"),
    ],
)
def test_a_quote_that_is_not_closed_is_told_where_it_opens(
    tmp_path: Path, content: str, place: str
) -> None:
    message = refusal(tmp_path / "x.csv", content)
    assert f"{place}: a quote is not closed" in message
    assert "line 4" not in message


def test_a_quote_that_is_not_closed_costs_its_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    rows = "".join(f"text {i},a\n" for i in range(5000))
    path.write_text(f'text,label\n"open,a\n{rows}"closed",b\n')
    dataset = load_dataset(path, DataOptions(skip_bad_rows=True))
    assert dataset.texts == [f"text {i}" for i in range(5000)] + ["closed"]
    assert [notice.count for notice in dataset.notices] == [1]


@pytest.mark.parametrize("tsv", [False, True])
@pytest.mark.parametrize(
    "again",
    ["text,label", '"text","label"', "\ufefftext,label", '\ufeff"text",label', "Text , LABEL"],
)
def test_a_line_of_names_among_the_rows_is_a_bad_row(tmp_path: Path, again: str, tsv: bool) -> None:
    path = tmp_path / ("x.tsv" if tsv else "x.csv")
    content = f"text,label\nx1,a\n{again}\nx2,b\n".replace(",", "\t" if tsv else ",")
    message = refusal(path, content)
    assert message.startswith(
        f"{path.name}, line 3: a line of column names, not an example; fix it"
    )
    dataset = load_dataset(path, DataOptions(skip_bad_rows=True))
    assert (dataset.texts, dataset.label_names) == (["x1", "x2"], ["a", "b"])
    assert "bad rows skipped: 1 of 3" in str(dataset.notices[0])


def test_a_line_of_names_among_labelled_lines_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    message = refusal(path, "Label ||| Sentence\npos ||| a\nneg ||| text\n")
    assert message.startswith("x.txt, line 1: a line of column names, not an example; fix it")


def test_names_of_another_order_are_refused_and_a_text_may_be_a_name(tmp_path: Path) -> None:
    message = refusal(tmp_path / "x.csv", "text,label\nx,a\nlabel,text\nb,y\n", skip_bad_rows=True)
    assert message.startswith("x.csv, line 3: has the column names in a different order")
    assert texts_of(tmp_path / "y.csv", "text,label\nx,a\ntext,b\nlabel,a\n") == [
        "x",
        "text",
        "label",
    ]


def test_a_mark_between_files_that_were_put_together_is_no_text(tmp_path: Path) -> None:
    for name, line in (
        ("x.txt", "{} ||| x"),
        ("x.csv", "{},x"),
        ("x.tsv", "{}\tx"),
        ("x.jsonl", '{{"label": "{}", "text": "x"}}'),
    ):
        header = {"x.csv": "label,text\n", "x.tsv": "label\ttext\n"}.get(name, "")
        content = f"\ufeff{header}{line.format('a')}\n\ufeff{line.format('b')}\n"
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert load_dataset(tmp_path / name).label_names == ["a", "b"]


@pytest.mark.parametrize("name", ["x.csv", "x.tsv"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_line_of_names_tells_what_separates(tmp_path: Path, name: str, separator: str) -> None:
    frame = pd.DataFrame({"text": ["a,b;c|d", "e"], "label": ["x", "y"]})
    frame.to_csv(tmp_path / name, sep=separator, index=False)
    dataset = load_dataset(tmp_path / name)
    assert (dataset.texts, dataset.label_names) == (["a,b;c|d", "e"], ["x", "y"])


@pytest.mark.parametrize(
    ("said", "separator"),
    [("^", "^"), (":", ":"), ("tab", "\t"), ("\\t", "\t"), ("\t", "\t"), ("Pipe", "|"), ("~", "~")],
)
def test_any_character_separates_where_it_is_said(
    tmp_path: Path, said: str, separator: str
) -> None:
    frame = pd.DataFrame({"words": ["a, b", f"c{separator}d"], "kind": ["x", "y"]})
    frame.to_csv(tmp_path / "x.csv", sep=separator, index=False)
    options = DataOptions(separator=said, text_column="words", label_column="kind")
    dataset = load_dataset(tmp_path / "x.csv", options)
    expected = pd.read_csv(tmp_path / "x.csv", sep=separator)
    assert dataset.texts == list(expected["words"]) == ["a, b", f"c{separator}d"]


@pytest.mark.parametrize("line", ["sep=;", "SEP=;", '"sep=;"', "\ufeffsep=;", "sep=;\r"])
def test_the_line_that_tells_excel_the_separator_is_no_row(tmp_path: Path, line: str) -> None:
    assert texts_of(tmp_path / "x.csv", f"{line}\ntext;label\na,b;x\n") == ["a,b"]
    (row,) = stream_rows(tmp_path / "x.csv")
    assert row.place == "line 3"


def test_columns_without_a_line_of_names_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    frame = pd.DataFrame([["I like it", "pos"], ["no, not", "neg"]])
    frame.to_csv(path, index=False, header=False)
    for options in (
        DataOptions(columns="text,label"),
        DataOptions(columns=" text , label ", no_header=True),
        DataOptions(no_header=True, text_column="1", label_column="2"),
    ):
        dataset = load_dataset(path, options)
        assert (dataset.texts, dataset.label_names) == (["I like it", "no, not"], ["neg", "pos"])
    for name, separator in (("x.tsv", "\t"), ("x.txt", "\t"), ("x", "\t")):
        frame.to_csv(tmp_path / name, index=False, header=False, sep=separator)
        assert load_dataset(tmp_path / name, DataOptions(columns="text,label")).texts == [
            "I like it",
            "no, not",
        ]
    assert texts_of(tmp_path / "y.csv", "one\ntwo\n", no_header=True) == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        ("a,b\n", {"columns": "text,label,id"}, "line 1: columns: 2 here, 3 in --columns"),
        (
            "a,b\n",
            {"no_header": True},
            "there are '1', '2'; name one with --text-column; name",
        ),
        (
            "text,label\na,b\n",
            {"columns": "text,label"},
            "line 1: a line of column names, not an exam",
        ),
        ("Sentence,Class\na,b\n", {"columns": "text,label"}, "omit --columns"),
        ("I like it,pos\nno,neg\n", {}, "add --no-header --columns text,label"),
        ("pos,I like it\nneg,no\n", {}, "add --no-header --columns label,text"),
        ("7,I like it,pos\n", {}, "add --no-header --columns text,label,..."),
    ],
)
def test_lines_of_names_that_are_none_are_told(
    tmp_path: Path, content: str, options: dict[str, object], words: str
) -> None:
    assert words in refusal(tmp_path / "x.csv", content, **options)


def test_one_column_of_sentences_is_asked_about(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("I liked it very much\nno\n")
    with pytest.raises(DataError, match=r"add --no-header --columns text$"):
        list(stream_rows(tmp_path / "x.csv"))
    assert texts_of(tmp_path / "y.csv", "Customer feedback\nno\n") == ["no"]


@pytest.mark.parametrize(
    "options",
    [
        {"separator": "ab"},
        {"separator": '"'},
        {"separator": "\n"},
        {"separator": ""},
        {"columns": ""},
        {"columns": "text,,label"},
        {"columns": "text,text"},
    ],
)
def test_separators_and_columns_without_sense_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(OptionError, match=r"^(separator|columns) must") as caught:
        DataOptions(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["jsonl", "json", "labelled", "text"])
def test_columns_are_for_csv_and_tsv(tmp_path: Path, kind: str) -> None:
    (tmp_path / "x").write_text("{}")
    for options in ({"no_header": True}, {"columns": "text"}, {"separator": ";"}):
        with pytest.raises(OptionError, match="are for csv and tsv, but the format"):
            load_dataset(tmp_path / "x", DataOptions(data_format=kind, **options))


def test_the_csv_modules_rows_are_ours(tmp_path: Path) -> None:
    content = 'id,text,label\n1,"a\r\nb ""c""",x\n\n2, d ,y\n3,"",z\n'
    (tmp_path / "x.csv").write_text(content, newline="")
    expected = [row for row in csv.DictReader(io.StringIO(content, newline="")) if row["text"]]
    assert [row.record for row in stream_rows(tmp_path / "x.csv", DataOptions(skip_bad_rows=True))]
    assert [
        row.record for row in stream_rows(tmp_path / "x.csv", DataOptions(skip_bad_rows=True))
    ] == expected


def test_names_of_columns_may_hold_commas_in_quotes(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("well,1,0\nno,0,1\n")
    options = DataOptions(columns='text,"late, or lost",c', label_columns='"late, or lost",c')
    data = load_dataset(tmp_path / "x.csv", options)
    assert [*data.label_names] == ["late, or lost", "c"]
    assert [data.classes_of(i) for i in range(2)] == [(0,), (1,)]
    for wrong in ('text,"a', "text,,a", "text,a,a"):
        with pytest.raises(
            OptionError, match="separated by commas, quoted where a name contains a comma"
        ):
            DataOptions(columns=wrong)

"""Where `minllama classify` writes: the format that a name says, refused ones, resumed runs."""

import csv
import io
import json

import pandas as pd
import pytest

from minllama import cli
from tests.experiment_cases import examples


@pytest.fixture
def rows(tmp_path):
    """Nine rows: identifiers with zeros in front, gold labels, texts."""
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "text"])
        for i, (label, text) in enumerate(examples(9, seed=4)):
            writer.writerow([f"00{i}", label, f'{text}, "so"\n{i}'])
    return path


READ = {
    "out.csv": lambda path: pd.read_csv(path, dtype={"id": str}),
    "OUT.CSV": lambda path: pd.read_csv(path, dtype={"id": str}),
    "out.tsv": lambda path: pd.read_csv(path, sep="\t", dtype={"id": str}),
    "out.parquet": pd.read_parquet,
    "deep/out.parquet": pd.read_parquet,
}


@pytest.mark.parametrize("name", READ)
def test_the_name_says_the_format(classify, rows, tmp_path, name):
    status, out, err = classify("-i", rows, "-o", name, "--keep-columns", "all")
    assert (status, out) == (0, ""), err
    assert "columns of the input, 'label' is named 'input_label' in the table\n" in err
    assert err.endswith("classified 9 texts, score sum\n")
    table = READ[name](tmp_path / name)
    expected = pd.read_csv(rows, dtype=str)
    names = ["id", "input_label", "index", "text", "label", "probability_bad", "probability_good"]
    assert list(table.columns) == [*names, "score", "classifier"]
    for column, ours in (("id", "id"), ("label", "input_label"), ("text", "text")):
        assert table[ours].tolist() == expected[column].tolist()
    is_good = table["probability_good"] > table["probability_bad"]
    assert (table["label"] == is_good.map({True: "good", False: "bad"})).all()
    assert not list(tmp_path.glob("**/*.partial.jsonl"))


@pytest.mark.parametrize(
    "name", ["out.xlsx", "out.csv.gz", "out.json", "out.jsonl.gz", "out.feather", "run.v2"]
)
@pytest.mark.parametrize("option", [(), ("--force",), ("--resume",)])
def test_an_unknown_ending_is_refused_before_a_model_is_opened(
    classify, rows, tmp_path, name, option
):
    status, out, err = classify("-i", rows, "-o", name, *option, model=tmp_path / "nowhere")
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    for known in (".jsonl", ".csv", ".tsv", ".parquet", ".txt", "--output-format", name):
        assert known in err
    assert not (tmp_path / name).exists()


def test_a_format_that_is_asked_for_counts(classify, rows, tmp_path):
    for name in ("out.dat", "out.json"):
        assert classify("-i", rows, "-o", name, "--output-format", "csv")[0] == 0
        assert len(pd.read_csv(tmp_path / name)) == 9
    assert classify("-i", rows, "-o", "labels")[0] == 0
    assert json.loads((tmp_path / "labels").read_text().splitlines()[0])["index"] == 0
    status, out, _ = classify("-i", rows, "--output-format", "tsv")
    assert status == 0
    assert pd.read_csv(io.StringIO(out), sep="\t")["index"].tolist() == list(range(9))


def test_a_column_with_a_comma_in_its_name_is_kept(classify, tmp_path):
    (tmp_path / "rows.csv").write_text('id,"when, where",text\n1,here,fine\n')
    given = ("-i", "rows.csv", "-o", "out.csv", "--keep-columns")
    assert classify(*given, 'id, "when, where"')[0] == 0
    assert list(pd.read_csv(tmp_path / "out.csv").columns[:3]) == ["id", "when, where", "index"]
    status, _, err = classify(*given, '"when', "--force")
    assert status == 2
    assert err.startswith("minllama: --keep-columns ")
    assert err.count("\n") == 1


REFUSED = {
    "parquet to a terminal": (("--output-format", "parquet"), "Parquet needs a regular file"),
    "parquet to a device": (
        ("-o", "/dev/null", "--output-format", "parquet"),
        "Parquet needs a regular file",
    ),
    "json": (
        ("-o", "out.csv", "--json"),
        "--json: only for --text (--output-format is for --input)",
    ),
    "a mark of lines": (
        ("-o", "out.jsonl", "--bom"),
        "--bom: only for CSV and TSV output; omit it",
    ),
    "no such column": (("-o", "out.csv", "--keep-columns", "when"), "no column 'when' to keep"),
    "parts": (("-o", "cut.parquet"), "cut.parquet.partial.jsonl exists; --resume continues"),
    "the lines of a run": (
        ("-o", "cut.parquet", "-i", "cut.parquet.partial.jsonl", "--force"),
        "cut.parquet.partial.jsonl is also the --input",
    ),
    "no rows": (("-o", "out.csv", "-i", "-"), "standard input: no rows"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_written_is_refused_in_one_line(classify, rows, tmp_path, case):
    options, message = REFUSED[case]
    (tmp_path / "cut.parquet.partial.jsonl").write_text('{"index": 0')
    source = () if "-i" in options else ("-i", rows)
    status, out, err = classify(*source, *options)
    assert (status, out) == (2, "")
    assert message in err.splitlines()[-1]
    assert not list(tmp_path.glob("out*"))
    assert (tmp_path / "cut.parquet.partial.jsonl").read_text() == '{"index": 0'


def test_without_pyarrow_parquet_is_refused_before_a_model_is_opened(
    classify, rows, tmp_path, monkeypatch
):
    monkeypatch.setattr("minllama.cli.output_file.find_spec", lambda name: None)
    given = ("-i", rows, "-o", "out.parquet")
    status, _, err = classify(*given, model=tmp_path / "nowhere")
    assert (status, err.count("\n")) == (2, 1)
    assert "Parquet needs the library pyarrow; install it with: python -m pip install" in err


@pytest.mark.parametrize("name", ["out.csv", "out.tsv", "out.parquet"])
def test_a_run_that_was_cut_goes_on(classify, rows, tmp_path, name):
    output, common = tmp_path / name, ("-i", rows, "-o", name, "--keep-columns", "all")
    assert classify(*common)[0] == 0
    whole = output.read_bytes()
    assert classify(*common)[0] == 2  # it is there already
    status, _, err = classify(*common, "--resume")
    assert status == 0, err
    assert err.endswith("classified 0 texts, score sum\n")
    assert output.read_bytes() == whole
    if name == "out.parquet":
        output.write_bytes(whole[:-4])
        status, _, err = classify(*common, "--resume")
        assert status == 2
        assert "name another file, or replace it with --force" in err
        assert output.read_bytes() == whole[:-4]
    else:
        output.write_bytes(whole[:-70])
        status, _, err = classify(*common, "--resume")
        assert status == 0, err
        assert "resuming after row 7 of" in err
    if name != "out.parquet":
        assert output.read_bytes() == whole
    assert classify(*common, "--force")[0] == 0
    assert output.read_bytes() == whole
    other = ("--keep-columns", "id", "--resume")
    status, _, err = classify("-i", rows, "-o", name, *other)
    assert status == 2
    assert "give the run's original --keep-columns" in err
    assert output.read_bytes() == whole


def test_parquet_that_fails_half_way_keeps_its_lines(classify, tmp_path):
    lines = "".join(json.dumps({"text": f"a b {i}"}) + "\n" for i in range(520))
    common = ("-i", "-", "-o", "out.parquet", "--data-format", "jsonl")
    status, _, err = classify(*common, stdin=(lines + "nonsense\n").encode())
    assert status == 2
    assert "line 521" in err
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet.partial.jsonl"]
    status, _, err = classify(*common, "--resume", stdin=lines.encode())
    assert status == 0, err
    assert err.endswith("classified 8 texts, score sum\n")
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]
    assert pd.read_parquet(tmp_path / "out.parquet")["index"].tolist() == list(range(520))


def test_a_byte_order_mark_is_written_on_request_and_gone_on_with(classify, rows, tmp_path):
    common, output = ("-i", rows, "-o", "out.csv"), tmp_path / "out.csv"
    assert classify(*common)[0] == 0
    plain = output.read_bytes()
    assert plain.startswith(b"index,")
    assert classify(*common, "--bom", "--force")[0] == 0
    assert output.read_bytes() == b"\xef\xbb\xbf" + plain
    assert pd.read_csv(output).columns[0] == "index"
    output.write_bytes(output.read_bytes()[:-30])
    assert classify(*common, "--resume")[0] == 0
    assert output.read_bytes() == b"\xef\xbb\xbf" + plain


def test_bad_rows_are_left_out_of_tables_as_of_lines(classify, tmp_path):
    lines = b'{"text": "fine"}\n{"text": ""}\n{"text": "dull"}\nnonsense\n'
    (tmp_path / "rows.jsonl").write_bytes(lines)
    status, _, err = classify("-i", "rows.jsonl", "-o", "out.csv", "--skip-bad-rows")
    assert status == 0, err
    assert pd.read_csv(tmp_path / "out.csv")["index"].tolist() == [0, 2]
    given = ("-i", "-", "--data-format", "jsonl", "--skip-bad-rows", "-o", "none.csv")
    status, _, err = classify(*given, stdin=b'{"text": ""}\n')
    assert status == 2
    assert "standard input: all 1 rows are bad: line 1: the text is empty" in err
    assert not (tmp_path / "none.csv").exists()


@pytest.mark.parametrize("name", ["out.csv", "out.parquet"])
def test_what_is_written_trains_and_is_evaluated(classify, capfd, base, tmp_path, name):
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text"])
        for i, (_, text) in enumerate(examples(40, seed=4)):
            writer.writerow([i, f'{text}, "so"\n{i}'])
    assert classify("-i", "rows.csv", "-o", name, "--keep-columns", "id")[0] == 0
    command = ["train", "--train", name, "-m", str(base), "--method", "frozen", "-o", "run"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*command, "--device", "cpu"])
    captured = capfd.readouterr()
    assert ended.value.code == 0, captured.err
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", "run", "--data", name])
    captured = capfd.readouterr()
    assert ended.value.code == 0, captured.err
    assert "of 40 texts" in " ".join(captured.out.split())

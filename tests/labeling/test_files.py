"""Files in a folder of parts: the rows of the file command, whatever interrupts it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import fs, parquet

from minllama import cli
from minllama.errors import DataError, MinllamaError, OptionError
from minllama.labeling import Labeler, label_files
from minllama.labeling.inputs import find_inputs
from minllama.options import DataOptions
from minllama.options.labeling import LabelingOptions
from tests.labeling.conftest import write_rows

SMALL = LabelingOptions(rows_per_part=8)


def rows_in(folder: Path) -> pd.DataFrame:
    """All rows of all parts, by row_id."""
    return pd.read_parquet(folder).sort_values("row_id", ignore_index=True)


@pytest.fixture
def labeler(folder_of_classifier: Path) -> Labeler:
    return Labeler(folder_of_classifier)


def test_parts_have_the_rows_of_the_file_command(
    labeler: Labeler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "in", 1, 30, bad=(4, 7))
    outcome = label_files(labeler, str(tmp_path / "in"), tmp_path / "out", options=SMALL)
    assert (outcome.labeled, outcome.bad) == (28, 2)
    assert outcome.reasons == (("no text", 1), ("the text is empty", 1))
    found = rows_in(tmp_path / "out")
    file = str(tmp_path / "in" / "rows-0.parquet")
    arguments = ["classify", labeler.classifier_name, "-i", file, "-o", str(tmp_path / "o.jsonl")]
    with pytest.raises(SystemExit) as ended:
        cli.main([*arguments, "--skip-bad-rows"])
    assert ended.value.code == 0
    lines = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    good = found[found["status"] == "labeled"]
    assert good["index"].tolist() == [line["index"] for line in lines]
    assert good["text"].tolist() == [line["text"] for line in lines]
    assert good["label"].tolist() == [line["label"] for line in lines]
    for name in ("bad", "good", "so-so"):
        p = [line["probabilities"][name] for line in lines]
        assert good[f"probability_{name}"].tolist() == pytest.approx(p, rel=1e-4)
    bad = found[found["status"] == "bad"]
    assert bad["index"].tolist() == [4, 7]
    assert bad["error"].tolist() == ["no text", "the text is empty"]


def test_csv_jsonl_and_parquet_give_the_same_rows(labeler: Labeler, tmp_path: Path) -> None:
    frame = pd.DataFrame({"key": ["01", "02", "03"], "text": ["fine", "", "it drags"]})
    for kind in ("csv", "jsonl", "parquet"):
        (tmp_path / kind).mkdir()
    frame.to_csv(tmp_path / "csv" / "a.csv", index=False)
    frame.to_json(tmp_path / "jsonl" / "a.jsonl", orient="records", lines=True)
    frame.to_parquet(tmp_path / "parquet" / "a.parquet")
    tables = []
    for kind in ("csv", "jsonl", "parquet"):
        output = tmp_path / f"out-{kind}"
        label_files(labeler, str(tmp_path / kind), output, keep=["key"])
        tables.append(rows_in(output).drop(columns="file"))
    pd.testing.assert_frame_equal(tables[0], tables[1])
    pd.testing.assert_frame_equal(tables[0], tables[2])
    assert tables[0]["key"].tolist() == ["01", "02", "03"]  # no number is made of it


def test_broken_rows_of_text_files_keep_their_place_and_reason(
    labeler: Labeler, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text("key,text\na,fine\nb,too,many\nc,\nd,so so\n")
    (tmp_path / "in" / "b.csv").write_text("key,text\ne,other\n")
    label_files(labeler, str(tmp_path / "in"), tmp_path / "out", keep=["key"], options=SMALL)
    found = rows_in(tmp_path / "out")
    assert found["file"].tolist() == ["a.csv"] * 4 + ["b.csv"]
    assert found["index"].tolist() == [0, 1, 2, 3, 0]
    assert found["status"].tolist() == ["labeled", "bad", "bad", "labeled", "labeled"]
    assert found["error"].fillna("").tolist()[1] == "columns: 3 here, 2 in the first line"
    assert found["key"].tolist()[2] == "c"
    assert found["row_id"].is_unique


def test_patterns_folders_and_uris_name_files(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv.gz", "sub/c.csv", ".hidden.csv", "_old/d.csv", "note.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text\nx\n")

    def names(source: str) -> list[str]:
        found = find_inputs(source)
        return [str(Path(path).relative_to(tmp_path)) for path in found.paths]

    assert names(str(tmp_path)) == ["a.csv", "b.csv.gz", "sub/c.csv"]
    assert names(f"{tmp_path}/*.csv") == ["a.csv"]
    assert names(f"{tmp_path}/*.csv*") == ["a.csv", "b.csv.gz"]
    assert names(f"{tmp_path}/**/*.csv") == ["a.csv", "sub/c.csv"]
    assert names(f"{tmp_path}/[ab].csv") == ["a.csv"]
    assert names(f"file://{tmp_path}/s*/?.csv") == ["sub/c.csv"]
    assert names(str(tmp_path / "a.csv")) == ["a.csv"]
    with pytest.raises(DataError, match="no files"):
        find_inputs(f"{tmp_path}/*.parquet")
    with pytest.raises(DataError, match="cannot be listed"):
        find_inputs("nosuch://bucket/a.csv")
    (tmp_path / "e.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(DataError, match="files of different formats"):
        find_inputs(str(tmp_path))


def test_an_earlier_run_is_neither_replaced_nor_continued_by_mistake(
    labeler: Labeler, tmp_path: Path
) -> None:
    source = str(write_rows(tmp_path / "in", 2, 10))
    output = tmp_path / "out"
    label_files(labeler, source, output, options=SMALL)
    with pytest.raises(OptionError, match="--resume continues it, --force replaces it"):
        label_files(labeler, source, output, options=SMALL)
    with pytest.raises(DataError, match="started with other 'rows per part'"):
        label_files(labeler, source, output, resume=True)
    assert label_files(labeler, source, output, options=SMALL, resume=True).was_complete
    write_rows(tmp_path / "in", 3, 10)
    with pytest.raises(DataError, match="started with other 'input files'"):
        label_files(labeler, source, output, options=SMALL, resume=True)
    assert label_files(labeler, source, output, options=SMALL, force=True).labeled == 30
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(OptionError, match="has files of something else"):
        label_files(labeler, source, tmp_path / "mine", force=True)


def test_a_damaged_file_ends_the_run_and_can_be_mended(labeler: Labeler, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in", 2, 10)
    whole = (source / "rows-1.parquet").read_bytes()
    (source / "rows-1.parquet").write_bytes(whole[:-50] + b"x" * 50)
    with pytest.raises(DataError, match=r"rows-1\.parquet: damaged, or not a Parquet file"):
        label_files(labeler, str(source), tmp_path / "out", options=SMALL)
    (source / "rows-1.parquet").write_bytes(whole)
    outcome = label_files(labeler, str(source), tmp_path / "out", options=SMALL, resume=True)
    assert (outcome.labeled, outcome.was_complete) == (20, False)


def test_kept_columns_have_names_of_their_own(labeler: Labeler, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    columns = {"index": [5, 6], "text": ["fine", "bad"], "label": ["x", "y"]}
    parquet.write_table(pa.table(columns), tmp_path / "in" / "a.parquet")
    label_files(labeler, str(tmp_path / "in"), tmp_path / "out", keep=["index"])
    found = rows_in(tmp_path / "out")
    assert found["input_index"].tolist() == [5, 6]
    assert found["index"].tolist() == [0, 1]
    with pytest.raises(OptionError, match="'label' would have the name of a column"):
        label_files(labeler, str(tmp_path / "in"), tmp_path / "other", keep=["label"])
    with pytest.raises(OptionError, match="no column 'nope' to keep"):
        label_files(labeler, str(tmp_path / "in"), tmp_path / "third", keep=["nope"])


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_rows_of_an_uncut_one(labeler: Labeler, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "in", 3, 400, bad=tuple(range(0, 1200, 97)))
    label_files(labeler, str(source), tmp_path / "whole", options=SMALL)
    command = [
        *(sys.executable, "-m", "minllama", "classify", labeler.classifier_name),
        *("--input", str(source), "--output", str(tmp_path / "cut"), "--rows-per-part", "8"),
    ]
    for kill_after in (5, 40):
        process = subprocess.Popen([*command, "--resume"], stderr=subprocess.DEVNULL)
        while len(list((tmp_path / "cut").rglob("*.parquet"))) < kill_after:
            assert process.poll() is None
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert subprocess.run([*command, "--resume"]).returncode == 0
    whole, cut = rows_in(tmp_path / "whole"), rows_in(tmp_path / "cut")
    pd.testing.assert_frame_equal(whole, cut)
    assert len(whole) == 1200


def run(*arguments: Any) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["classify", *map(str, arguments)])
    return int(ended.value.code or 0)


def test_the_command_labels_folders_and_refuses_what_has_no_effect(
    labeler: Labeler, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, name = write_rows(tmp_path / "in", 2, 10, bad=(3,)), labeler.classifier_name
    assert run(name, "-i", source, "-o", tmp_path / "out") == 0
    told = capsys.readouterr().err
    assert "bad rows in" in told
    assert "classified 19 texts" in told
    file = source / "rows-0.parquet"
    assert run(name, "-i", file, "-o", f"{tmp_path}/one/") == 0
    assert len(rows_in(tmp_path / "one")) == 10
    capsys.readouterr()
    for arguments, message in (
        ((name, "-i", source), "name it with --output DIR"),
        ((name, "-i", file, "--actors", "2"), "--actors: only for several files"),
        ((name, "-i", source, "-o", "x", "--actors", "2"), "only for --engine ray"),
        ((name, "-i", source, "-o", "x", "--explain"), "--explain: not for a folder"),
        ((name, "-i", source, "-o", "x", "--keep-columns", "all"), "name those to keep"),
        (("--labels", "a,b", "-i", source, "-o", "x"), "with a CLASSIFIER"),
    ):
        assert run(*arguments) == 2
        assert message in capsys.readouterr().err


def test_files_are_read_through_arrow_s_file_systems(tmp_path: Path, labeler: Labeler) -> None:
    write_rows(tmp_path / "in", 1, 5)
    found = find_inputs(f"file://{tmp_path}/in")
    assert isinstance(found.filesystem, fs.LocalFileSystem)
    outcome = label_files(labeler, f"file://{tmp_path}/in", tmp_path / "out")
    assert outcome.labeled == 5


def test_two_runs_do_not_write_one_folder(labeler: Labeler, tmp_path: Path) -> None:
    from minllama.atomic import only_run

    source = write_rows(tmp_path / "in", 1, 5)
    program = (
        "import sys, time; from minllama.atomic import only_run\n"
        "with only_run(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "out")], stdout=subprocess.PIPE
    )
    try:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(MinllamaError, match="another run"):
            label_files(labeler, str(source), tmp_path / "out", data=DataOptions())
    finally:
        other.kill()
        other.communicate()
    with only_run(tmp_path / "out"):
        assert label_files(labeler, str(source), tmp_path / "out").labeled == 5

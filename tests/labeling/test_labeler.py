"""The function of batches that other programs call, beside the classifier itself."""

import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from minllama.classification import load_classifier
from minllama.errors import CheckpointError, OptionError
from minllama.labeling import Labeler
from minllama.options.evaluation import ThresholdOptions
from tests.labeling.conftest import LABELS

TEXTS = ["a fine film", "it drags on", "", None, "so so", 3.5, "half \ud800"]
REASONS = [
    *(None, None, "the text is empty", "no text", None, "float instead of a text"),
    "the text contains half of a character (a lone surrogate)",
]
GOOD = [row for row, reason in enumerate(REASONS) if reason is None]
PROBABILITIES = [f"probability_{label}" for label in LABELS]


@pytest.fixture
def labeler(folder_of_classifier: Path) -> Labeler:
    return Labeler(folder_of_classifier)


def expected(folder: Path) -> tuple[list[str], np.ndarray[Any, Any]]:
    """Labels and probabilities of the good texts by the classifier, called directly."""
    classifier = load_classifier(folder)
    p = classifier.predict_proba([str(TEXTS[row]) for row in GOOD])
    return [LABELS[i] for i in p.argmax(-1)], p


def test_a_data_frame_gets_labels_probabilities_and_reasons(
    labeler: Labeler, folder_of_classifier: Path
) -> None:
    frame = pd.DataFrame({"text": TEXTS, "n": range(7)}, index=list("abcdefg"))
    before = frame.copy()
    labeled = labeler(frame)
    pd.testing.assert_frame_equal(frame, before)
    assert list(labeled) == ["text", "n", "label", *PROBABILITIES, "error"]
    labels, p = expected(folder_of_classifier)
    assert labeled["error"].tolist() == REASONS
    assert labeled["label"].iloc[GOOD].tolist() == labels
    np.testing.assert_allclose(labeled[PROBABILITIES].iloc[GOOD], p, rtol=1e-5)
    bad = labeled.drop(index=[*"abe"])
    assert bad[["label", *PROBABILITIES]].isna().all(axis=None)


def test_all_kinds_of_batches_give_the_same(labeler: Labeler) -> None:
    texts = TEXTS[:5]
    by_lists: Any = labeler({"text": texts})
    by_arrays: Any = labeler({"text": np.array(texts, dtype=object)})
    by_table = labeler(pa.table({"text": pa.array(texts)}))
    by_batch = labeler(pa.record_batch({"text": pa.array(texts)}))
    assert by_table.to_pydict() == by_lists == by_batch.to_pydict()
    assert isinstance(by_batch, pa.RecordBatch)
    assert {name: by_arrays[name] for name in by_lists if name != "text"} == {
        name: by_lists[name] for name in by_lists if name != "text"
    }


def test_a_pickle_holds_no_weights_and_works_in_another_process(
    labeler: Labeler, tmp_path: Path
) -> None:
    answer: Any = labeler({"text": TEXTS[:3]})  # the classifier is loaded
    pickled = pickle.dumps(labeler)
    assert len(pickled) < 2000
    (tmp_path / "labeler").write_bytes(pickled)
    program = (
        "import pickle, sys; labeler = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(labeler({'text': ['a fine film', 'it drags on', '']}))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "labeler")], capture_output=True, text=True
    )
    assert result.stdout.strip() == str(answer), result.stderr


def test_columns_of_a_batch_are_not_replaced(folder_of_classifier: Path) -> None:
    frame = pd.DataFrame({"text": ["fine"], "label": ["good"]})
    with pytest.raises(OptionError, match="columns named 'label' already; give a prefix"):
        Labeler(folder_of_classifier)(frame)
    labeled = Labeler(folder_of_classifier, prefix="predicted_")(frame)
    assert labeled["label"].tolist() == ["good"]
    assert labeled["predicted_label"].tolist()[0] in LABELS


def test_what_cannot_work_says_why(folder_of_classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no column 'body', but 'text'; name another"):
        Labeler(folder_of_classifier, text_column="body")({"text": ["x"]})
    with pytest.raises(
        OptionError, match="must be a pandas DataFrame, an Arrow table or a mapping"
    ):
        Labeler(folder_of_classifier)(["x"])
    with pytest.raises(CheckpointError, match="name a classifier's folder"):
        Labeler(tmp_path)({"text": ["x"]})


def test_thresholds_are_those_of_the_option(folder_of_classifier: Path, tmp_path: Path) -> None:
    from minllama.classification import save_classifier

    classifier = load_classifier(folder_of_classifier)
    several = type(classifier)(
        classifier.llama, classifier.tokenizer, LABELS, pooling="mean", multi_label=True
    )
    save_classifier(several, tmp_path / "several")
    high = Labeler(tmp_path / "several", threshold=ThresholdOptions(threshold=("0.999",)))
    low = Labeler(tmp_path / "several", threshold=ThresholdOptions(threshold=("0.001",)))
    assert high({"text": ["fine"]})["label"] == [[]]  # type: ignore[index]
    assert low({"text": ["fine"]})["label"] == [list(LABELS)]  # type: ignore[index]
    assert low(pa.table({"text": ["fine"]})).schema.field("label").type == pa.list_(pa.string())


def test_datasets_map_calls_it(labeler: Labeler, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["a fine film", "", "so so"], "n": [1, 2, 3]})
    mapped = rows.map(labeler, batched=True, batch_size=2)
    frame = labeler(pd.DataFrame({"text": ["a fine film", "", "so so"]}))
    assert [*mapped["error"]] == [None, "the text is empty", None]
    assert [*mapped["label"]] == frame["label"].tolist()
    assert [*mapped["n"]] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Spark's own code
def test_spark_calls_it_in_map_in_pandas(labeler: Labeler) -> None:
    sql = pytest.importorskip("pyspark.sql", reason="needs pyspark")
    if shutil.which("java") is None:
        pytest.skip("Spark needs Java")
    frame = pd.DataFrame({"n": range(20), "text": ["a fine film", "", "so so", None] * 5})
    spark = (
        sql.SparkSession.builder.master("local[1]")
        .config("spark.ui.enabled", "false")
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", "6")
        .getOrCreate()
    )
    try:
        rows = spark.createDataFrame(
            [(int(n), text if isinstance(text, str) else None) for n, text in frame.to_numpy()],
            "n long, text string",
        )
        labeled = rows.mapInPandas(labeler.frames, labeler.spark_schema(rows.schema))
        found = pd.DataFrame([tuple(row) for row in labeled.collect()], columns=labeled.columns)
    finally:
        spark.stop()
    expected_frame = labeler(frame)
    assert list(found) == list(expected_frame)
    found = found.sort_values("n", ignore_index=True)
    for name in ("text", "label", "error"):
        assert found[name].fillna("").tolist() == expected_frame[name].fillna("").tolist()
    np.testing.assert_allclose(
        found[PROBABILITIES].astype(float), expected_frame[PROBABILITIES], rtol=1e-4
    )

"""A task's targets are the one-hot and the multi-hot forms of scikit-learn."""

import numpy as np
import pytest
from sklearn.preprocessing import MultiLabelBinarizer, label_binarize

from minllama.data import Dataset
from minllama.data.task import Task


def test_targets_of_one_label_per_text_are_one_hot():
    labels = [2, 0, 3, 2]
    expected = label_binarize(labels, classes=range(4)).astype(bool)
    np.testing.assert_array_equal(Task(4).target(labels), expected)
    assert Task(4).target([]).shape == (0, 4)


def test_targets_of_several_labels_per_text_are_multi_hot():
    labels = [(1, 2), (), (0,)]
    expected = MultiLabelBinarizer(classes=range(4)).fit_transform(labels).astype(bool)
    np.testing.assert_array_equal(Task(4, multi_label=True).target(labels), expected)


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_task_is_that_of_its_training_texts(multi_label):
    labels = [(0,), (1, 0)] if multi_label else [0, 1]
    train = Dataset(["a", "b"], labels, ["x", "y", "z"], "here", multi_label=multi_label)
    assert Task.of(train, balanced=True, seed=7) == Task(3, multi_label, balanced=True, seed=7)


@pytest.mark.parametrize(("labels", "multi_label"), [([0, -1], False), ([(0,), (1, -1)], True)])
def test_a_text_without_a_label_is_no_last_class(labels, multi_label):
    with pytest.raises(AssertionError, match="without a label"):
        Task(2, multi_label).target(labels)

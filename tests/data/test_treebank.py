"""A treebank's spacing and brackets, undone."""

import pytest

from minllama.data.treebank import undo_treebank


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It 's a lovely film , is n't it ?", "It's a lovely film, isn't it?"),
        ("-LRB- A -RRB- fine start", "(A) fine start"),
        ("`` Hello , '' he said .", '"Hello," he said.'),
        ("the boys ' room", "the boys' room"),
        ("We 'd say they 're $ 10 million ...", "We'd say they're $10 million..."),
        ("rock 'n' roll", "rock 'n' roll"),
        ("Already written, as it's usual.", "Already written, as it's usual."),
        ("", ""),
        ("a : b ; c !", "a: b; c!"),
        ("-lrb- small -rrb-", "(small)"),
    ],
)
def test_tokens_become_text(text, expected):
    assert undo_treebank(text) == expected


def test_it_is_done_once():
    text = "He said , `` it 's -LRB- perhaps -RRB- fine . ''"
    assert undo_treebank(undo_treebank(text)) == undo_treebank(text)

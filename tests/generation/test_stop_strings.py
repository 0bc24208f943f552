"""Stop strings among special tokens, token by token, beside a search through the whole text."""

import random

from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from minllama.generation.stop_strings import RowText
from minllama.tokenizer.tokenizer import Tokenizer
from minllama.tokenizer.vocabulary import Vocabulary

SPECIAL = ("<b>", "<a>", "ab")
PARTS = ("a", "b", "<", ">", *SPECIAL)


def a_tokenizer() -> Tokenizer:
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Library(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(list(SPECIAL))
    return Tokenizer(Vocabulary("tokenizers", library.to_str().encode(), "test"))


def searched(parts: list[tuple[str, bool]], stops: list[str], hides: bool) -> tuple[str, bool]:
    """The text before the first stop string, and whether there is one.

    A character is (itself, whether a special token's, its place in that).
    """
    text: list[tuple[str, bool, int]] = []
    for part, special in parts:
        text += [(char, special, place) for place, char in enumerate(part)]
        spelled = "".join(char for char, _, _ in text)
        cut = [hides and special and place > 0 for _, special, place in text] + [False]
        starts = [
            start
            for stop in stops
            for start in range(len(text))
            if spelled.startswith(stop, start) and not (cut[start] or cut[start + len(stop)])
        ]
        shown = [i for i, (_, special, _) in enumerate(text) if not (hides and special)]
        found = ["".join(spelled[i] for i in shown).find(stop) for stop in stops]
        starts += [shown[start] for start in found if start >= 0]
        if starts:
            return "".join(spelled[i] for i in shown if i < min(starts)), True
    return "".join(char for char, special, _ in text if not (hides and special)), False


def test_what_comes_token_by_token_is_what_a_search_finds() -> None:
    tokenizer, draws, n_stopped = a_tokenizer(), random.Random(1), 0
    for _ in range(5000):
        parts = [(p, p in SPECIAL) for p in draws.choices(PARTS, k=draws.randint(1, 9))]
        stops = ["".join(draws.choices(PARTS, k=draws.randint(1, 3))) for _ in range(2)]
        hides = draws.random() < 0.6
        row, text = RowText(tokenizer, tuple(stops), skip_special=hides), ""
        for part, special in parts:
            (token_id,) = tokenizer.encode(part, special=special)
            text += row.push(token_id)
            if row.stopped:
                break
        if not row.stopped:
            text += row.end()
        assert (text, row.stopped) == searched(parts, stops, hides), (parts, stops, hides)
        n_stopped += row.stopped
    assert 1000 < n_stopped < 4000

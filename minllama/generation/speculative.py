"""Prompt lookup: draft the tokens that followed the last occurrence of the newest tokens.

Prompt lookup decoding (Saxena 2023): a drafting model that costs nothing. Drafts are checked in one
pass and change no token (Leviathan et al. 2023).
"""

from collections.abc import Sequence

LONGEST, SHORTEST = 3, 2  # tokens that must match; a single one predicts too little


class PromptLookup:
    """An index of the positions of all short n-grams of a growing text.

    Args:
        most: tokens of a draft.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._seen = 0  # number of tokens whose n-grams are indexed
        self._next: dict[tuple[int, ...], int] = {}  # last tokens -> position after them

    def draft(self, ids: Sequence[int], most: int) -> list[int]:
        """Draft what followed the latest earlier occurrence of the text's last tokens.

        Args:
            ids: the text so far, which extends that of earlier calls.
            most: no more than so many tokens.

        Returns:
            Token ids; none where the end is new.
        """
        # Nothing follows the last n-gram yet, so the next call adds it.
        for end in range(self._seen + 1, len(ids)):
            for n in range(SHORTEST, LONGEST + 1):
                if end >= n:
                    self._next[tuple(ids[end - n : end])] = end
        self._seen = max(self._seen, len(ids) - 1)
        for n in range(LONGEST, SHORTEST - 1, -1):
            place = self._next.get(tuple(ids[-n:]))
            if place is not None and len(ids) > n:
                return list(ids[place : place + min(self._most, most)])
        return []

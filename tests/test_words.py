"""Words that messages share."""

import pytest

from bdh.words import counted, nearest


@pytest.mark.parametrize(
    ("number", "words", "expected"),
    [
        (1, ["token"], "1 token"),
        (0, ["token"], "0 tokens"),
        (2000, ["token"], "2,000 tokens"),
        (1, ["entry", "entries"], "1 entry"),
        (2, ["entry", "entries"], "2 entries"),
    ],
)
def test_one_is_singular(number, words, expected):
    """`1 tokens` was said in many places."""
    assert counted(number, *words) == expected


def test_the_nearest_name_is_near_enough():
    assert nearest("max_token", ["max_tokens", "n"]) == "max_tokens"
    assert nearest("max_token", ["seed"]) is None
    assert nearest("max_token", ["max_tokens"], cutoff=0.99) is None

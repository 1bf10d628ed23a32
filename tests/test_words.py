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


def test_memory_that_was_refused_is_known_by_every_form_of_the_error():
    import torch

    from bdh.words import is_out_of_memory

    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    for error in (caught.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))

"""Conversations into sequences: nothing that counts is lost, and sequences are well filled."""

import numpy as np
import pytest

from bdh.data.chat import ID_BITS, IS_ANSWER, STARTS, packed, pieces_of, with_marks


def stream_of(*conversations):
    """Conversations as texts, in which capitals are the assistant's."""
    return np.concatenate(
        [
            with_marks(np.frombuffer(text.encode(), np.uint8), np.array([c.isupper() for c in text]))
            for text in conversations
        ]
    )


def texts_of(stream, pieces):
    return ["".join(map(chr, stream[start:stop] & ID_BITS)) for start, stop in pieces]


def test_marks_tell_the_start_and_the_answer():
    stream = stream_of("abCD", "eF")
    assert np.flatnonzero(stream & STARTS).tolist() == [0, 4]
    assert np.flatnonzero(stream & IS_ANSWER).tolist() == [2, 3, 5]


def test_a_long_conversation_continues_in_pieces_that_share_a_token():
    stream = stream_of("abCDefGHiJ", "kL")
    pieces, num_cut = pieces_of(stream, block_size=4)
    assert texts_of(stream, pieces) == ["abCDe", "efGHi", "iJ", "kL"]
    assert num_cut == 1


@pytest.mark.parametrize("length", [2, 3, 4, 5, 6, 8, 9, 10])
def test_every_token_that_counts_is_a_target_once(length):
    text = ("aB" * length)[:length]
    pieces, num_cut = pieces_of(stream_of(text), block_size=4)
    targets = [i for start, stop in pieces for i in range(start + 1, stop) if text[i].isupper()]
    assert targets == [i for i in range(1, length) if text[i].isupper()]
    assert all(stop - start <= 5 for start, stop in pieces)
    assert num_cut == (length > 5)


def test_a_piece_in_which_nothing_counts_is_left_out():
    stream = stream_of("abcdefghijKL")
    pieces, _ = pieces_of(stream, block_size=4)
    assert texts_of(stream, pieces) == ["ijKL"]
    pieces, _ = pieces_of(stream_of("Abc"), block_size=4)  # nothing before the first token predicts it
    assert len(pieces) == 0


def test_sequences_hold_every_piece_once_and_no_more_than_fits():
    lengths = np.random.default_rng(1).integers(2, 65, size=2000).tolist()
    sequences = packed(lengths, 65)
    assert sorted(piece for sequence in sequences for piece in sequence) == list(range(2000))
    filled = [sum(lengths[piece] for piece in sequence) for sequence in sequences]
    assert max(filled) <= 65
    assert sum(filled) / len(sequences) > 0.98 * 65


def test_the_best_fit_is_taken():
    assert packed([6, 5, 4, 5], 10) == [[0, 2], [1, 3]]

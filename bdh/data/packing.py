"""Conversations into rows: cut where they are longer than a row, packed where they are shorter."""

from collections.abc import Sequence

import numpy as np

# Bits beside the id of a token, in the stream of conversations on disk.
IS_ANSWER = np.uint32(1 << 31)
STARTS = np.uint32(1 << 30)
ID_BITS = np.uint32((1 << 30) - 1)


def with_marks(ids: np.ndarray, is_answer: np.ndarray) -> np.ndarray:
    """One conversation as uint32: its ids, which tokens are the assistant's, and that it starts with the first."""
    marked = ids.astype(np.uint32) | np.where(is_answer, IS_ANSWER, np.uint32(0))
    marked[:1] |= STARTS
    return marked


def pieces_of(stream: np.ndarray, block_size: int) -> tuple[np.ndarray, int]:
    """What fits into rows of ``block_size + 1`` tokens, of conversations one behind the other.

    A longer conversation goes on in a further piece, from nothing: the last token of a piece, a target there, is the
    first input of the next, so every token is predicted once. Pieces in which nothing counts are left out.

    Returns:
        Begin and end of each piece, int64 (pieces, 2), and the number of conversations that were cut.
    """
    begins = np.flatnonzero(stream & STARTS)
    ends = np.append(begins[1:], len(stream))
    each = np.maximum(1, -(-(ends - begins - 1) // block_size))  # pieces of each conversation
    which = np.repeat(np.arange(len(begins)), each)
    index = np.arange(len(which)) - np.repeat(np.cumsum(each) - each, each)
    starts = begins[which] + index * block_size
    stops = np.minimum(starts + block_size + 1, ends[which])
    num_answers = np.concatenate([[0], np.cumsum((stream & IS_ANSWER) != 0)])
    counts = num_answers[stops] > num_answers[np.minimum(starts + 1, stops)]  # the first token is no target
    return np.stack([starts, stops], axis=1)[counts], int((each > 1).sum())


def packed(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pieces into as few rows as the best fit gives: the longest first, each into the fullest row that it fits.

    Args:
        lengths: of the pieces, tokens; at most ``capacity``.

    Returns:
        For each row the numbers of its pieces.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # rows by the tokens that they have left
    there = 0  # a bit for each number of tokens that some row has left
    for piece in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[piece]
        fitting = there >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = with_room[room].pop()
            if not with_room[room]:
                there &= ~(1 << room)
            rows[row].append(piece)
        else:
            room, row = capacity, len(rows)
            rows.append([piece])
        left = room - length
        with_room.setdefault(left, []).append(row)
        there |= 1 << left
    return rows

"""Where documents start in rows of tokens, and what follows from it for the loss."""

import torch

from bdh.data.batch import Batch


def starts_behind(tokens: torch.Tensor, document_end: int) -> torch.Tensor:
    """Whether a document starts at each token (rows, length): behind each ``document_end``.

    The first token of a row goes on with whatever was before it, which the row does not show.
    """
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[:, 1:] = tokens[:, :-1] == document_end
    return starts


def batch_of_documents(tokens: torch.Tensor, starts: torch.Tensor) -> Batch:
    """A batch whose rows see nothing beyond their documents' starts.

    Args:
        tokens: int64 (rows, T + 1).
        starts: bool (rows, T + 1): a document starts at that token. It is not predicted: nothing before it is its
            context. So the loss is that of the documents alone.
    """
    if not starts.any():
        return Batch(tokens)
    return Batch(tokens, is_target=~starts[:, 1:], starts=starts[:, :-1])

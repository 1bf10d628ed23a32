"""Validation rows of one or several sources, some of which may count a part of their tokens only."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from bdh.data.corpus import ValidationPart
from bdh.evaluate.loss import Metrics, evaluate_batch
from bdh.model import BDHForCausalLM


def evaluate_parts(
    model: BDHForCausalLM,
    parts: Sequence[ValidationPart],
    *,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    rows: slice = slice(None),
    sum_over_processes: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[Metrics, dict[str, Metrics]]:
    """Predicts what counts in each part.

    Args:
        rows: those of each part that this process measures.
        sum_over_processes: see :func:`bdh.evaluate.loss.evaluate_batch`.

    Returns:
        The metrics over all tokens that count, and where there are several parts, those of each by its name.
    """
    found = [
        evaluate_batch(
            model,
            part.batch[rows],
            bytes_per_token=part.bytes_per_token,
            autocast=autocast,
            sum_over_processes=sum_over_processes,
        )
        for part in parts
    ]
    if len(found) == 1:
        return found[0], {}
    return _over_all(parts, found), {part.name: metrics for part, metrics in zip(parts, found, strict=True)}


def _over_all(parts: Sequence[ValidationPart], found: Sequence[Metrics]) -> Metrics:
    num_tokens = sum(each.num_tokens for each in found)
    nats = sum(each.loss * each.num_tokens for each in found)
    num_bytes = sum(each.num_tokens * part.bytes_per_token for part, each in zip(parts, found, strict=True))
    correct = sum(each.accuracy * each.num_tokens for each in found)
    by_position: tuple[float, ...] = ()
    if len({len(each.loss_by_position) for each in found}) == 1:
        rows = [len(part.batch.tokens) for part in parts]
        columns = zip(*(each.loss_by_position for each in found), strict=True)
        by_position = tuple(
            sum(n * nats_there for n, nats_there in zip(rows, column, strict=True)) / sum(rows) for column in columns
        )
    return Metrics(nats / num_tokens, nats / math.log(2) / num_bytes, correct / num_tokens, num_tokens, by_position)

"""Validation rows of one or several sources, some of which may count a part of their tokens only."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F

from bdh.data.batch import Batch, ValidationPart
from bdh.evaluate.loss import Metrics, evaluate_windows, inference
from bdh.model import BDHForCausalLM


def evaluate_parts(
    model: BDHForCausalLM,
    parts: Sequence[ValidationPart],
    *,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> tuple[Metrics, dict[str, Metrics]]:
    """Predicts what counts in each part.

    Returns:
        The metrics over all tokens that count, and where there are several parts, those of each by its name.
    """
    found = [evaluate_part(model, part, autocast=autocast) for part in parts]
    if len(found) == 1:
        return found[0], {}
    return _over_all(parts, found), {part.name: metrics for part, metrics in zip(parts, found, strict=True)}


def evaluate_part(
    model: BDHForCausalLM,
    part: ValidationPart,
    *,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    max_batch_size: int = 16,
) -> Metrics:
    """Predicts what counts in the rows of a part, each row from nothing; without a loss by position if not all does.

    It draws no random numbers, and leaves the model in the mode, training or not, that it was in.
    """
    if part.batch.is_target is None:
        return evaluate_windows(
            model,
            part.batch.tokens,
            bytes_per_token=part.bytes_per_token,
            autocast=autocast,
            max_batch_size=max_batch_size,
        )
    nats, correct, num_tokens = 0.0, 0, 0
    with inference(model), autocast():
        for rows in part.batch.split(max_batch_size):
            row_nats, row_correct = _score(model, rows.to(model.device))
            nats += row_nats
            correct += row_correct
            num_tokens += rows.num_targets
    loss = nats / num_tokens
    return Metrics(loss, loss / math.log(2) / part.bytes_per_token, correct / num_tokens, num_tokens)


def _score(model: BDHForCausalLM, rows: Batch) -> tuple[float, int]:
    """The nats of all tokens that count, and how many of them were the likeliest prediction."""
    logits = model(rows.input_ids, use_cache=False).logits.float()
    targets = rows.targets
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")  # 0 where it does not count
    return nats.sum(dtype=torch.float64).item(), int((logits.argmax(-1) == targets).sum().item())


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

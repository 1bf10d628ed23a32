"""Settings that need less memory, and what a run would need with them."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from bdh.train.measure import Measured
from bdh.train.needs import Need
from bdh.train.units import gigabytes

Change = tuple[str, Need]
"""The flags of changed settings, and what they need."""
_LEAST_BLOCK = 16  # tokens of a training sequence that are proposed
_LEAST_WIDTH = 16
_TELLING_SHARE = 0.01  # of the need: what saves less, and is not enough, is not worth a line


def advise(need: Need, measured: Measured, room: float | None) -> list[str]:
    """What to change, the mildest first: settings that change no result, then those that train another model.

    Of each kind the least change that fits alone is told, or else the one that needs least; none that needs no less than
    the settings as they are.

    Args:
        room: bytes that there are; None where nobody knows.
    """
    now = measured.peak(need)
    no_room_at_all = room is not None and measured.base + need.fixed > room
    lines = []
    is_enough = False
    for changes in _KINDS:
        less = [
            (flags, peak)
            for flags, changed, peak in _peaks(changes(need), measured)
            if (room is not None and peak <= room and peak < now)
            or (peak < (1 - _TELLING_SHARE) * now and (changed.fixed < need.fixed or not no_room_at_all))
        ]
        if not less:
            continue
        fitting = [each for each in less if room is None or each[1] <= room]
        is_enough = is_enough or bool(fitting)
        flags, peak = fitting[0] if fitting else min(less, key=lambda each: each[1])
        lines.append(f"{flags}: {gigabytes(peak)}" + ("" if fitting else ", which alone does not fit either"))
    if lines and not is_enough:
        lines.append("none of these is enough alone: combine them, or train where there is more memory")
    return lines


def _peaks(changes: Iterator[Change], measured: Measured) -> Iterator[tuple[str, Need, float]]:
    for flags, need in changes:
        try:
            yield flags, need, measured.peak(need)
        except ValueError:  # it does not go with the other settings, such as a memory budget
            continue


def _fewer_rows(need: Need) -> Iterator[Change]:
    settings, rows = need.settings.train, need.rows
    for fewer in reversed(_divisors(rows)[:-1]):
        passes = settings.gradient_accumulation_steps * (rows // fewer)
        changed = need.with_rows(fewer).changed(gradient_accumulation_steps=passes)
        flags = f"--train.batch_size {fewer} --train.gradient_accumulation_steps {passes}"
        if changed.settings.train.rows_per_block != settings.rows_per_block:
            flags += f" --train.rows_per_block {fewer}"
        yield flags, changed


def _no_background(need: Need) -> Iterator[Change]:
    if need.settings.checkpoint.in_background:
        checkpoint = replace(need.settings.checkpoint, in_background=False)
        yield "--checkpoint.in_background false", replace(need, settings=replace(need.settings, checkpoint=checkpoint))


def _in_blocks(need: Need) -> Iterator[Change]:
    if need.settings.train.layer_path == "plain":
        yield "--train.layer_path auto", need.changed(layer_path="auto")


def _recomputed(need: Need) -> Iterator[Change]:
    if need.settings.train.recompute != "pass":
        yield "--train.recompute pass", need.changed(recompute="pass")


def _narrower_blocks(need: Need) -> Iterator[Change]:
    if need.plan.path != "plain":
        for rows in _halved(need.plan.sizes.rows, 1):
            yield f"--train.rows_per_block {rows}", need.changed(rows_per_block=rows)


def _shorter_blocks(need: Need) -> Iterator[Change]:
    if need.plan.path != "plain":
        for tokens in _halved(need.plan.sizes.columns, 1):
            yield f"--train.tokens_per_block {tokens}", need.changed(tokens_per_block=tokens)


def _sharded(need: Need) -> Iterator[Change]:
    if need.processes > 1 and need.strategy != "fsdp":
        yield (
            "--distributed.strategy fsdp, which shares weights, gradients and optimizer among the processes",
            replace(need, strategy="fsdp"),
        )


def _shorter_sequences(need: Need) -> Iterator[Change]:
    settings = need.settings.train
    if need.settings.resume:  # which keeps them as they were
        return
    for tokens in _halved(settings.block_size, _LEAST_BLOCK):
        block = settings.tokens_per_block and min(settings.tokens_per_block, tokens)
        more = f" --train.tokens_per_block {block}" if block != settings.tokens_per_block else ""
        yield f"--train.block_size {tokens}{more}", need.changed(block_size=tokens, tokens_per_block=block)


def _smaller_model(name: str, least: int) -> Callable[[Need], Iterator[Change]]:
    def changes(need: Need) -> Iterator[Change]:
        if need.settings.resume or need.settings.train.init_from is not None:  # whose sizes are fixed
            return
        for size in _halved(getattr(need.config, name), least):
            try:
                yield f"--model.{name} {size}", need.with_model(**{name: size})
            except ValueError:  # neurons that cannot be shared evenly by the heads
                continue

    return changes


_KINDS: tuple[Callable[[Need], Iterator[Change]], ...] = (
    _fewer_rows,
    _no_background,
    _in_blocks,
    _recomputed,
    _narrower_blocks,
    _shorter_blocks,
    _sharded,
    _shorter_sequences,
    _smaller_model("mlp_internal_dim_multiplier", 1),
    _smaller_model("n_embd", _LEAST_WIDTH),
)


def _halved(number: int, least: int) -> Iterator[int]:
    while number // 2 >= least:
        number //= 2
        yield number


def _divisors(number: int) -> list[int]:
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*low, *(number // d for d in low)})

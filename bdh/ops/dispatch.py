"""Chooses the form of attention, and the code that takes recurrent steps, in one place."""

from typing import Literal, NamedTuple, get_args

import torch

from bdh.ops.attention import chunked_attention, parallel_attention, recurrent_attention
from bdh.ops.cpu.runtime import unavailable_reason
from bdh.ops.reach import Reach

AttentionForm = Literal["auto", "parallel", "chunked", "recurrent"]
ATTENTION_FORMS: tuple[str, ...] = get_args(AttentionForm)


def choose_form(requested: str, num_tokens: int, width: int, *, has_state: bool, chunk_size: int = 128) -> str:
    """The form that ``attend`` takes: ``requested``, or for "auto" the one with the least work.

    One token on top of a state is a recurrent step. Beyond that, T tokens cost each head T^2 (N + D)
    multiplications in the parallel form, and T C (N + D) + 2 T N D in chunks of C. With N far above D, parallel
    wins up to T = C + 2 D.

    Measured on 2 CPU cores with C = 128, forward alone as well as with backward: at that length the two are
    within a tenth for D = 64, N = 512 (T = 256), D = 128, N = 1,024 (384) and D = 256, N = 2,048 (640); at twice
    the length chunked is about twice as fast. States too large for the processor's cache move the crossing up:
    with D = 256 and N = 8,192 (33 MB) parallel still wins at T = 1,024.

    Raises:
        ValueError: ``requested`` is not a form.
    """
    if requested not in ATTENTION_FORMS:
        raise ValueError(f"attention form {requested!r} is unknown: must be one of {', '.join(ATTENTION_FORMS)}")
    if requested != "auto":
        return requested
    if num_tokens == 1 and has_state:
        return "recurrent"
    if torch.compiler.is_exporting():  # one program for texts of every length, where chunks would be counted
        return "parallel"
    return "parallel" if num_tokens <= chunk_size + 2 * width else "chunked"


def attend(
    q: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor | None = None,
    *,
    form: str = "auto",
    chunk_size: int = 128,
    reach: Reach | None = None,
    keep_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of rotated queries ``q`` (B, H, T, N) over values ``v`` (B, T, D) and an earlier ``state``.

    Args:
        state: (B, H, N, D) of the tokens before, or None where there are none. The recurrent form writes to
            it, where ``keep_state`` is given and no gradients are needed.
        form: one of :data:`ATTENTION_FORMS`.
        chunk_size: tokens in a chunk of the chunked form.
        reach: where documents start and how fast the state decays; None where all of the past counts alike.
        keep_state: return the state behind the last token too.

    Returns:
        ``a`` (B, H, T, D) in float32 (float64 for float64), and the new state or None.
    """
    chosen = choose_form(form, q.shape[2], v.shape[-1], has_state=state is not None, chunk_size=chunk_size)
    if chosen == "parallel":
        return parallel_attention(q, v, state, reach=reach, keep_state=keep_state)
    if chosen == "chunked":
        return chunked_attention(q, v, state, chunk_size=chunk_size, reach=reach, keep_state=keep_state)
    return recurrent_attention(q, v, state, reach=reach, keep_state=keep_state)


StepPath = Literal["auto", "kernels", "torch"]
STEP_PATHS: tuple[str, ...] = get_args(StepPath)


class ChosenPath(NamedTuple):
    """What runs the recurrent steps, and why."""

    name: str  # "kernels" or "torch"
    reason: str


def choose_step_path(requested: str, *, device: torch.device, obstacle: str | None = None) -> ChosenPath:
    """Whether the sparse kernels of :mod:`bdh.ops.cpu` or torch's dense operations take the recurrent steps.

    There is no number of sequences, and no density, from which the dense operations would be the better choice on a CPU:
    each sequence has a state of its own, which the kernels sweep over once where torch does three times, and they
    multiply E with all rows of a step in tiles. Measured at the least favourable density, 50 % (untrained weights), in
    ms a token, kernels / dense, on 2 CPU cores:

    ==========================  ===========  ===========  ===========  ===========
    model                       1 sequence   8            32           128
    ==========================  ===========  ===========  ===========  ===========
    D 256, H 4, N 8192, L 6     14.9 / 36.2  9.5 / 22.5   -            -
    D 128, H 4, N 1024, L 4     0.65 / 1.79  0.31 / 0.72  0.45 / 0.72  0.43 / 0.67
    D 64,  H 4, N 512,  L 4     0.26 / 0.94  0.12 / 0.34  0.11 / 0.27  0.14 / 0.25
    D 16,  H 2, N 64,   L 2     0.11 / 0.34  0.03 / 0.09  0.01 / 0.06  0.01 / 0.05
    ==========================  ===========  ===========  ===========  ===========

    Args:
        requested: one of :data:`STEP_PATHS`; "auto" takes the kernels wherever they run.
        obstacle: what about the model, its precision for one, keeps the kernels from running it; None for nothing.

    Raises:
        ValueError: ``requested`` is not a path, or is the kernels where they do not run.
    """
    if requested not in STEP_PATHS:
        raise ValueError(f"path is {requested!r}: must be one of {', '.join(STEP_PATHS)}")
    if requested == "torch":
        return ChosenPath("torch", "asked for")
    if device.type != "cpu":
        obstacle = f"the model is on {device}, the kernels run on the cpu"
    obstacle = obstacle or unavailable_reason()
    if obstacle is None:
        return ChosenPath("kernels", "asked for" if requested == "kernels" else "float32 or bfloat16 on the cpu")
    if requested == "kernels":
        raise ValueError(f"path is 'kernels', which cannot run here: {obstacle}; must be auto or torch")
    return ChosenPath("torch", obstacle)

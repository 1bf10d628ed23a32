"""Plans a forward pass: the backend of the layer, the size of its blocks, and what is kept for the backward pass."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch

from bdh.ops import LayerPath
from bdh.ops.attention import choose_form
from bdh.ops.backends import BACKENDS, BackendError, BackendName, Work, choose_backend
from bdh.ops.blocks.train import BlockSizes
from bdh.words import counted, gigabytes

Recompute = Literal["none", "pass", "auto"]
RECOMPUTE: tuple[str, ...] = get_args(Recompute)

# How many neuron-wide tensors, in the dtype of the computation, exist at once in the backward pass of a block, for each
# backend; and how many the eager backend keeps for each layer step, as measured.
_WIDE_IN_BLOCK: dict[BackendName, int] = {"blocks": 9, "cpu": 4}
_WIDE_KEPT_BY_EAGER = 9
_WIDE_OF_MASK = 16  # bytes of an unfused dropout mask for each neuron and token, with keys in int64
_WIDE_OF_TABLE = 4  # bytes of the rotation, in float32, if documents give each sequence its own positions
# A text of up to _WHOLE_WIDTHS * D tokens is a single block. A longer one is cut into blocks of 2 D tokens, or of
# _LEAST_CHUNK if that is more. Measured on 2 CPU cores, in thousands of tokens per second in a training step with
# L = 1, as a single block / in blocks of 2 D (of 256 for D = 64):
# D 64: T 256 17.7 / -, T 512 14.6 / 15.9.
# D 128: T 512 8.0 / 7.8, T 1,024 5.6 / 7.0, T 8,192 - / 6.3 (in blocks of 128: 5.8, of 1,024: 4.6).
# D 256, N 8,192: T 512 0.81 / 0.71 (in blocks of 256), T 2,048 0.44 / 0.56.
_WHOLE_WIDTHS = 4
_LEAST_CHUNK = 256
# The number of columns above which a matrix product becomes no faster. With few neurons, a block has more columns, so
# that its fixed costs matter less: a step with D 48, N 384 takes 67 ms with 512 tokens in a block and 50 ms with 1,536;
# one with D 128, N 1,024 takes 430 ms with 512, 420 with 1,024 and 460 with 2,048. On an H200, one with D 256, N 8,192
# takes 106 ms with 8,192 and 99 ms with 16,384. The number for mps is an estimate.
_COLUMNS_OF_BLOCK = {"cpu": 512, "cuda": 16_384, "mps": 4_096}
_NUMBERS_OF_BLOCK = 2**20
# Without a budget, auto keeps x of as many layer steps as fit into this many bytes. Training of a small model is an
# eighth faster with it. A large model, for which recomputing x is a tenth of the products, still takes little more
# memory than that of a block.
_KEPT_WITHOUT_BUDGET = 2**28
# Without a budget on a GPU, blocks and what is kept with recompute "none" stay below this fraction of its memory.
_SHARE_OF_GPU = 0.5
# The same for what the eager backend keeps of a small step, which it may then compute instead of blocks.
_SHARE_OF_EAGER_ON_GPU = 1 / 8


@dataclass(frozen=True)
class LayerOptions:
    """The user's options for computing the layer. They change results only by rounding."""

    path: LayerPath = "auto"
    """kernels: the sparse kernels of :mod:`bdh.ops.cpu`, for float32 on a CPU. torch: the same blocks by PyTorch
    operations. plain: all tokens at once, by autograd. auto: the first of these that is available, but plain for small
    steps on a GPU."""
    recompute: Recompute = "auto"
    """Which layer steps keep x for the backward pass. none: all of them, so that nothing is recomputed. pass: none of
    them. auto: as many as fit into the memory budget."""
    memory_budget: int | None = None
    """The limit on the bytes of all neuron-wide activations. None: for blocks half of a GPU's memory, and otherwise no
    limit. With None, blocks with recompute "auto" keep at most 256 MiB of x, and the path "plain" keeps everything."""
    rows_per_block: int | None = None
    """The number of sequences in a block; None for a number that suits the device and the budget."""
    tokens_per_block: int | None = None
    """The number of tokens of each sequence in a block; None for the cheapest number. The last block of a sequence can
    be shorter."""


class LayerOptionError(ValueError):
    """``LayerOptions`` require something that is not available."""

    def __init__(self, option: str, fault: str):
        super().__init__(f"{option} {fault}")
        self.option, self.fault = option, fault


class LayerShape(NamedTuple):
    """The sizes and dtype of the computation."""

    B: int
    T: int
    D: int
    H: int
    N: int
    L: int
    dtype: torch.dtype
    device: torch.device
    has_dropout: bool = False
    for_training: bool = True


@dataclass(frozen=True)
class LayerPlan:
    """How a layer step is computed, and the memory of its wide activations (B, H, T, N)."""

    backend: BackendName
    reason: str
    sizes: BlockSizes
    kept_layer_steps: int
    """This many first layer steps keep x (eager: all that autograd saves); the others recompute it."""
    block_bytes: int
    """The bytes of wide activations that exist while a block is computed."""
    kept_bytes: int
    """The bytes of wide activations that are kept for the backward pass, including kept scores."""
    keeps_scores: bool = False
    """Whether all layer steps keep the scores (B, H, T, T), which for short texts are narrower than x."""

    @property
    def path(self) -> str:
        """The backend's name in settings and banners."""
        return next(each.words["train"] for each in BACKENDS if each.name == self.backend)

    def working_bytes(self, num_layer_steps: int) -> int:
        """Returns the bytes of wide activations that are needed beside the kept ones, in training."""
        if self.backend != "eager":
            return self.block_bytes
        # A layer step that is recomputed also needs memory for its gradients. If all are kept, nothing else is needed.
        return 2 * self.block_bytes if self.kept_layer_steps < num_layer_steps else 0

    def describe(self, num_layer_steps: int) -> str:
        """Returns a description for the banner of a run."""
        kept = {0: "recomputes all wide activations", num_layer_steps: "keeps wide activations"}.get(
            self.kept_layer_steps,
            f"keeps the wide activations of {self.kept_layer_steps} of {counted(num_layer_steps, 'layer step')}",
        )
        blocks = (
            "" if self.backend == "eager" else f" in blocks of {self.sizes.sequences} x {self.sizes.tokens:,} tokens"
        )
        wide = self.working_bytes(num_layer_steps) + self.kept_bytes
        return f"{self.path}{blocks} ({self.reason}); {kept}: {gigabytes(wide)}"


def plan_layer(
    shape: LayerShape,
    options: LayerOptions,
    *,
    form: str = "auto",
    chunk_size: int = 128,
    obstacle: str | None = None,
) -> LayerPlan:
    """Returns the plan for a layer step.

    Args:
        shape: the sizes of the computation.
        options: the user's options.
        form: the attention form, one of :data:`bdh.ops.ATTENTION_FORMS`.
        chunk_size: the number of tokens in a block of the chunked form.
        obstacle: why the model cannot be computed in blocks; None if it can.

    Raises:
        LayerOptionError: the path is not available, blocks are larger than the batch, or the budget is too small even
            for the smallest block; the message states the minimum.
    """
    choose_form(form, shape.T, shape.D, has_state=False)  # raises an exception for an unknown form
    asks_for_blocks = options.rows_per_block or options.tokens_per_block or options.recompute == "pass"
    most = _budget(shape, options, _SHARE_OF_EAGER_ON_GPU)
    may_be_whole = not asks_for_blocks and most is not None and (shape.L + 1) * _kept_by_eager(shape) <= most
    at_once = shape.B * shape.T * shape.N if may_be_whole else None
    try:
        backend, reason = choose_backend(
            "train", options.path, Work(shape.device, shape.dtype, obstacle, form, at_once)
        )
    except BackendError as error:
        raise LayerOptionError("path", error.fault) from None
    if options.recompute not in RECOMPUTE:
        raise LayerOptionError("recompute", f"is {options.recompute!r}: must be one of {', '.join(RECOMPUTE)}")
    if backend.name == "eager":
        return _plan_eager(shape, options, reason)
    tokens = _choose_tokens(shape, options, form, chunk_size)
    width = max(_COLUMNS_OF_BLOCK.get(shape.device.type, 128), _NUMBERS_OF_BLOCK // shape.N)
    sequences = options.rows_per_block or max(1, min(shape.B, width // tokens))
    if not 1 <= sequences <= shape.B:
        raise LayerOptionError(
            "rows_per_block", f"is {sequences}: must be from 1 to the {shape.B} sequences of a batch"
        )
    budget = _budget(shape, options, _SHARE_OF_GPU)
    limit, least_sequences = math.inf if budget is None else budget, options.rows_per_block or 1
    while (block := _block_bytes(shape, backend.name, sequences, tokens)) > limit and sequences > least_sequences:
        sequences = max(least_sequences, sequences // 2)
    if budget is not None and block > budget:
        chunked = _block_bytes(shape, backend.name, 1, min(tokens, chunk_size))
        # Shorter blocks need more states between them.
        may = f", or {_amount(chunked)} with the chunked form of attention" if chunked < block else ""
        wanted = f"must be at least {_amount(block)} for blocks of {sequences} x {tokens:,} tokens{may}"
        raise LayerOptionError("memory_budget", f"is {_amount(budget)}: {wanted}")
    each = shape.B * shape.T * shape.H * shape.N * shape.dtype.itemsize
    left = None if budget is None else budget - block
    # With a single block for each text, and at most D tokens, scores take no more memory per head than v. Each byte of
    # them saves N / 2 operations, while a byte of x saves D / 2.
    is_narrow = tokens == shape.T and tokens <= shape.D and shape.dtype != torch.float16
    scores = shape.L * shape.B * shape.H * shape.T**2 * shape.dtype.itemsize
    asked_for = each * shape.L if options.recompute == "none" else 0
    keeps_scores = is_narrow and options.recompute != "pass" and shape.for_training
    keeps_scores = keeps_scores and (left is None or scores + asked_for <= left)
    scores = scores if keeps_scores else 0
    kept = _kept_layer_steps(shape, options, each, None if left is None else left - scores)
    return LayerPlan(
        backend.name, reason, BlockSizes(sequences, tokens), kept, block, kept * each + scores, keeps_scores
    )


def _choose_tokens(shape: LayerShape, options: LayerOptions, form: str, chunk_size: int) -> int:
    if options.tokens_per_block is not None:
        if not 1 <= options.tokens_per_block <= shape.T:
            raise LayerOptionError(
                "tokens_per_block",
                f"is {options.tokens_per_block}: must be from 1 to the {shape.T} tokens of a sequence",
            )
        return options.tokens_per_block
    if form == "chunked":
        return min(chunk_size, shape.T)
    if form == "parallel" or shape.T <= _WHOLE_WIDTHS * shape.D:
        return shape.T
    return min(shape.T, max(_LEAST_CHUNK, 2 * shape.D))


def _block_bytes(shape: LayerShape, backend: BackendName, sequences: int, tokens: int) -> int:
    wide = shape.N * sequences * tokens
    total = wide * shape.dtype.itemsize * _WIDE_IN_BLOCK[backend] + 3 * sequences * tokens**2 * shape.dtype.itemsize
    num_blocks = -(-shape.T // tokens)
    if num_blocks > 1:  # every sqrt(n)-th state, those of a segment between them, and the gradient with its terms
        num_states = 2 * (math.isqrt(num_blocks - 1) + 1) + 3
        total += num_states * sequences * shape.N * shape.D * max(4, shape.dtype.itemsize)
    if backend == "cpu":  # each thread has its own sums
        total += 2 * torch.get_num_threads() * sequences * tokens * shape.D * 4
    if backend == "blocks":
        total += wide * _WIDE_OF_TABLE
        if shape.has_dropout and shape.device.type != "cuda":  # on CUDA the mask is fused
            total += wide * _WIDE_OF_MASK
    return total


def _kept_layer_steps(shape: LayerShape, options: LayerOptions, each: int, left: int | None) -> int:
    if options.recompute == "pass" or not shape.for_training:
        return 0
    if options.recompute == "none":
        if left is not None and each * shape.L > left:
            needed = each * shape.L - left
            raise LayerOptionError(
                "recompute", f"is none, which needs {_amount(needed)} more than the memory budget: must be auto or pass"
            )
        return shape.L
    available = _KEPT_WITHOUT_BUDGET if options.memory_budget is None or left is None else left
    return min(shape.L, available // each)


def _budget(shape: LayerShape, options: LayerOptions, share: float) -> int | None:
    """Returns the memory budget; by default a fraction of a GPU's memory, and None on other devices."""
    if options.memory_budget is None and shape.device.type == "cuda":
        return int(torch.cuda.get_device_properties(shape.device).total_memory * share)
    return options.memory_budget


def _kept_by_eager(shape: LayerShape) -> int:
    """Returns the bytes that autograd saves for a layer step."""
    return shape.B * shape.T * shape.H * shape.N * shape.dtype.itemsize * _WIDE_KEPT_BY_EAGER


def _plan_eager(shape: LayerShape, options: LayerOptions, reason: str) -> LayerPlan:
    each = _kept_by_eager(shape)
    budget = options.memory_budget
    if budget is None and options.recompute == "auto":
        kept = shape.L
    else:
        if budget is not None and budget < each and shape.for_training:
            raise LayerOptionError(
                "memory_budget",
                f"is {_amount(budget)}: must be at least {_amount(each)}, what one layer step of the plain path takes",
            )
        kept = _kept_layer_steps(shape, options, each, None if budget is None else budget - each)
    return LayerPlan("eager", reason, BlockSizes(shape.B, shape.T), kept, each, kept * each)


def _amount(num_bytes: int) -> str:
    """Returns a size in bytes and in GB of 10^9, rounded up so that it suffices if it is set as the budget."""
    return f"{num_bytes:,} bytes ({-(-num_bytes // 10**4) / 10**5:.5f} GB)"

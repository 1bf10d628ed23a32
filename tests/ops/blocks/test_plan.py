"""What is chosen for a device and a budget, and what is refused before anything is computed."""

from dataclasses import replace

import pytest
import torch

from bdh.ops.blocks.plan import LayerOptionError, LayerOptions, LayerShape, plan_layer

SHAPE = LayerShape(B=8, T=256, D=64, H=4, N=512, L=6, dtype=torch.float32, device=torch.device("cpu"), has_dropout=True)
WIDE = 8 * 256 * 4 * 512 * 4  # bytes of (B, T, H, N) in float32


def test_a_cpu_in_float32_gets_the_kernels_and_recomputes():
    plan = plan_layer(SHAPE._replace(B=256), LayerOptions())  # x of a pass is 512 MiB
    assert (plan.path, plan.kept_layer_steps, plan.kept_bytes) == ("kernels", 0, 0)
    assert plan.sizes.sequences * plan.sizes.tokens * SHAPE.N == 2**20
    assert "recomputes" in plan.describe(6)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (SHAPE._replace(dtype=torch.bfloat16), "float32, not in bfloat16"),
        (SHAPE._replace(dtype=torch.float64), "float32, not in float64"),
        (SHAPE._replace(device=torch.device("mps")), "the kernels run on the cpu"),
    ],
)
def test_elsewhere_torch_computes_the_blocks_and_says_why(shape, reason):
    plan = plan_layer(shape, LayerOptions())
    assert plan.path == "torch"
    assert reason in plan.describe(6)
    with pytest.raises(LayerOptionError, match=rf"path is 'kernels', which cannot run here: .*{reason}"):
        plan_layer(shape, LayerOptions(path="kernels"))


SMALL_ON_GPU = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "B": 32, "T": 1024}  # 2^24 of (B, T, N)


def test_a_gpu_computes_a_small_step_at_once_and_a_large_one_in_blocks():
    """Of what is chosen: a budget takes the place of the GPU's memory, which is asked for without one."""
    shape, options = SHAPE._replace(**SMALL_ON_GPU), LayerOptions(memory_budget=10**12)
    plan = plan_layer(shape, options)
    assert (plan.path, plan.kept_layer_steps) == ("plain", 6)
    assert "on cuda, for which a step is small" in plan.describe(6)
    assert plan_layer(shape._replace(B=33), options).path == "torch"
    exactly = plan.block_bytes + plan.kept_bytes
    assert plan_layer(shape, LayerOptions(memory_budget=exactly)).path == "plain"
    assert plan_layer(shape, LayerOptions(memory_budget=exactly - 1)).path == "torch"


@pytest.mark.parametrize(
    "asked", [{"path": "torch"}, {"rows_per_block": 2}, {"tokens_per_block": 128}, {"recompute": "pass"}]
)
def test_who_asks_for_blocks_on_a_gpu_gets_them(asked):
    plan = plan_layer(SHAPE._replace(**SMALL_ON_GPU), LayerOptions(memory_budget=10**12, **asked))
    assert plan.path == "torch"


def test_modules_that_are_no_plain_weights_are_called_as_they_are():
    plan = plan_layer(SHAPE, LayerOptions(), obstacle="a layer is Linear4bit")
    assert (plan.path, plan.reason) == ("plain", "a layer is Linear4bit")
    for path in ("torch", "kernels"):
        with pytest.raises(LayerOptionError, match=f"path is '{path}', which cannot run here: a layer is Linear4bit"):
            plan_layer(SHAPE, LayerOptions(path=path), obstacle="a layer is Linear4bit")
    assert plan_layer(SHAPE, LayerOptions(), form="recurrent").path == "plain"


@pytest.mark.parametrize(("num_tokens", "form", "columns"), [
    (256, "auto", 256), (257, "auto", 256), (5000, "auto", 256), (5000, "parallel", 5000), (5000, "chunked", 100),
    (50, "chunked", 50),
])  # fmt: skip
def test_tokens_of_a_block(num_tokens, form, columns):
    plan = plan_layer(SHAPE._replace(T=num_tokens), LayerOptions(), form=form, chunk_size=100)
    assert plan.sizes.tokens == columns


@pytest.mark.parametrize("path", ["torch", "kernels"])
def test_a_budget_below_the_least_block_says_what_the_least_is(path):
    options = LayerOptions(path=path, memory_budget=10_000)
    with pytest.raises(LayerOptionError, match=r"memory_budget is 10,000 bytes .*: must be at least") as caught:
        plan_layer(SHAPE, options)
    least = int(str(caught.value).split("at least ")[1].split(" bytes")[0].replace(",", ""))
    plan = plan_layer(SHAPE, replace(options, memory_budget=least))
    assert plan.block_bytes == least
    assert plan.sizes.sequences == 1
    with pytest.raises(LayerOptionError, match="memory_budget"):
        plan_layer(SHAPE, replace(options, memory_budget=least - 1))


def test_without_a_budget_a_little_is_kept():
    for rows, kept in ((8, 6), (32, 4), (128, 1), (129, 0)):
        plan = plan_layer(SHAPE._replace(B=rows), LayerOptions())
        assert (plan.kept_layer_steps, plan.kept_bytes) == (kept, kept * WIDE * rows // 8)
        assert plan.kept_bytes <= 2**28


def test_auto_keeps_as_many_passes_as_there_is_room_for():
    block = plan_layer(SHAPE, LayerOptions()).block_bytes
    for budget, kept in ((block, 0), (block + WIDE - 1, 0), (block + WIDE, 1), (block + 4 * WIDE, 4), (10**12, 6)):
        plan = plan_layer(SHAPE, LayerOptions(memory_budget=budget))
        assert (plan.kept_layer_steps, plan.kept_bytes) == (kept, kept * WIDE)
    assert plan_layer(SHAPE, LayerOptions(memory_budget=10**12, recompute="pass")).kept_layer_steps == 0
    assert plan_layer(SHAPE, LayerOptions(recompute="none")).kept_bytes == 6 * WIDE
    assert plan_layer(SHAPE._replace(for_training=False), LayerOptions(recompute="none")).kept_bytes == 0
    with pytest.raises(LayerOptionError, match=r"recompute is none, which needs .* more than the memory budget"):
        plan_layer(SHAPE, LayerOptions(recompute="none", memory_budget=block + 2 * WIDE))


def test_scores_are_kept_where_they_are_no_wider_than_v():
    narrow = SHAPE._replace(T=64)
    assert plan_layer(narrow, LayerOptions()).keeps_scores
    assert not plan_layer(SHAPE._replace(T=65), LayerOptions()).keeps_scores
    assert not plan_layer(narrow, LayerOptions(recompute="pass")).keeps_scores
    assert not plan_layer(narrow._replace(dtype=torch.float16), LayerOptions()).keeps_scores


@pytest.mark.parametrize(("option", "value", "right"), [
    ("rows_per_block", 9, "from 1 to the 8 sequences"),
    ("tokens_per_block", 257, "from 1 to the 256 tokens"),
    ("path", "fast", "must be one of auto, plain, torch, kernels"),
    ("recompute", "some", "must be one of none, pass, auto"),
])  # fmt: skip
def test_what_cannot_be_is_refused_by_name(option, value, right):
    with pytest.raises(LayerOptionError, match=rf"{option} is .*{value}.*{right}") as caught:
        plan_layer(SHAPE, LayerOptions(**{option: value}))
    assert caught.value.option == option


def test_the_plain_path_keeps_everything_or_what_fits():
    each = plan_layer(SHAPE, LayerOptions(path="plain")).block_bytes
    assert each > 8 * WIDE
    assert plan_layer(SHAPE, LayerOptions(path="plain")).kept_layer_steps == 6
    assert plan_layer(SHAPE, LayerOptions(path="plain", recompute="pass")).kept_layer_steps == 0
    assert plan_layer(SHAPE, LayerOptions(path="plain", memory_budget=3 * each)).kept_layer_steps == 2
    with pytest.raises(LayerOptionError, match="what one layer step of the plain path takes"):
        plan_layer(SHAPE, LayerOptions(path="plain", memory_budget=each - 1))

"""What a dry run says of memory and time, and what the settings of the layer refuse before the first step."""

import gc
import re
import sys
from dataclasses import replace

import pytest
import torch

from bdh import BDHForCausalLM
from bdh.cli.main import main
from bdh.cli.settings import parse_settings
from bdh.cli.train import settings_to_resume
from bdh.distributed.world import World
from bdh.model.forward import plan_for
from bdh.ops.blocks.plan import LayerPlan
from bdh.train import dry_run
from bdh.train.config import RunSettings, stored_settings
from bdh.train.dry_run import Forecast, MemoryEstimate, forecast
from bdh.train.setup import open_run
from bdh.words import gigabytes

from .conftest import TINY, losses

MB = 10**6


@pytest.fixture
def opened(text_file, tmp_path, monkeypatch):
    """A run of the tiny model for a dry run; ``more`` is flags."""
    monkeypatch.setenv("BDH_CACHE", str(tmp_path / "cache"))

    def open_(*more, **overrides):
        settings = {**TINY, "data.source": text_file, "run_dir": tmp_path / "dry", "dry_run": True, **overrides}
        argv = [f"--{name}={value}" for name, value in settings.items()] + list(more)
        return open_run(parse_settings(RunSettings, argv, prog="p", description="d", base=settings_to_resume(argv)))

    return open_


def estimate_of(run) -> MemoryEstimate:
    return MemoryEstimate(run.settings, run.model.config, run.runtime, run.world)


def plan_of_the_model(run) -> LayerPlan:
    """What the layer of the model that is there says of itself."""
    config, train = run.model.config, run.settings.train
    run.model.train()
    with run.runtime.autocast():
        plan = plan_for(run.model, train.batch_size, train.block_size, config.attention_form)
    # None is the plain forms with nothing to decide.
    return plan or run.plan


def measured(estimate: MemoryEstimate, base: int = 400 * MB, available: int = 10**12) -> Forecast:
    """As if the counts were true."""
    rows = (1, estimate.settings.train.batch_size)
    peaks = [estimate.of_step(count).total for count in rows]
    points = [(count, 0.1 * count, base + peak) for count, peak in zip(rows, peaks, strict=True)]
    return Forecast(estimate, base, available, steps=100, evaluated_sequences=60, points=points)


@pytest.fixture
def free(monkeypatch):
    """Makes up how much memory is free: the one thing that is made up here."""

    def make(num_bytes: int) -> None:
        monkeypatch.setattr(dry_run, "MARGIN", 1.0)  # of these tests' own memory 5 % would be too much

        def available(*_) -> int:
            gc.collect()  # of what other tests have left
            dry_run.give_back_free_memory()
            return num_bytes

        monkeypatch.setattr(dry_run, "available_bytes", available)

    return make


@pytest.fixture
def steps(monkeypatch):
    """The numbers of sequences of all steps that are run."""
    seen = []
    step = dry_run.training_step

    def noted(run, step_model, batch, num_targets):
        seen.append(len(batch.tokens))
        return step(run, step_model, batch, num_targets)

    monkeypatch.setattr(dry_run, "training_step", noted)
    return seen


@pytest.mark.parametrize(
    ("points", "batch_size", "seconds"),
    [
        ([(4, 1.0), (8, 1.4)], 16, 2.2),
        ([(4, 2.0)], 8, 4.0),  # one point: all of it grows
        ([(4, 2.0), (8, 1.9)], 100, 1.9),  # noise: it does not shrink
        ([(2, 9.0), (4, 1.0), (8, 1.4)], 16, 2.2),
    ],
)
def test_the_seconds_of_a_step_are_on_the_line_through_those_measured(opened, points, batch_size, seconds):
    found = measured(estimate_of(opened()))
    found.estimate = found.estimate.changed(batch_size=batch_size)
    found.points = [(*point, None) for point in points]
    assert found.seconds[0] == pytest.approx(seconds)


def test_sums(opened):
    found = measured(estimate_of(opened(**{"train.gradient_accumulation_steps": 2})))
    found.points = [(4, 0.7, 10**9), (8, 1.1, 2 * 10**9)]  # the second of two micro-batches
    assert found.fits
    assert found.peak == 2 * 10**9
    assert not replace(found, available=2 * 10**9).fits  # a margin is kept
    assert not replace(found, points=[]).fits  # there was no room for a single step
    assert not replace(found, ran_out_at=8).fits
    assert found.seconds == pytest.approx((1.1, 0.1))
    assert "run           112 s for 100 steps and their evaluations" in found.lines()  # 100 * 1.1 + 60 * 0.1 / 3
    assert f"step          1.10 s: {4 * 2 * 32 / 1.1:,.0f} tokens/s" in found.lines()
    assert "available per process" not in "\n".join(found.lines())
    parts = dict(re.findall(r"^  (.+?)  +([\d.]+) GB$", "\n".join(replace(found, points=[]).lines()), re.M))
    total = float(parts.pop("sum of these counts"))
    assert total == pytest.approx(sum(map(float, parts.values())), abs=0.006)  # of figures that are rounded
    assert f"peak memory   {total:.3f} GB of the " in "\n".join(replace(found, points=[]).lines())
    found.estimate = replace(found.estimate, world=World(size=2))
    assert "available per process" in "\n".join(found.lines())


def test_a_dry_run_tells_memory_and_time_and_writes_nothing(train, tmp_path, capsys):
    folder = tmp_path / "run"
    assert train(folder, "--dry_run", "true", **{"train.gradient_accumulation_steps": 2}) == 0
    shown = capsys.readouterr()
    assert not folder.exists()
    for name in ("weights", "optimizer", "peak memory", "tokens/s", "for 12 steps", "measured"):
        assert name in shown.out
    assert "kernels" in shown.err  # the banner's layer
    assert f"{folder}; a dry run writes nothing there" in shown.err


@pytest.mark.parametrize(
    "overrides",
    [
        {"train.carry_state": "true"},
        {"train.dtype": "bfloat16"},
        {"train.gradient_accumulation_steps": 2, "train.ema_decay": 0.9},
        {"train.layer_path": "plain", "train.recompute": "pass"},
        {"train.rows_per_block": 3, "train.optimizer": "muon"},
        {"train.layer_path": "torch", "train.tokens_per_block": 9, "model.dropout": 0},
        {"data.pack": "documents", "tokenizer.special_tokens": True, "train.dtype": "float64"},
        {"model.attention_form": "recurrent", "train.batch_size": 2},
    ],
    ids=lambda overrides: "-".join(overrides),
)
def test_a_dry_run_takes_all_settings_and_plans_them_without_a_model(opened, overrides):
    run = opened(**overrides)
    assert plan_of_the_model(run) == run.plan
    found = forecast(run)
    assert found.fits
    assert found.points[-1][0] == run.settings.train.sequences_per_process


def test_adapters_are_counted_and_planned_without_a_model(train, opened, tmp_path):
    pytest.importorskip("peft")
    assert train(tmp_path / "base", **{"train.max_steps": 2}) == 0
    adapters = {"train.init_from": tmp_path / "base" / "model", "train.lora.r": 2}
    run = opened(**adapters, **{"train.lora.dropout": 0.1})
    estimate = estimate_of(run)
    assert plan_of_the_model(run) == run.plan == estimate.plan
    assert run.plan.path == "plain"
    without_dropout = opened(**adapters)
    assert plan_of_the_model(without_dropout) == without_dropout.plan
    assert without_dropout.plan.path == "kernels"
    sizes = [(p.numel(), p.requires_grad) for p in run.model.parameters()]
    assert estimate.parts["weights"] == 4 * sum(size for size, _ in sizes)
    assert estimate.parts["optimizer"] == 8 * sum(size for size, is_trained in sizes if is_trained)
    assert [count for count, _, _ in forecast(run).points] == [1, 2, 4]


WIDE = {  # a sequence of the plain path keeps 28 MB: 24 tensors of its 4 x 2,048 neurons and 36 tokens
    "train.layer_path": "plain",
    "model.n_layer": 4,
    "model.n_embd": 32,
    "model.mlp_internal_dim_multiplier": 128,
    "train.block_size": 64,
    "train.batch_size": 32,
    "data.val_fraction": 0.3,
}


@pytest.mark.slow
def test_no_pass_is_run_for_which_the_plain_path_has_no_room(train, tmp_path, free, steps, capsys):
    """It took the whole batch for its least pass, and was killed."""
    free(600 * MB)  # of the 1.2 GB that 32 sequences keep
    assert train(tmp_path / "run", "--dry_run", "true", **WIDE) == 1
    assert steps[:2] == [1, 1]
    assert 4 <= max(steps) < 16
    advice = capsys.readouterr().out.split("the mildest first:\n")[1].splitlines()
    assert advice[0].startswith("  --train.layer_path auto: ")
    assert re.match(r"  --train.batch_size 8 --train.gradient_accumulation_steps 4: \d.\d+ GB$", advice[1])
    assert not any("tokens_per_block" in line or "rows_per_block" in line for line in advice)  # it has no blocks


# In a process that has imported what it needs and done nothing yet; one of them has 1.5 GB of addresses.
DRY_RUN = """
import resource, sys, torch
from bdh import BDHForCausalLM
from bdh.cli.main import main
torch.set_num_threads(1)
if sys.argv[1] == "limited":
    resource.setrlimit(resource.RLIMIT_AS, (1_500_000 << 10, 1_500_000 << 10))
main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS limits nothing elsewhere")
def test_what_is_advised_comes_true(text_file, tmp_path, fork_server):
    """It was told half of what it took. In processes of their own, whose memory holds nothing else."""
    ways = {
        "limited": {},
        "--train.recompute pass": {"train.recompute": "pass"},
        "--train.layer_path auto": {"train.layer_path": "auto"},
        "whole": {},
    }
    told = {}
    for name, more in ways.items():
        settings = TINY | WIDE | {"data.source": text_file, "dry_run": "true"} | more
        arguments = ["train", *(f"--{key}={value}" for key, value in settings.items())]
        done = fork_server.start(["-c", DRY_RUN, name, *arguments], {"BDH_CACHE": str(tmp_path / "cache")})
        assert done.wait(250) == 0, done.said()
        told[name] = done.wrote()
    limited = told["limited"]
    advice = {line.split(": ")[0].strip(): line for line in limited.splitlines() if line.startswith("  --")}
    for flags in ("--train.recompute pass", "--train.layer_path auto"):
        expected = float(advice[flags].split(": ")[1].split()[0])
        true = float(told[flags].split("peak memory")[1].split()[0])
        # An allocator keeps some of what was freed, the more the smaller the tensors are, and not as much in each process:
        # found were 0.84 to 1.55 times.
        assert 0.7 * true < expected < 2 * true, flags
    whole, before = (float(out.split("peak memory")[1].split()[0]) for out in (told["whole"], limited))
    assert 0.7 * whole < before < 2 * whole


def test_a_model_without_room_is_counted_and_never_made(train, tmp_path, free, capsys):
    """It ended with an unexpected RuntimeError of PyTorch's allocator."""
    free(10**10)
    large = {"model.n_embd": 8192, "model.mlp_internal_dim_multiplier": 128, "model.n_head": 64}
    assert train(tmp_path / "run", "--dry_run", "true", **large) == 1
    out = capsys.readouterr().out
    assert re.search(r"^  weights +103\.\d+ GB$", out, re.M)
    assert re.search(r"^  optimizer +206\.\d+ GB$", out, re.M)
    # Of this process, which has a gigabyte or two by now, as well.
    assert re.search(r"^peak memory   41\d\.\d+ GB of the 1\d\.\d+ GB .*\(that sum, not measured\)$", out, re.M)
    assert "not measured: the weights and what belongs to them do not fit" in out
    assert [line.split()[0] for line in out.splitlines() if line.startswith("  --")] == [
        "--model.mlp_internal_dim_multiplier",
        "--model.n_embd",
    ]
    assert "does not fit either" not in out


@pytest.mark.parametrize("overrides", [{}, {"layer_path": "plain"}, {"layer_path": "plain", "recompute": "pass"}])
def test_the_banner_tells_what_the_table_counts(opened, overrides):
    """Of the plain path it told a sixth more."""
    run = opened(**{f"train.{name}": value for name, value in overrides.items()})
    wide = sum(size for name, size in estimate_of(run).parts.items() if name.startswith("wide activations"))
    assert run.plan.describe(run.model.config.n_layer).endswith(f": {gigabytes(wide)}")


@pytest.mark.parametrize(("available", "warned"), [(0, True), (10**12, False)])
def test_a_run_that_seems_to_have_too_little_memory_says_so_and_is_tried(
    train, tmp_path, free, caplog, available, warned
):
    """It was killed by the system, with nothing said before."""
    free(available)
    assert train(tmp_path / "run", **{"train.max_steps": 2}) == 0
    need = r"this run probably needs \d+\.\d+ GB, and \d+\.\d+ GB are available: to measure it, and"
    assert bool(re.search(need, caplog.text)) == warned


def test_a_folder_with_a_run_does_not_hinder_a_dry_run(train, tmp_path, capsys):
    """It writes nothing there. A run that was killed for lack of memory could not be looked at by the advised command."""
    assert train(tmp_path / "run", **{"train.max_steps": 2}) == 0
    before = sorted(tmp_path.rglob("*"))
    assert train(tmp_path / "run", "--dry_run", "true") == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_the_model_that_is_trained_further_is_not_counted_twice(train, tmp_path, monkeypatch):
    assert train(tmp_path / "base", **{"train.max_steps": 2}) == 0
    before_steps, passing = dry_run._before_steps, []

    def noted(*given, **more):
        passing.append(more.get("passing", 0))
        return before_steps(*given, **more)

    monkeypatch.setattr(dry_run, "_before_steps", noted)
    model = tmp_path / "base" / "model"
    assert train(tmp_path / "run", **{"train.max_steps": 2, "train.init_from": model}) == 0
    assert passing == [sum(p.nbytes for p in BDHForCausalLM.from_pretrained(model).parameters())]


@pytest.mark.slow
def test_a_batch_without_room_is_told_from_fewer_sequences(train, tmp_path, free, steps, capsys):
    """It said that there was no room for a single block, and nothing of the batch."""
    free(700 * MB)
    assert train(tmp_path / "run", "--dry_run", "true", **{"train.batch_size": 10**6, "train.max_steps": 2}) == 1
    out = capsys.readouterr().out
    assert max(steps) < 10**5
    assert re.search(
        r"^peak memory   \d\d\.\d+ GB of the \d\.\d+ GB that are available \(extrapolated from \d+ of 1,000,000 sequences\)$",
        out,
        re.M,
    )
    assert "tokens/s" in out
    first = out.split("the mildest first:\n")[1].splitlines()[0]
    flags = re.fullmatch(r"  --train.batch_size (\d+) --train.gradient_accumulation_steps (\d+): \d\.\d+ GB", first)
    assert int(flags[1]) * int(flags[2]) == 10**6


def test_where_nothing_has_room_the_count_is_the_peak(train, tmp_path, free, steps, capsys):
    free(20 * MB)
    assert train(tmp_path / "run", "--dry_run", "true", **WIDE) == 1
    out = capsys.readouterr().out
    assert steps == []
    assert re.search(
        r"^peak memory   \d\.\d+ GB of the \d\.\d+ GB that are available \(that sum, not measured\)$", out, re.M
    )
    assert "not measured: a step of a single sequence does not fit" in out
    advice = out.split("the mildest first:\n")[1].splitlines()
    other_path, smaller = (line.split(", which ") for line in advice[:2])
    assert other_path[0].startswith("  --train.layer_path auto: ")
    change, but_no_memory = smaller
    assert change.startswith("  --train.batch_size 1 --train.gradient_accumulation_steps 32: ")
    assert but_no_memory == "alone does not fit either"


def test_memory_that_runs_out_is_no_fault(train, tmp_path, monkeypatch, capsys):
    """A GPU says so, whatever it told before."""
    step = dry_run.training_step

    def limited(run, step_model, batch, num_targets):
        if len(batch.tokens) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(run, step_model, batch, num_targets)

    monkeypatch.setattr(dry_run, "training_step", limited)
    plain = {"train.layer_path": "plain", "train.batch_size": 8}
    assert train(tmp_path / "run", "--dry_run", "true", **plain) == 1
    out = capsys.readouterr().out
    assert "steps of 1 and 2 sequences; there was no memory for a step of 4" in out
    assert "--train.batch_size 2 --train.gradient_accumulation_steps 4" in out


def test_only_what_lowers_the_need_is_advised(opened):
    """Of shorter blocks the states between them are kept, which may be more than the blocks."""
    estimate = estimate_of(opened(**{"train.batch_size": 16, "train.recompute": "none", "model.n_embd": 64}))
    now = measured(estimate).peak
    assert estimate.changed(tokens_per_block=16).total > estimate.total
    advice = measured(estimate, available=round((now - 1) / dry_run.MARGIN)).advice()
    assert not any("tokens_per_block" in line for line in advice)
    assert [line.split()[0] for line in advice[:2]] == ["--train.batch_size", "--train.recompute"]
    saved = estimate.total - estimate.changed(recompute="pass").total
    told = next(line for line in advice if "recompute" in line).split(": ")[1]
    assert float(told.split()[0]) == pytest.approx((now - saved) / 1e9, abs=1e-3)
    *marked, last = measured(estimate, base=10 * MB, available=9 * MB).advice()
    assert all(line.endswith("which alone does not fit either") for line in marked)
    assert last.startswith("none of these is enough alone")


def test_a_checkpoint_in_the_background_is_counted(opened):
    estimate = estimate_of(opened(**{"checkpoint.in_background": "true", "train.ema_decay": 0.9}))
    parts = estimate.parts
    copy = parts["weights"] + parts["optimizer"] + parts["moving average"]
    assert parts["copy for the checkpoint"] == copy
    found = measured(estimate)
    assert found.peak == found.peak_with(estimate.of_step(4)) + copy


def test_only_the_steps_and_evaluations_to_go_are_told(train, opened, tmp_path):
    """12 steps, evaluated every 4: one evaluation too many was told, and those of the whole run of one that goes on."""

    def to_go(*more, **overrides):
        found = forecast(opened(*more, **overrides))
        return found.steps, found.evaluated_sequences

    assert to_go() == (12, 3 * 4)
    assert to_go(**{"train.eval_every_steps": 5}) == (12, 3 * 4)  # at 5, 10 and 12
    assert to_go(**{"train.stop_at_step": 7, "train.ema_decay": 0.9}) == (7, 2 * 4)
    assert train(tmp_path / "dry", **{"train.stop_at_step": 5}) == 0
    assert to_go("--resume") == (7, 2 * 4)


class OfTwo(World):
    """A process that hears of another one, which always takes more memory than it."""

    def gather(self, value, *, beside_training=False):
        if isinstance(value, tuple):  # seconds and peak
            return [value, (value[0], value[1] + 10**9)]
        return [value, value]


@pytest.mark.slow
def test_the_process_that_takes_most_decides_for_all(opened, free, steps):
    free(1200 * MB)
    run = opened(**WIDE, **{"distributed.strategy": "none"})
    alone = forecast(run)
    assert max(steps) >= 16
    steps.clear()
    run.world = OfTwo()
    together = forecast(run)
    assert max(steps) < 16
    assert together.peak > alone.peak + 0.5e9
    assert not together.fits


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"train.memory_budget_gb": 0.000001}, "train.memory_budget_gb is 1,000 bytes"),
        (
            {"train.layer_path": "kernels", "train.dtype": "float64"},
            "train.layer_path is 'kernels', which cannot run here",
        ),
        ({"train.recompute": "none", "train.memory_budget_gb": 0.0002}, "train.recompute is none, which needs"),
        ({"train.rows_per_block": 5}, "train.rows_per_block is 5: must be at most train.batch_size, 4"),
        ({"train.tokens_per_block": 33}, "train.tokens_per_block is 33: must be at most train.block_size, 32"),
        ({"train.memory_budget_gb": -1}, "train.memory_budget_gb is -1: must be above 0"),
        ({"train.gradient_checkpointing": "true"}, "train.recompute: pass does what it did"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_the_layer_cannot_do_is_refused_before_the_first_step(train, tmp_path, capsys, overrides, said):
    assert train(tmp_path / "run", **overrides) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_budget_that_is_refused_names_one_that_is_not(train, tmp_path, capsys):
    assert train(tmp_path / "run", **{"train.memory_budget_gb": 0.000001}) == 2
    least = capsys.readouterr().err.split("at least ")[1].split("(")[1].split(" GB")[0]
    assert train(tmp_path / "run", **{"train.memory_budget_gb": least, "train.max_steps": 2}) == 0


@pytest.mark.slow
def test_how_the_layer_is_computed_changes_rounding_only(train, tmp_path):
    quiet = {"model.dropout": 0.0}
    assert train(tmp_path / "auto", **quiet) == 0
    for number, overrides in enumerate(
        (
            {"train.layer_path": "plain"},
            {"train.layer_path": "plain", "train.recompute": "pass"},
            {"train.layer_path": "torch", "train.rows_per_block": 3, "train.tokens_per_block": 10},
            {"train.recompute": "none"},
        )
    ):
        folder = tmp_path / str(number)
        assert train(folder, **quiet, **overrides) == 0
        # Sums of float32 in another order, carried through 12 optimizer steps.
        assert losses(folder) == pytest.approx(losses(tmp_path / "auto"), rel=1e-4)


def test_a_run_of_before_goes_on_with_what_its_setting_is_called_now(train, tmp_path):
    folder = tmp_path / "run"
    assert train(folder, **{"train.recompute": "pass", "train.stop_at_step": 5}) == 0
    path = folder / "config.yaml"
    lines = [line for line in path.read_text().splitlines() if "recompute" not in line]
    path.write_text("\n".join(lines).replace("train:\n", "train:\n  gradient_checkpointing: true\n"))
    assert stored_settings(folder)["train"]["recompute"] == "pass"
    assert main(["train", "--run_dir", str(folder), "--resume"]) == 0
    assert len(losses(folder)) == 12


def test_text_that_is_out_of_reach_is_not_needed(opened):
    """The test suite runs with HF_HUB_OFFLINE=1."""
    with pytest.raises(
        FileNotFoundError,
        match=r"no data set of that name was loaded from the hub.*any will do: with --data\.source pydoc",
    ):
        opened(**{"data.source": "org/none"})

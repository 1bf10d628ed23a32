"""The benchmarks run, and check what they compare before they print."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compare, comparison, gpu
from benchmarks.forked import TRAINING, Forked, ForkServer

ROOT = Path(__file__).parents[1]
IMPORTED = (
    *TRAINING,
    "bdh.bench.common",
    "bdh.evaluate.loss",
    "bdh.generate.engine",
    "transformers",
    "matplotlib.figure",
)
"""What benchmarks import, and takes long."""
SMALL = """
model: {n_layer: 1, n_embd: 16, n_head: 2, mlp_internal_dim_multiplier: 8}
data: {source: pydoc}
train: {block_size: 32, batch_size: 4, eval_windows: 4}
"""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Of all of them, so that a text is prepared once."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("BDH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def benchmark(cache):
    """Runs one of the benchmarks to its end, in a process forked from one that has imported what they need."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(ROOT)
        with ForkServer(*IMPORTED) as server:

            def run(name: str, *arguments: str) -> Forked:
                done = server.start([str(ROOT / "benchmarks" / name), *arguments])
                done.wait(250)
                return done

            yield run


@pytest.fixture
def gpu_checks(tmp_path):
    """Runs benchmarks/gpu.py where PyTorch sees no GPU; returns the process, and its results."""

    def run(*flags):
        file = tmp_path / "gpu.json"
        command = [sys.executable, "benchmarks/gpu.py", "--out", str(file), *flags]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        return done, json.loads(file.read_text()) if file.exists() else None

    return run


@pytest.mark.slow
def test_the_checks_of_a_gpu_run_small_on_the_cpu(gpu_checks):
    done, results = gpu_checks("--device", "cpu", "--benches", "small")
    assert done.returncode == 0, done.stdout + done.stderr
    assert results["tests"]["passed"] == 4
    assert results["tests"]["failures"] == {}
    assert results["versions"]["torch"] in done.stdout
    (bench,) = results["benches"]
    assert (bench["config"], bench["timed_out"]) == ("configs/small.yaml", False)
    assert [form["name"] for form in bench["figures"]["cases"][0]["forms"]] == ["bdh", "ops/naive.py"]


@pytest.mark.slow
def test_the_checks_of_a_gpu_say_that_there_is_none(gpu_checks):
    done, results = gpu_checks()
    assert done.returncode == 2
    assert "There is no GPU that this PyTorch can use: nothing was run. DEVICE=cpu" in done.stderr
    assert results is None


def test_a_process_that_takes_too_long_is_stopped_and_what_it_printed_is_kept():
    code = "import time\nprint('begun', flush=True)\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('ended')"
    found = gpu.limited([sys.executable, "-c", code], dict(os.environ), seconds=2)
    assert (found["status"], found["timed_out"], found["output"]) == (1, True, "begun\nended\n")


def test_what_failed_is_told_with_its_message(tmp_path):
    file = tmp_path / "test_some.py"
    file.write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\n@pytest.mark.skip\ndef test_c(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--junitxml=found.xml", file.name]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False)
    found = {name: (outcome, text) for name, outcome, text in gpu.outcomes(tmp_path / "found.xml")}
    assert {name: outcome for name, (outcome, _) in found.items()} == {
        "test_some::test_a": "passed", "test_some::test_b": "failure", "test_some::test_c": "skipped",
    }  # fmt: skip
    assert "assert 1 == 2" in found["test_some::test_b"][1]


@pytest.mark.slow
def test_logging_overhead(benchmark, tmp_path):
    (tmp_path / "small.yaml").write_text(SMALL)
    done = benchmark("logging_overhead.py", "--config", str(tmp_path / "small.yaml"), "--steps", "12")
    assert done.returncode == 0, done.said()
    assert re.search(r"a step +\d+\.\d+ ms\n", done.wrote())
    for name in ("jsonl", "tensorboard", "wandb", "trackio"):
        assert re.search(rf"{name} +\d+\.\d+ ms +\d+\.\d+% +\d+\.\d+% +\d+\.\d+ ms\n", done.wrote())


@pytest.mark.slow
def test_long_context_gets_worse_beyond_the_block_unless_the_state_is_carried(benchmark, tmp_path):
    """The carried model with decay stays at the loss of its first block through eight; the plain one does not."""
    # A quarter of the neurons: a step takes a third of the time, and more of them show the same.
    flags = ["--source", "pydoc", "--steps", "300", "--model.mlp_internal_dim_multiplier=8"]
    flags += ["--block_size", "32", "--val_tokens", "20000", "--image", str(tmp_path / "loss.png")]
    done = benchmark("long_context.py", *flags, "--variants", "plain", "carried, decay")
    assert done.returncode == 0, done.said()
    losses = _losses_by_block(done)
    plain, carried = losses["plain"], losses["carried, decay"]
    # A block's mean is over 78 * 32 tokens whose losses spread by about 2 nats: good to 0.04. Twice and a half that;
    # measured was 0.07 below the first block.
    assert sum(carried[1:]) / 7 < carried[0] + 0.1
    # Measured was 0.42 above it.
    assert sum(plain[2:]) / 6 > plain[0] + 0.2
    assert (tmp_path / "loss.png").stat().st_size > 10_000


def test_long_context_keeps_the_losses_of_each_seed(benchmark, tmp_path):
    flags = ["--source", "pydoc", "--block_size", "8", "--blocks", "2", "--val_tokens", "500", "--variants", "plain"]
    flags += ["--model.mlp_internal_dim_multiplier=2", "--results", str(tmp_path / "losses.json")]
    first = benchmark("long_context.py", *flags, "--steps", "2", "--seeds", "0")
    assert first.returncode == 0, first.said()
    both = benchmark("long_context.py", *flags, "--steps", "2", "--seeds", "0", "1", "--image", str(tmp_path / "x.svg"))
    assert re.findall(r"^seed \d", both.wrote(), re.MULTILINE) == ["seed 1"]  # the other is not trained again
    found = _losses_by_block(both)
    (zero,) = _losses_by_block(first).values()
    rows = list(zip(found["lowest"], found["plain"], found["highest"], strict=True))
    assert all(low < mean < high for low, mean, high in rows)
    assert all(loss in (low, high) for loss, (low, _, high) in zip(zero, rows, strict=True))
    assert "<svg" in (tmp_path / "x.svg").read_text()
    other = benchmark("long_context.py", *flags, "--steps", "3")
    assert other.returncode == 1
    assert "'steps': 2" in other.said()


def _losses_by_block(done):
    """The rows of the table, by their names."""
    rows = re.findall(r"^ *(plain|carried, decay|lowest|highest)((?: +\d+\.\d+)+)$", done.wrote(), re.MULTILINE)
    return {name: [float(loss) for loss in numbers.split()] for name, numbers in rows}


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [["--starts", "0"], ["--starts", "2", "--checkpoint.in_background=true", "--train.ema_decay=0.9"]],
    ids=["", "background"],
)
def test_random_kills_lose_nothing(benchmark, tmp_path, more):
    """Two starts at once without more are those of tests/train/test_lock.py."""
    done = benchmark("random_kills.py", "--kills", "2", "--folder", str(tmp_path), *more)
    assert "losses, samples and weights are those of the undisturbed run, to the bit" in done.wrote(), done.wrote()
    assert done.returncode == 0


@pytest.mark.slow
def test_window_compares_with_reading_again(benchmark, tmp_path):
    import torch

    from bdh import BDHConfig, BDHForCausalLM
    from bdh.tokenizer import byte_tokenizer

    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "mlp_internal_dim_multiplier": 4, "vocab_size": 256}
    BDHForCausalLM(BDHConfig(**sizes, initializer_range=0.3)).save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 300)
    flags = ["--source", str(tmp_path / "text.txt"), "--window", "16", "--stretches", "3", "--stretch_tokens", "100"]
    done = benchmark("window.py", str(tmp_path / "m"), *flags)
    assert done.returncode == 0, done.said()
    # A model of one pass sees the same either way; logits of float32 sums in another order.
    (difference,) = re.findall(r"mean difference ([+-]\d\.\d{4}) nats", done.wrote())
    assert abs(float(difference)) <= 0.0001
    assert len(re.findall(r"^ +[\d,]+ +100 +\d\.\d{4} +\d\.\d{4} +[+-]", done.wrote(), re.MULTILINE)) == 3


@pytest.mark.slow
def test_the_loss_curve_is_that_of_the_plain_equations(benchmark):
    flags = ["--train.block_size", "24", "--train.batch_size", "4", "--model.n_embd", "16"]
    done = benchmark("loss_curve.py", "--steps", "12", *flags)
    assert done.returncode == 0, done.said()
    apart = float(re.search(r"12 steps: at most (\S+) nats apart", done.wrote())[1])
    assert 0 <= apart < 1e-9  # float64
    assert "blocks float32: kernels in blocks" in done.wrote()


@pytest.mark.slow
def test_a_grammar_costs_what_is_told(benchmark, tmp_path):
    import torch

    from bdh import BDHConfig, BDHForCausalLM
    from bdh.tokenizer import byte_tokenizer

    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "mlp_internal_dim_multiplier": 4, "vocab_size": 260}
    BDHForCausalLM(BDHConfig(**sizes)).save_pretrained(tmp_path / "m")
    byte_tokenizer(special_tokens=True).save_pretrained(tmp_path / "m")
    done = benchmark("grammar.py", "--model", str(tmp_path / "m"), "--rounds", "1", "--steps", "2")
    assert done.returncode == 0, done.said()
    assert "all of those follow the schema; free text stays as it is" in done.wrote()
    assert len(re.findall(r"ms, once; then +\d+ us a token", done.wrote())) == 3
    assert len(re.findall(r"at once +[\d.]+ tokens/s without, +[\d.]+ with", done.wrote())) == 2


@pytest.mark.slow
def test_both_models_are_trained_on_the_same_text(benchmark, tmp_path):
    (tmp_path / "step_seconds.json").write_text('{"BDH": 6, "GPT-2": 3}')
    done = benchmark("comparison.py", "--corpora", "pydoc", "--seeds", "0", "--minutes", "0.1", "--out", str(tmp_path))
    assert done.returncode == 0, done.said()
    results = comparison.load(tmp_path)
    assert {each.model: each.steps for each in results} == {"BDH": 1, "GPT-2": 2}
    # Of 256 values a fresh model's loss is near ln 256 = 5.5, and a step or two bring down the first.
    assert all(5.0 < each.points[0].train_loss < 6.0 and each.points[-1].loss < 5.5 for each in results)
    sizes = [each.parameters for each in results]
    assert max(sizes) / min(sizes) < 1.05
    again = benchmark("comparison.py", "--corpora", "pydoc", "--seeds", "0", "--minutes", "0.1", "--out", str(tmp_path))
    assert (again.returncode, "held out" in again.wrote()) == (0, False)


def comparison_result(model: str, seed: int, losses: list[float]) -> comparison.Result:
    points = [comparison.Point(i + 1, loss, loss) for i, loss in enumerate(losses)]
    return comparison.Result(
        "pydoc", model, seed, learning_rate=1e-3, steps=len(losses), step_seconds=1, seconds_used=1, parameters=1,
        processor="", torch="", points=points,
    )  # fmt: skip


def test_losses_are_compared_after_as_many_bytes_and_as_much_time(tmp_path):
    results = [
        comparison_result("BDH", 0, [5.0, 4.0, 3.0, 2.5, 2.25]),
        comparison_result("BDH", 1, [5.0, 4.0, 3.0, 2.7, 2.35]),
        comparison_result("GPT-2", 0, [5.5, 5.0, 4.5, 4.0, 3.5, 3.0, 2.5, 2.0, 1.0, 1.5]),
    ]
    bdh, gpt2 = comparison.report(results).splitlines()[2:]
    bytes_read = 4 * 256 * 8 / 1e6  # before BDH's learning rate falls, after 4 of 5 steps
    assert (
        bdh
        == f"| pydoc | BDH | 2 | 0.0 | 0.0 (0.0 to 0.0) | 2.600 (2.500 to 2.700) at {bytes_read:.1f} | 2.300 (2.250 to 2.350) | 2.300 (2.250 to 2.350) |"
    )
    assert gpt2 == f"| pydoc | GPT-2 | 1 | 0.0 | 0.0 | 4.000 at {bytes_read:.1f} | 1.500 | 1.000 |"
    comparison.draw(results, tmp_path / "losses.svg")
    assert (tmp_path / "losses.svg").stat().st_size > 10_000


def test_the_learning_rate_rises_stays_and_falls():
    rates = [comparison.rate_at(share) for share in (0.0, 0.01, 0.02, 0.5, 0.8, 0.9, 1.0)]
    assert rates == pytest.approx([0.02, 0.5, 1, 1, 1, 0.55, 0.1])


def test_a_figure_beyond_the_tolerance_is_named():
    found = {
        "steady": compare.Figure([0.010, 0.020, 0.011], [0.012, 0.010, 0.030]),
        "slower": compare.Figure([0.010], [0.0131]),
    }
    text, slow = compare.table(found, tolerance=0.25)
    assert slow == ["slower"]
    assert re.search(r"^steady +11\.00 ms +12\.00 ms +1\.091 +10\.00 to 20\.00$", text, re.MULTILINE)
    assert "1.310" in text
    assert text.endswith("over 25 % slower")
    assert compare.table(found, tolerance=0.4)[1] == []


def test_bits_that_differ_are_named():
    import torch

    old = {"logits": torch.zeros(4), "state": torch.ones(2, dtype=torch.bfloat16), "gone": torch.ones(1)}
    new = {"logits": torch.tensor([0.0, 1e-7, 0.0, 0.0]), "state": torch.ones(2, dtype=torch.bfloat16)}
    assert compare.differences(old, old) == []
    assert compare.differences(old, new) == ["gone: only in old", "logits: 1 of 4 numbers, by up to 1.0e-07"]


@pytest.mark.slow
def test_two_checkouts_are_compared_by_turns(tmp_path):
    command = [sys.executable, "benchmarks/compare.py", str(ROOT), "--only", "decode, 1", "bdh --help", "--size", "odd"]
    command += ["--processes", "1", "--starts", "1", "--seconds", "0.01", "--json", str(tmp_path / "found.json")]
    done = subprocess.run([*command, "--tolerance", "50"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert {name: (len(each["old"]), len(each["new"])) for name, each in found.items()} == {
        "decode, 1 sequence": (1, 1), "start: bdh --help": (2, 2),
    }  # fmt: skip

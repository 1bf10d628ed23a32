"""bdh bench: every benchmark runs at a small size, compares before it times, and refuses what it cannot do."""

import errno
import json
import os
from pathlib import Path

import pytest

from bdh.bench import train as bench_train
from bdh.bench.common import Report, sparse_model
from bdh.cli.main import main
from bdh.model.configuration import BDHConfig
from bdh.tokenizer import byte_tokenizer
from bdh.train.export import export_model

SMALL = ["--n_embd", "32", "--n_head", "2", "--n_layer", "2", "--mlp_internal_dim_multiplier", "16"]


@pytest.fixture
def bench(capsys):
    def run(*argv):
        # One thread: those of the kernels wait actively, which is slow where other programs run beside the tests.
        threads = [] if "--threads" in argv else ["--threads", "1"]
        status = main(["bench", *map(str, argv), *threads])
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return run


def test_decode_compares_and_then_times_every_form(bench, tmp_path):
    status, out, _ = bench("decode", "--quick", *SMALL, "--json", tmp_path / "decode.json")
    assert status == 0
    found = json.loads((tmp_path / "decode.json").read_text())
    agreement = found["agreement"]
    assert agreement["agrees"]
    assert agreement["tokens"] == 100
    assert len(agreement["largest_difference"]) == 3
    # Numbers that were compared, not a tensor with itself: other orders of sums round differently.
    assert 0 < max(agreement["largest_difference"].values()) <= agreement["allowed"]
    assert all(drift > 0 for drift in agreement["largest_difference_by_rounding"].values())
    names = [form["name"] for form in found["forms"]]
    assert len(names) == len(set(names)) == 7
    assert all(form["ms_per_token"] > 0 and form["name"] in out for form in found["forms"])
    kernels, with_weights, with_both = found["forms"][:3]
    assert kernels["times_kernels_float32"] == 1
    assert kernels["bytes_per_token"] > with_weights["bytes_per_token"] > with_both["bytes_per_token"]
    assert [each["sequences"] for each in found["batches"]] == [1, 2, 4, 8]
    assert list(found["positions"]["ms_per_token"]) == ["1,000", "1,000,000"]
    assert found["model"]["n_embd"] == 32


@pytest.mark.slow
def test_quantize_compares_formats_with_dequantized_weights_and_times_them(bench, tmp_path):
    status, out, _ = bench("quantize", "--quick", "--n_layer", 2, "--json", tmp_path / "quantize.json")
    assert status == 0
    found = json.loads((tmp_path / "quantize.json").read_text())
    assert found["agreement"]["agrees"]
    assert set(found["agreement"]["largest_difference"]) == {"int8", "int4", "mixed"}
    forms = {form["name"]: form for form in found["forms"]}
    assert all(
        form["ms_per_token"] > 0 and form["prefill_tokens_per_s"] > 0 and name in out for name, form in forms.items()
    )
    reference = forms["float32"]
    assert reference["kl"] == 0
    assert reference["times_float32"] == 1
    assert forms["int4"]["kl"] > forms["int8"]["kl"] > 0
    assert forms["int4"]["disk_bytes"] < forms["int8"]["disk_bytes"] < forms["bfloat16"]["disk_bytes"]
    assert forms["int4"]["memory_bytes"] < forms["int8"]["memory_bytes"] < reference["memory_bytes"]
    assert not any("perplexity" in form for form in forms.values())  # of random tokens it says nothing
    assert found["left_out"] == []
    libraries = ["torchao int8, weight only", "torchao int8, dynamic", "bitsandbytes int8", "bitsandbytes nf4"]
    assert all(any(name.endswith(f"M, {library}") for name in forms) for library in ["float32", *libraries])
    # Their rounding is as small as ours: the names of the modules are right.
    assert all(0 < forms[library]["kl"] < 10 * forms["int4"]["kl"] for library in libraries)


@pytest.mark.slow
def test_quantize_gives_the_perplexity_of_a_text(bench, tmp_path):
    model = sparse_model(BDHConfig(n_embd=32, n_head=2, n_layer=2, mlp_internal_dim_multiplier=16, vocab_size=257))
    export_model(model, byte_tokenizer(), tmp_path / "model", card="")
    (tmp_path / "text").write_text("The hatchling reads what it has not read before. " * 10)
    status, out, _ = bench(
        "quantize", "--quick", "--model", tmp_path / "model", "--text", tmp_path / "text", "--json", "-"
    )
    assert status == 0
    forms = {form["name"]: form for form in json.loads(out)["forms"]}
    assert forms["int8"]["perplexity"] == pytest.approx(forms["float32"]["perplexity"], rel=0.05)
    (tmp_path / "text").write_text("x")
    status, _, err = bench("quantize", "--quick", "--model", tmp_path / "model", "--text", tmp_path / "text")
    assert status == 2
    assert "of 1 token: must have at least 2" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["decode", "--text", "x"], "text is 'x': must be left out: it is for bdh bench quantize"),
        (["quantize", "--text", "x"], "text is 'x': must be given with model"),
        (["quantize", "--busy", "1"], "busy is 1: must be left out"),
        (["decode", "--contexts", "500"], "contexts is 500: must be left out: it is for bdh bench context"),
    ],
)
def test_options_of_other_benchmarks_than_quantize_are_refused(bench, argv, message):
    status, _, err = bench(*argv)
    assert status == 2
    assert message in err


@pytest.mark.slow
def test_decode_beside_busy_programs(bench):
    status, out, _ = bench("decode", "--quick", *SMALL, "--busy", 1, "--threads", 2, "--json", "-")
    found = json.loads(out)
    assert status == 0
    assert found["agreement"]["agrees"]
    assert found["busy"]["programs"] == 1
    timings = found["busy"]["timings"]
    assert [(each["name"], each["threads"]) for each in timings] == [
        (name, threads) for name in ("a token", "a prompt of 32 tokens") for threads in (1, 2)
    ]
    for each in timings:
        assert each["speed_kept"] == pytest.approx(each["ms_alone"] / each["ms_beside"])
    assert "forms" not in found


def test_context_compares_and_then_times_after_each_length(bench, tmp_path):
    status, out, _ = bench(
        "context",
        "--quick",
        *SMALL,
        "--contexts",
        20,
        "--contexts",
        70,
        "--json",
        "-",
        "--image",
        tmp_path / "speed.svg",
    )
    assert status == 0
    found = json.loads(out)
    assert found["agreement"]["agrees"]
    assert len(found["agreement"]["largest_difference"]) == 3
    assert max(found["agreement"]["largest_difference"].values()) > 0  # not a tensor with itself
    first, second = found["contexts"]
    numbers_per_token = 2 * found["gpt2"]["layers"] * found["gpt2"]["width"]
    assert (first["context"], second["context"]) == (20, 70)
    for each in (first, second):
        assert all(each[name]["ms_per_token"] > 0 for name in ("BDH", "GPT-2", "GPT-2, static cache"))
        assert all(each[name]["prompt_tokens_per_s"] > 0 for name in ("BDH", "GPT-2"))
        # Keys and values of each layer; and a state that does not grow, with a little beside its numbers.
        assert each["GPT-2"]["memory_bytes"] == numbers_per_token * 4 * each["context"]
        assert 0 <= each["BDH"]["memory_bytes"] - 2 * 512 * 32 * 4 < 1000
    assert first["BDH"]["memory_bytes"] == second["BDH"]["memory_bytes"]
    assert "time of one token, ms</text>" in (tmp_path / "speed.svg").read_text()


@pytest.mark.parametrize(
    ("argv", "messages"),
    [
        (["--contexts", "[100, 150]"], ["contexts is [100, 150]: must be ascending, the first at least 96"]),
        (["--contexts", "50"], ["contexts is 50: must be ascending"]),
        (["--image", "x.pdf", "--busy", "1"], ["image is 'x.pdf': must be named *.svg or *.png", "busy is 1: must be"]),
        (["--image", "nowhere/x.svg"], ["image is 'nowhere/x.svg': must be a file in a folder that exists"]),
    ],
)
def test_wrong_values_of_context(bench, argv, messages):
    status, _, err = bench("context", *argv)
    assert status == 2
    assert all(message in err for message in messages)


def test_a_picture_needs_matplotlib(bench, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    status, _, err = bench("context", "--image", "x.svg")
    assert status == 2
    assert "plots need matplotlib: pip install " in err
    assert "[report]" in err


def test_prefill_times_every_length(bench):
    status, out, _ = bench("prefill", "--quick", *SMALL, "--json", "-")
    found = json.loads(out)
    assert status == 0
    assert [each["tokens"] for each in found["prompts"]] == [64, 128, 256, 512]
    assert found["naive"]["largest_difference_of_last_logits"] <= found["naive"]["allowed"]


def test_engine_compares_and_then_times(bench):
    status, out, _ = bench("engine", "--quick", *SMALL, "--json", "-", "--threads", 1)
    found = json.loads(out)
    assert status == 0
    assert found["machine"]["torch_threads"] == 1
    assert found["agreement"]["equal"] == 8
    assert [each["requests"] for each in found["requests"]] == [1, 8]
    # A prompt of 1,000 tokens, 63 at most in each step beside the other's one.
    assert found["gaps"]["tokens_meanwhile"] >= 1000 // 63
    assert found["gaps"]["p50_ms"] <= found["gaps"]["p99_ms"] <= found["gaps"]["max_ms"]
    assert found["shared_prefix"]["second_ms"] > 0


@pytest.fixture
def folder(tmp_path):
    """Of an exported model."""

    def write(edit=lambda model: None):
        model = sparse_model(BDHConfig(n_embd=32, n_head=2, n_layer=2, mlp_internal_dim_multiplier=16, decay=40))
        edit(model)
        export_model(model, byte_tokenizer(), tmp_path / "model", "# A model\n")
        return tmp_path / "model"

    return write


@pytest.mark.parametrize("benchmark", ["decode", "prefill", "engine"])
def test_a_model_with_decay_from_a_folder(bench, folder, benchmark):
    status, out, _ = bench(benchmark, "--quick", "--model", folder())
    assert status == 0
    assert "D 32, H 2, N 256, L 2, V 256" in out


@pytest.mark.parametrize("benchmark", ["decode", "context", "prefill"])
def test_nothing_is_timed_where_the_forms_do_not_agree(bench, folder, benchmark):
    """A head of weights that are not numbers: nothing that it gives is equal to anything."""
    path = folder(lambda model: model.lm_head.weight[3].fill_(float("nan")))
    status, out, _ = bench(benchmark, "--quick", "--model", path)
    assert status == 1
    assert "the forms do not agree: nothing" in out
    assert "tokens/s" not in out


def test_all_wrong_values_are_named_at_once(bench, tmp_path):
    status, out, err = bench(
        "engine", "--n_head", 3, "--vocab_size", 300, "--threads", 0, "--json", tmp_path / "missing" / "x", "--fast", 1
    )
    assert status == 2
    assert out == ""
    for said in ("cannot be split over n_head = 3", "vocab_size is 300", "threads is 0", "json is", "--fast is not"):
        assert said in err


def test_an_unknown_benchmark_is_refused(bench):
    status, _, err = bench("sleep")
    assert status == 2
    assert "benchmark is 'sleep': must be one of decode, context, prefill, engine, quantize, train" in err


def test_sizes_are_not_given_beside_a_model(bench, folder):
    status, _, err = bench("decode", "--model", folder(), "--n_embd", 64)
    assert status == 2
    assert "n_embd is 64: must be left out with model" in err


@pytest.mark.slow
def test_train_compares_and_then_times(bench):
    status, out, _ = bench(
        "train", "--quick", *SMALL, "--block_size", 16, "--block_size", 40, "--density", 0.2, "--baselines", "naive",
        "--json", "-",
    )  # fmt: skip
    found = json.loads(out)
    assert status == 0
    assert [case["block_size"] for case in found["cases"]] == [16, 40]
    for case in found["cases"]:
        agreement = case["agreement"]
        assert agreement["agrees"]
        assert 0 < max(agreement["relative_difference"].values()) <= agreement["allowed"]
        assert set(agreement["relative_difference"]) == {
            "loss", "embed", "encoder", "encoder_v", "decoder", "lm_head",
        }  # fmt: skip
        ours, naive = case["forms"]
        assert (ours["name"], naive["name"]) == ("bdh", "ops/naive.py")
        assert ours["bdh_is_faster"] == 1
        assert all(form["peak_bytes"] > form["bytes_before"] > 0 for form in case["forms"])
        assert case["flops"]["matmul_peak_per_s"] > case["flops"]["useful_per_s"] > 0
        assert sum(case["parts"].values()) == pytest.approx(case["ms_of_step_with_clocks"])
        assert min(case["parts"].values()) > 0
        measured = ("device", "dtype", "dropout", "requested_density", "seed", "threads", "rounds")
        assert [case[name] for name in measured] == ["cpu", "float32", 0.1, 0.2, 0, 1, 2]
        assert case["layer_options"]["recompute"] == "auto"
        layer = case["layer"]
        assert (layer["path"], layer["reason"]) == ("kernels", "float32 on the cpu")
        assert (layer["rows_per_block"], layer["tokens_per_block"]) == (2, case["block_size"])
        assert (layer["kept_passes"], layer["block_bytes"] > 0) == (2, True)
    assert all(0.1 < each["x"] < 0.3 for each in found["density"])


def test_a_configuration_of_training_is_taken_over(bench, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {n_embd: 16, n_head: 2, n_layer: 1, mlp_internal_dim_multiplier: 4, dropout: 0.0}\n"
        "train: {batch_size: 3, block_size: 20}\ndata: {source: pydoc}\n"
    )
    status, out, _ = bench("train", "--config", path, "--one_step", "--json", "-", "--block_size", 24)
    found = json.loads(out)
    assert status == 0
    assert (found["model"]["n_embd"], found["model"]["n_layer"], found["model"]["vocab_size"]) == (16, 1, 256)
    step = found["one_step"]
    assert (step["batch_size"], step["block_size"]) == (3, 24)  # a flag overrides the file
    assert step["peak_bytes"] > step["bytes_before"] > 0


CONFIGURATION = """
model: {n_embd: 16, n_head: 2, n_layer: 1, mlp_internal_dim_multiplier: 4, decay: [9, null], rope_theta: 500,
        attention_form: chunked, chunk_size: 7, dropout: 0.2}
tokenizer: {special_tokens: true}
data: {source: pydoc}
train: {batch_size: 3, block_size: 20, device: cpu, dtype: bfloat16, layer_path: torch, recompute: none,
        memory_budget_gb: 0.5, rows_per_block: 2, carry_state: true}
"""


def test_all_that_a_configuration_says_of_the_model_and_the_layer_is_taken_over(bench, tmp_path):
    (tmp_path / "run.yaml").write_text(CONFIGURATION)
    status, out, err = bench(
        "train", "--config", tmp_path / "run.yaml", "--json", "-", "--baselines", "[]", "--rounds", 1,
        "--recompute", "pass", "--tokens_per_block", 5,
    )  # fmt: skip
    found = json.loads(out)
    assert status == 0
    assert "a single step of random tokens is timed: train.carry_state\n" in err
    model = found["model"]
    assert [model[name] for name in ("vocab_size", "decay", "rope_theta", "attention_form", "chunk_size")] == [
        260, [9.0, None], 500.0, "chunked", 7,
    ]  # fmt: skip
    (case,) = found["cases"]
    assert (case["dtype"], case["dropout"], case["rounds"]) == ("bfloat16", 0.2, 1)
    assert case["layer_options"] == {
        "path": "torch", "recompute": "pass", "memory_budget": 500_000_000, "rows_per_block": 2, "tokens_per_block": 5,
    }  # fmt: skip
    assert (case["layer"]["path"], case["layer"]["rows_per_block"], case["layer"]["tokens_per_block"]) == (
        "torch",
        2,
        5,
    )
    assert [form["name"] for form in case["forms"]] == ["bdh"]


def test_what_a_configuration_cannot_be_timed_with_is_one_clear_error(bench, tmp_path):
    (tmp_path / "run.yaml").write_text("train: {init_from: runs/demo}\n")
    status, _, err = bench("train", "--config", tmp_path / "run.yaml")
    assert status == 2
    assert "train.init_from is 'runs/demo'" in err
    assert "give --model runs/demo" in err
    status, _, err = bench("train", "--config", tmp_path / "run.yaml", "--model", "x")
    assert status == 2
    assert err == "error: --config and --model are given together: each says what model is timed, so give one of them\n"
    status, _, err = bench("train", "--config")  # --threads follows
    assert "--config is given without a value" in err


def test_the_configuration_of_another_benchmark_is_its_own(bench, tmp_path):
    """The word train behind a flag made it one of bdh train."""
    (tmp_path / "bench.yaml").write_text("agreement_tokens: 0\n")
    status, _, err = bench("decode", "--model", "train", "--config", tmp_path / "bench.yaml")
    assert status == 2
    assert "agreement_tokens is 0" in err


@pytest.mark.parametrize("dtype", ["auto", "float64"])
def test_a_dtype_of_training(bench, tmp_path, monkeypatch, dtype):
    (tmp_path / "run.yaml").write_text(f"train: {{dtype: {dtype}}}\n")
    seen = []
    monkeypatch.setattr(bench_train, "bench_one_step", lambda case, progress: seen.append(case.dtype) or 1 / 0)
    status, _, err = bench("train", "--config", tmp_path / "run.yaml", "--one_step")
    if dtype == "auto":
        assert seen == ["float32"]
    else:
        assert status == 2
        assert "dtype is 'float64': must be one of auto, float32, bfloat16, float16" in err
        assert seen == []


@pytest.fixture
def nothing_runs(monkeypatch):
    monkeypatch.setattr("bdh.cli.bench.measured", lambda *arguments: pytest.fail("something was measured"))


@pytest.mark.usefixtures("nothing_runs")
def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(bench, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    for name, said in {
        "": "must not be empty",
        tmp_path: "must be a file, not a folder",
        tmp_path / "pipe": "must be a file, not a device",
        tmp_path / "missing" / "x": "must be a file in a folder that exists",
        tmp_path / "file" / "x": "must be a file in a folder that exists",
    }.items():
        status, out, err = bench("decode", "--json", name)
        assert (status, out) == (2, "")
        assert f"json is '{name}': {said}" in err
    # For root, everything may be written.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    status, _, err = bench("decode", "--json", tmp_path / "x")
    assert status == 2
    assert f"json is '{tmp_path / 'x'}': must be a file that may be written" in err


def test_a_full_disk_leaves_the_figures_that_were_there(bench, tmp_path, monkeypatch):
    path = tmp_path / "figures.json"
    path.write_text("before")
    write = Path.write_text

    def full(self, text, **others):
        write(self, text[:10], **others)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    report = Report("train", lines=["1,000 tokens/s"])
    monkeypatch.setattr("bdh.cli.bench.measured", lambda *arguments: report)
    status, out, err = bench("train", "--json", path)
    assert status == 2
    assert f"the disk is full, {path} could not be written" in err
    assert "tokens/s" in out  # what was found is shown all the same
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--threads", 10**8], "threads is 100000000: must be from 1 to"),
        (["--vocab_size", 1], "vocab_size is 1: must be at least 2"),
        (["--baselines", "foo"], "baselines is 'foo': must be one of naive, compiled, gpt2, or a list"),
        (["--block_size", "abc"], "block_size is 'abc': must be a whole number, or a list"),
        (
            ["--block_size", 32, "--block_size", 32],
            "block_size is [32, 32]: must be at least 1 each, and no two the same",
        ),
        (["--one_step", "--rounds", 3], "rounds is 3: must be left out with one_step"),
        (["--one_step", "--baselines", "naive"], "baselines is 'naive': must be left out with one_step"),
        (["--rows_per_block", 17], "rows_per_block is 17: must be from 1 to batch_size, 16"),
        (["--block_size", 20, "--tokens_per_block", 21], "tokens_per_block is 21: must be from 1 to block_size, 20"),
        (["--memory_budget_gb", 0], "memory_budget_gb is 0: must be above 0"),
    ],
)
def test_what_a_training_step_cannot_be_is_refused(bench, argv, said):
    status, out, err = bench("train", *argv)
    assert (status, out) == (2, "")
    assert said in err


def test_quick_is_quick_but_where_rounds_are_given(bench, monkeypatch):
    seen = []

    def stop(cases, *, baselines, rounds, progress):
        seen.append((list(baselines), rounds))
        raise ValueError("enough")

    monkeypatch.setattr(bench_train, "bench_train", stop)
    for argv in ([], ["--quick"], ["--quick", "--rounds", 4, "--baselines", "gpt2"], ["--baselines", "[naive, gpt2]"]):
        bench("train", *SMALL, *argv)
    every = ["naive", "compiled", "gpt2"]
    assert seen == [(every, 5), (every, 2), (["gpt2"], 4), (["naive", "gpt2"], 5)]


def test_the_help_names_what_is_allowed(bench, capsys):
    with pytest.raises(SystemExit):
        bench("train", "--help", "--config", "missing.yaml")
    said = " ".join(capsys.readouterr().out.split())
    assert "one of naive, compiled, gpt2, or a list" in said
    assert "By default 256; for train 128; with --quick 64" in said
    assert "on a GPU with --device" in said
    assert "--print_config is only to be read, and cannot be given as --config" in said


def test_what_is_for_another_benchmark_is_refused(bench):
    status, _, err = bench("decode", "--density", 0.2, "--block_size", 5, "--one_step", "true")
    assert status == 2
    for name in ("density", "block_size", "one_step"):
        assert f"{name} is" in err
    assert "it is for bdh bench train" in err
    status, _, err = bench("train", "--density", 5, "--dropout", 1, "--batch_size", 0, "--rounds", 0, "--one_step", "true",
                           "--block_size", 8, "--block_size", 9)  # fmt: skip
    assert status == 2
    for name in ("density is 5", "dropout is 1", "batch_size is 0", "rounds is 0", "one with one_step"):
        assert name in err
    status, _, err = bench("train", "--layer_path", "kernels", "--dtype", "bfloat16", "--quick")
    assert status == 2
    assert err.startswith(
        "error: layer_path is 'kernels', which cannot run here: they compute in float32, not in bfloat16"
    )
    status, _, err = bench("train", "--memory_budget_gb", 1e-6, "--quick")
    assert status == 2
    assert err.startswith("error: memory_budget_gb is 1,000 bytes")
    status, _, err = bench("decode", "--baselines", "naive", "--recompute", "pass")
    assert status == 2
    assert "baselines is" in err
    assert "recompute is" in err

"""bdh bench: every benchmark runs at a small size, compares before it times, and refuses what it cannot do."""

import json

import pytest

from bdh.bench.weights import sparse_model
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


@pytest.mark.parametrize("benchmark", ["decode", "prefill"])
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
    assert "benchmark is 'sleep': must be one of decode, prefill, engine, train" in err


def test_sizes_are_not_given_beside_a_model(bench, folder):
    status, _, err = bench("decode", "--model", folder(), "--n_embd", 64)
    assert status == 2
    assert "n_embd is 64: must be left out with model" in err


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
        assert sum(case["parts"].values()) > 0
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
    assert "path is 'kernels', which cannot run here: they compute in float32, not in bfloat16" in err

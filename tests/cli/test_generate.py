import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from bdh.cli.main import main
from benchmarks.forked import Forked, ForkServer


def generate(*argv) -> int:
    return main(["generate", *map(str, argv)])


def test_the_printed_text_is_the_models(model_folder, capsys):
    assert generate(model_folder, "--prompt", "The ", "--temperature", 0, "--max_new_tokens", 12) == 0
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    expected = model.generate_text(tokenizer, "The ", temperature=0, max_new_tokens=12)
    assert capsys.readouterr().out == f"The {expected}\n"


def test_a_line_about_compiling_does_not_cut_the_printed_text(model_folder, capsys, monkeypatch):
    """With the kernels of another format than the last one's, it came between prompt and text."""
    from bdh.generate.engine import Engine

    step = Engine.step

    def announcing(engine):
        print("compiling the kernels")
        return step(engine)

    monkeypatch.setattr(Engine, "step", announcing)
    assert generate(model_folder, "--prompt", "The ", "--temperature", 0, "--max_new_tokens", 1) == 0
    first, second = capsys.readouterr().out.split("\n", 1)
    assert first == "compiling the kernels"
    assert second.startswith("The ")


def test_a_model_folder_that_a_killed_process_was_replacing_is_opened(model_folder, tmp_path, capsys):
    """On disks that cannot exchange two folders, a kill between the two renames left no folder of that name."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, tmp_path / ".model.old")
    assert main(["generate", str(folder), "--prompt", "The ", "--max_new_tokens", "2"]) == 0
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in Path(model_folder).iterdir())
    shutil.copytree(folder, tmp_path / ".again.old")
    assert main(["convert", "none.pt", str(tmp_path / "again")]) == 2
    assert "again exists already" in capsys.readouterr().err


def test_a_text_follows_a_schema_or_a_pattern(model_folder, tmp_path, capsys):
    (tmp_path / "schema.json").write_text('{"enum": ["yes", "no", 7]}')
    flags = ("--prompt", "Is it? ", "--max_new_tokens", 40)
    assert generate(model_folder, *flags, "--json_schema", tmp_path / "schema.json") == 0
    assert capsys.readouterr().out in [f"Is it? {each}\n" for each in ('"yes"', '"no"', "7")]
    assert generate(model_folder, *flags, "--regex", "[0-9]{4}") == 0
    assert re.fullmatch("Is it\\? [0-9]{4}\n", capsys.readouterr().out)
    lines = [{"prompt": "a"}, {"prompt": "b", "grammar": {"regex": "x{3}"}}, {"prompt": "c", "grammar": None}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    output = tmp_path / "out.jsonl"
    files = ("--prompts_file", tmp_path / "prompts.jsonl", "--output", output)
    assert generate(model_folder, *files, "--regex", "[0-9]{4}", "--max_new_tokens", 9) == 0
    found = [json.loads(line) for line in output.read_text().splitlines()]
    assert re.fullmatch("[0-9]{4}", found[0]["text"])
    assert found[1]["text"] == "xxx"
    assert found[2]["finish_reason"] == "length"


@pytest.mark.slow
def test_a_seed_gives_the_same_text_in_another_process(model_folder):
    """The third text, of another seed, comes from the second process too."""
    argv = ["generate", str(model_folder), "--prompt", "a", "--max_new_tokens", "20", "--seed"]
    code = (
        "import sys; from bdh.cli.main import main\n"
        "for seed in sys.argv[1].split(','):\n"
        "    assert main([*sys.argv[2:], seed]) == 0\n"
        "    sys.stdout.flush(); sys.stdout.buffer.write(bytes(8)); sys.stdout.flush()\n"
    )
    texts = []
    for seeds in ("1", "1,2"):
        command = [sys.executable, "-c", code, seeds, *argv]
        texts += subprocess.run(command, capture_output=True, check=True).stdout.split(bytes(8))[:-1]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("flag", ["--temperature", "--repetition_penalty"])
def test_the_smallest_divisors_of_the_logits_do_not_overflow(model_folder, flag):
    assert generate(model_folder, "--prompt", "a", "--max_new_tokens", 3, flag, "1e-6") == 0


def test_prompts_of_a_file_go_into_json_lines_in_order(model_folder, tmp_path, capsys):
    prompts = ["one", "two is longer ", "drei ü"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n\n")
    output = tmp_path / "out.jsonl"
    flags = ("--temperature", 0, "--max_new_tokens", 8)
    assert (
        generate(
            model_folder,
            "--prompts_file",
            tmp_path / "prompts.txt",
            "--output",
            output,
            "--engine.max_running",
            2,
            *flags,
        )
        == 0
    )
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    for row in rows:  # greedy: a row of a batch is what it is alone
        capsys.readouterr()
        assert generate(model_folder, "--prompt", row["prompt"], *flags) == 0
        assert capsys.readouterr().out == f"{row['prompt']}{row['text']}\n"


def test_several_sequences_and_beams(model_folder, tmp_path):
    output = tmp_path / "out.jsonl"
    assert (
        generate(model_folder, "--prompt", "a", "--num_return_sequences", 3, "--max_new_tokens", 5, "--output", output)
        == 0
    )
    assert len(output.read_text().splitlines()) == 3
    assert generate(model_folder, "--prompt", "a", "--num_beams", 3, "--temperature", 0, "--max_new_tokens", 5) == 0


@pytest.mark.parametrize("prompt", ["# x", "null", "~", "1e3", "[INST"])
def test_a_prompt_is_text_whatever_yaml_would_make_of_it(model_folder, capsys, prompt):
    assert generate(model_folder, "--prompt", prompt, "--max_new_tokens", 2, "--seed", 1) == 0
    assert capsys.readouterr().out.startswith(prompt)


def test_every_stop_string_counts_and_is_text(model_folder, capsys):
    """The second `--stop` took the place of the first, and `[a]` was the list of a."""
    flags = ("--prompt", "The ", "--temperature", 0, "--max_new_tokens", 12)
    assert generate(model_folder, *flags) == 0
    text = capsys.readouterr().out.removeprefix("The ").removesuffix("\n")
    for stops in ([text[4], text[8]], [text[8], text[4]]):
        first = min(map(text.index, stops))
        assert generate(model_folder, *flags, *(f"--stop={stop}" for stop in stops)) == 0
        assert capsys.readouterr().out == f"The {text[:first]}\n"
    assert generate(model_folder, *flags, "--stop", f"[{text[4]}]", "--stop", "[INST") == 0
    assert capsys.readouterr().out == f"The {text}\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--prompt", "a", "--prompt", "b"],
            "prompt is given twice, as 'a' and 'b': give it once, or several in a file with --prompts_file",
        ),
        ([], "give either --prompt or --prompts_file"),
        (["--prompt", "a", "--prompts_file", "b"], "give either --prompt or --prompts_file"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a", "--temperature", "-1.0"], "temperature is -1.0: must be 0 (greedy) or above"),
        (["--prompt", "a", "--temperature", "1e-40"], "temperature is 1e-40: must be 0 (greedy) or above; if above"),
        (["--prompt", "a", "--repetition_penalty", "1e-40"], "repetition_penalty is 1e-40: must be above 0, at least"),
        (["--prompt", "a", "--seed", str(2**64)], f"seed is {2**64}: must be from -2**63 to 2**64 - 1"),
        (["--prompt", "a", "--top_p", "2", "--max_new_tokens", "0"], "2 settings are wrong"),
        (["--prompts_file", "nowhere.txt"], "nowhere.txt"),
        (["--prompt", "a", "--json_schema", "nowhere.json"], "json_schema is 'nowhere.json': there is no such file"),
        (["--prompt", "a", "--regex", "a", "--json_schema", "b"], "regex is 'a': must be left out with json_schema"),
        (
            ["--prompt", "a", "--regex", "(a"],
            "grammar.regex cannot be enforced: regex parse error: (a error: unclosed group",
        ),
        (
            ["--prompt", "a", "--regex", "a", "--num_beams", "2"],
            "regex is 'a': must be left out with num_beams above 1",
        ),
        (["--prompt", "a", "--min_tokens", "300"], "min_tokens is 300: must be within 0 and max_new_tokens"),
        (
            ["--prompt", "a", "--num_beams", "2", "--min_tokens", "3"],
            "min_tokens is 3: must be left out with num_beams",
        ),
        (["--prompt", "a", "--logprobs", "2"], "logprobs is 2: must be given with output"),
        (["--prompt", "a", "--resume", "true"], "resume is True: must be given with output"),
        (["--prompt", "a", "--logit_bias", "{999: 1}"], "logit_bias is [999]: must be token ids within 0 and 255"),
        (["--prompt", "a", "--engine.max_state_bytes", "10"], "max_state_bytes is 10: must be at least"),
        (["--prompt", "a", "--engine.path", "gpu"], "engine.path is 'gpu': must be one of auto, kernels, torch"),
        (["--prompt", "a", "--checkpoint", "best"], "is not a run: leave it out"),
        (["--prompt", "a", "--temprature", "1"], "did you mean temperature?"),
    ],
)
def test_bad_input_gets_status_2_and_says_why(model_folder, capsys, argv, message):
    assert generate(model_folder, *argv) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""


def write_prompts(path, count):
    lines = [{"id": number, "prompt": f"prompt {number}", "seed": number} for number in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_an_interrupted_output_is_gone_on_with_and_ends_as_if_it_had_not_been(model_folder, tmp_path, capsys):
    prompts, output = write_prompts(tmp_path / "prompts.jsonl", 12), tmp_path / "out.jsonl"
    argv = (model_folder, "--prompts_file", prompts, "--output", output, "--max_new_tokens", 10)
    assert generate(*argv) == 0
    whole = output.read_bytes()
    assert [json.loads(line)["id"] for line in whole.splitlines()] == list(range(12))
    for size in (0, 1, len(whole) // 2, len(whole) - 1, len(whole)):
        output.write_bytes(whole[:size])
        assert generate(*argv, "--resume") == 0
        assert output.read_bytes() == whole
    assert "12 of 12 prompts are done" in capsys.readouterr().err
    output.unlink()
    assert generate(*argv, "--resume") == 0  # nothing to go on with yet
    assert output.read_bytes() == whole


@pytest.fixture(scope="module")
def fork_server():
    with ForkServer("bdh.cli.generate", "bdh.cli.models", "bdh.model.network", "bdh.generate.engine") as server:
        yield server


def started(fork_server, argv: list[str], output: Path) -> Forked:
    """A process of ``bdh ARGV`` that has begun to write."""
    process = fork_server.start(argv)
    deadline = time.monotonic() + 120
    while not (output.exists() and output.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    return process


@pytest.mark.slow
def test_a_kill_loses_nothing_that_was_finished(model_folder, tmp_path, fork_server):
    prompts, output = write_prompts(tmp_path / "prompts.jsonl", 300), tmp_path / "out.jsonl"
    flags = ["--prompts_file", str(prompts), "--output", str(output), "--max_new_tokens", "100"]
    argv = ["generate", str(model_folder), *flags]
    process = started(fork_server, argv, output)
    process.kill()
    process.wait(60)
    before = output.read_bytes()
    finished = before[: before.rfind(b"\n") + 1]
    assert 0 < finished.count(b"\n") < 300
    assert generate(*argv[1:], "--resume") == 0
    after = output.read_bytes()
    assert after.startswith(finished)
    assert [json.loads(line)["id"] for line in after.splitlines()] == list(range(300))


@pytest.mark.slow
def test_an_interruption_says_how_to_go_on(model_folder, tmp_path, fork_server):
    prompts, output = write_prompts(tmp_path / "prompts.jsonl", 300), tmp_path / "out.jsonl"
    flags = ["--prompts_file", str(prompts), "--output", str(output), "--max_new_tokens", "200"]
    process = started(fork_server, ["generate", str(model_folder), *flags], output)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert "the same command with --resume continues" in process.said()
    assert output.read_bytes().endswith(b"\n")


def test_settings_of_a_prompt_s_own_are_refused_where_beams_are_searched(model_folder, tmp_path, capsys):
    (prompts := tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "max_tokens": 3}\n')
    assert generate(model_folder, "--prompts_file", prompts, "--num_beams", 2) == 2
    assert "the prompt 'b' has settings of its own: leave them out with num_beams above 1" in capsys.readouterr().err


def test_a_full_disk_under_the_output_is_named(model_folder, tmp_path, monkeypatch, capsys):
    def write(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("bdh.cli.generate.result_lines", write)
    output = tmp_path / "out.jsonl"
    assert generate(model_folder, "--prompt", "abc", "--output", output, "--max_new_tokens", 1) == 2
    assert f"the disk is full, {output} could not be written" in capsys.readouterr().err


def test_results_carry_what_was_asked_for(model_folder, tmp_path):
    output = tmp_path / "out.jsonl"
    flags = ("--max_new_tokens", 3, "--temperature", 0, "--logprobs", 2, "--prompt_logprobs", 0, "--echo", "true")
    assert generate(model_folder, "--prompt", "abc", "--output", output, *flags) == 0
    row = json.loads(output.read_text())
    assert row["text"].startswith("abc")
    assert (row["finish_reason"], row["num_tokens"]) == ("length", 3)
    assert [entry and entry["token"] for entry in row["prompt_logprobs"]] == [None, ord("b"), ord("c")]
    assert [len(entry["top"]) for entry in row["logprobs"]] == [2, 2, 2]
    assert all(entry["token"] == entry["top"][0][0] for entry in row["logprobs"])  # greedy


def test_the_path_taken_is_said(model_folder, capsys):
    assert generate(model_folder, "--prompt", "a", "--max_new_tokens", 2) == 0
    assert "steps by sparse kernels on the cpu" in capsys.readouterr().err
    assert generate(model_folder, "--prompt", "a", "--max_new_tokens", 2, "--engine.path", "torch") == 0
    assert "steps by torch on cpu" in capsys.readouterr().err
    assert generate(model_folder, "--prompt", "a", "--max_new_tokens", 2, "--engine.window", 4) == 0
    assert "a window of 4 tokens" in capsys.readouterr().err


def test_an_existing_output_is_not_overwritten(model_folder, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    output.write_text("precious")
    assert generate(model_folder, "--prompt", "a", "--output", output) == 2
    assert output.read_text() == "precious"


def test_prompts_that_are_not_utf8_or_not_there_are_named(model_folder, tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"abc\xffdef")
    assert generate(model_folder, "--prompts_file", path) == 2
    assert f"{path} is not UTF-8: byte 3 is 0xFF" in capsys.readouterr().err
    path.write_text("\n\n")
    assert generate(model_folder, "--prompts_file", path) == 2
    assert "holds no prompts" in capsys.readouterr().err


def test_what_is_no_model_is_named(tmp_path, capsys):
    assert generate(tmp_path, "--prompt", "a") == 2
    assert f"{tmp_path} holds no model" in capsys.readouterr().err
    assert generate(tmp_path / "nowhere", "--prompt", "a") == 2
    assert "there is no folder" in capsys.readouterr().err
    assert generate("an-org/a-model", "--prompt", "a") == 2
    assert "is neither a local folder nor a model found on the hub" in capsys.readouterr().err


def test_weights_that_are_cut_off_are_named(model_folder, tmp_path, capsys):
    broken = shutil.copytree(model_folder, tmp_path / "broken")
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert generate(broken, "--prompt", "a") == 2
    assert "cut off or damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_layer": "two"}, "the config.json of {} is wrong: Field 'n_layer' expected int, got str (value: 'two')"),
        ({"dropout": None}, "the config.json of {} is wrong: Field 'dropout' with value None"),
        ({"dtype": "float17"}, "the config.json of {} is wrong: module 'torch' has no attribute 'float17'"),
        (
            {"vocab_size": 300},
            "not have the shapes of its config.json: embed.weight is (256, 16), not (300, 16); lm_head",
        ),
        ({"n_embd": 10**9}, "not have the shapes of its config.json: decoder.weight is (16, 128), not (1000000000, "),
        ([1], "the config.json of {} is wrong: "),
    ],
    ids=str,
)
def test_a_configuration_that_is_wrong_gets_one_line_and_status_2(model_folder, tmp_path, capfd, change, message):
    """Some of these were unexpected errors, with status 1 and a table of transformers."""
    broken = shutil.copytree(model_folder, tmp_path / "broken")
    path = broken / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | change if isinstance(change, dict) else change))
    assert generate(broken, "--prompt", "a") == 2
    shown = capfd.readouterr().err
    assert message.format(broken) in shown
    assert len(shown.splitlines()) == 1


def test_weights_that_are_missing_are_named(model_folder, tmp_path, capfd):
    """transformers would fill them in with random numbers."""
    broken = shutil.copytree(model_folder, tmp_path / "broken")
    path = broken / "model.safetensors"
    weights = load_file(path)
    del weights["decoder.weight"], weights["encoder_v.1.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    assert generate(broken, "--prompt", "a") == 2
    expected = f"error: the weights of {broken} are not complete: it lacks decoder.weight, encoder_v.1.weight\n"
    assert capfd.readouterr().err == expected


def test_another_architecture_is_refused(model_folder, tmp_path, capsys):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 8}))
    assert generate(folder, "--prompt", "a") == 2
    assert "is not a BDH model" in capsys.readouterr().err


def test_weights_that_pytorch_refuses_are_named_in_one_line(model_folder, tmp_path, capsys):
    """They ended as an unexpected error, with a page of advice."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"no weights")
    assert main(["generate", str(folder), "--prompt", "a"]) == 2
    shown = capsys.readouterr().err
    assert shown == f"error: the weights of {folder} are damaged, or hold more than tensors: PyTorch refuses them\n"

"""Training on conversations: the model learns to answer, and its export knows how to ask and where to stop."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bdh.cli.main import main
from bdh.data.batches import Batch
from bdh.train.loop import training_step

from .conftest import losses, samples, weights
from .test_run import assert_same_run, opened

ANSWERS = {"red": "A rose.", "blue": "The sky.", "green": "Grass.", "white": "Snow, or milk."}


@pytest.fixture
def chat_file(tmp_path):
    path = tmp_path / "chat.jsonl"
    talks = [
        {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]}
        for ask, answer in ANSWERS.items()
    ]
    path.write_text("".join(json.dumps(talk) + "\n" for talk in talks * 10))
    return path


@pytest.fixture
def train_chat(train, chat_file):
    return lambda folder, *more, **overrides: train(
        folder, *more, **{"data.source": chat_file, "train.sample_prompts": "red", **overrides}
    )


def test_it_learns_to_answer_and_to_stop(train_chat, tmp_path, capsys):
    long = {
        "train.max_steps": 160,
        "train.eval_every_steps": 80,
        "train.sample_every_steps": 160,
        "train.sample_max_new_tokens": 40,
        "model.dropout": 0.0,
        "model.n_embd": 32,
        "checkpoint.every_steps": 160,
    }
    run = tmp_path / "run"
    assert train_chat(run, **long) == 0
    shown = capsys.readouterr().err
    assert "36 conversations (chat) in" in shown
    assert losses(run, "val/loss")[-1] < 0.1
    for ask, answer in ANSWERS.items():
        flags = ["--prompt", ask, "--chat", "--temperature", "0", "--max_new_tokens", "40"]
        assert main(["generate", str(run / "model"), *flags]) == 0
        assert capsys.readouterr().out == f"{answer}\n"
    # By transformers alone.
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id, end]
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "blue"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = model.generate(**asked, do_sample=False, max_new_tokens=40)[0, asked["input_ids"].shape[1] :]
    assert tokenizer.decode(ids) == "The sky.<|end|>"
    # Several at once end at different places, and what stands behind an end is no text.
    results = tmp_path / "results.jsonl"
    asks = tmp_path / "asks.txt"
    asks.write_text("\n".join(ANSWERS))
    flags = ["--prompts_file", str(asks), "--chat", "--temperature", "0", "--output", str(results)]
    assert main(["generate", str(run), *flags]) == 0
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(row["prompt"], row["text"]) for row in rows] == list(ANSWERS.items())
    assert {row["finish_reason"] for row in rows} == {"stop"}
    assert samples(run)[-1]["prompt"] == "red"


def test_a_chat_run_resumes_bit_equal(train_chat, tmp_path):
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    assert train_chat(straight) == 0
    assert train_chat(halves, **{"train.stop_at_step": 5}) == 0
    assert main(["train", "--run_dir", str(halves), "--resume"]) == 0
    assert_same_run(straight, halves)


def test_the_loss_of_a_step_is_the_mean_over_the_assistants_tokens(chat_file, tmp_path, monkeypatch):
    monkeypatch.setenv("BDH_CACHE", str(tmp_path / "cache"))
    run = opened(chat_file, tmp_path / "run", **{"model.dropout": 0.0, "train.gradient_accumulation_steps": 2})
    batch = run.corpus.train_loader(8, run.settings.train.seed).next()
    with torch.no_grad():
        logits = run.model.eval()(batch.input_ids, document_starts=batch.starts, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits[batch.is_target], batch.tokens[:, 1:][batch.is_target])
    training_step(run, run.model, *run.batches.next())
    assert run.guard.read(1)[0].loss == pytest.approx(expected.item(), rel=1e-5)


def test_a_step_in_which_nothing_counts_is_no_nan(chat_file, tmp_path, monkeypatch):
    monkeypatch.setenv("BDH_CACHE", str(tmp_path / "cache"))
    run = opened(chat_file, tmp_path / "run", **{"train.weight_decay": 0.0})
    tokens = torch.zeros(4, 33, dtype=torch.int64)
    training_step(run, run.model, Batch(tokens, is_target=torch.zeros(4, 32, dtype=torch.bool)), 0)
    (result,) = run.guard.read(1)
    assert (result.loss, result.grad_norm, result.updated) == (0.0, 0.0, True)
    assert all(torch.isfinite(weight).all() for weight in run.model.parameters())


def test_a_model_of_text_learns_to_chat(train, train_chat, tmp_path, caplog):
    """Its vocabulary grows by the chat tokens, and its weights go on."""
    assert train(tmp_path / "text") == 0
    quiet = {"train.max_steps": 1, "train.warmup_steps": 1, "train.learning_rate": 1e-9, "train.weight_decay": 0.0}
    assert train_chat(tmp_path / "chat", **{"train.init_from": tmp_path / "text"}, **quiet) == 0
    assert (
        "was trained without the tokens <|system|>, <|user|>, <|assistant|>, <|end|>: they start from random weights"
        in caplog.text
    )
    before, after = weights(tmp_path / "text"), weights(tmp_path / "chat")
    assert after["embed.weight"].shape == (260, 16)
    for name, weight in before.items():
        torch.testing.assert_close(after[name][: len(weight)], weight, atol=2e-9, rtol=1e-6)
    caplog.clear()
    # The next one takes tokenizer and template over as they are.
    assert train_chat(tmp_path / "next", **{"train.init_from": tmp_path / "chat" / "model"}, **quiet) == 0
    assert "was trained without" not in caplog.text
    template = AutoTokenizer.from_pretrained(tmp_path / "chat" / "model").chat_template
    assert AutoTokenizer.from_pretrained(tmp_path / "next" / "model").chat_template == template


def test_a_template_of_ones_own_is_stored_with_the_run_and_the_export(train_chat, tmp_path):
    own = tmp_path / "own.jinja"
    own.write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
        "{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    )
    assert train_chat(tmp_path / "run", **{"tokenizer.chat_template": own}) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert tokenizer.chat_template == own.read_text()
    assert len(tokenizer) == 257
    own.unlink()  # the run keeps its copy
    assert main(["train", "--run_dir", str(tmp_path / "run"), "--resume", "--train.max_steps", "13"]) == 0


def test_eval_measures_the_answers_of_conversations(train_chat, tmp_path, chat_file, capsys):
    assert train_chat(tmp_path / "run", **{"train.eval_windows": 100}) == 0
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), "--data.source", str(chat_file), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["loss"] == pytest.approx(losses(tmp_path / "run", "val/loss")[-1], rel=1e-5)
    assert figures["tokens"] == sum(len(answer) + 1 for answer in ANSWERS.values())
    assert figures["bits_per_byte"] == pytest.approx(
        figures["loss"] / math.log(2) * figures["tokens"] / sum(map(len, ANSWERS.values()))
    )
    assert main(["eval", str(tmp_path / "run"), "--data.source", str(chat_file), "--part", "train"]) == 2
    assert "part is 'train': conversations are measured on their validation part" in capsys.readouterr().err


def test_a_run_and_its_export_are_quantized_and_measured_alike(train_chat, tmp_path):
    """Padding has another id in an export: it counted in the shares of neurons that fire, and gptq calibrated on it."""
    run = tmp_path / "run"
    assert train_chat(run) == 0
    found = []
    for model in (run, run / "model"):
        argv = ["quantize", str(model), str(tmp_path / f"{model.name} int4"), "--weights", "int4", "--method", "gptq"]
        assert main([*argv, "--calibration_tokens", "400"]) == 0
        found.append(json.loads((tmp_path / f"{model.name} int4" / "quantization.json").read_text()))
    for name in ("text", "matrices", "calibration_tokens"):
        assert found[0][name] == found[1][name]
    assert 400 <= found[0]["calibration_tokens"] < 440


def test_settings_that_do_not_go_with_chat_are_refused_and_nothing_written(train_chat, tmp_path, capsys):
    assert train_chat(tmp_path / "run", **{"tokenizer.chat_template": "gone.jinja"}) == 2
    assert "tokenizer.chat_template is 'gone.jinja'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

"""The numbers of a model card are those of the run, whatever the settings asked for."""

import json
import re

import pytest

from bdh.cli.main import main

from .conftest import losses


def card_of(folder):
    return (folder / "README.md").read_text()


def row(card, name):
    return re.search(rf"^\| {re.escape(name)} \| (.*) \|$", card, re.MULTILINE).group(1)


def evaluation(card):
    """Step, windows and predicted tokens."""
    found = re.search(r"After step ([\d,]+), on ([\d,]+) fixed .*; ([\d,]+) tokens", card)
    return tuple(int(number.replace(",", "")) for number in found.groups())


def test_the_windows_are_those_that_were_measured(train, tmp_path):
    """The card said how many were asked for, but the text may have fewer."""
    assert train(tmp_path / "run", **{"train.eval_windows": 1000, "data.val_fraction": 0.02}) == 0
    card = card_of(tmp_path / "run" / "model")
    num_tokens = int(row(card, "validation tokens"))
    num_windows = (num_tokens - 33) // 32 + 1
    assert 1 < num_windows < 1000
    assert evaluation(card) == (12, num_windows, num_windows * 32)


def test_the_step_is_that_of_the_evaluation(train, tmp_path):
    """The weights of step 11 were last measured after step 8."""
    assert train(tmp_path / "run", **{"train.stop_at_step": 11, "train.gradient_accumulation_steps": 2}) == 0
    card = card_of(tmp_path / "run" / "model")
    assert evaluation(card) == (8, 4, 4 * 32)
    assert row(card, "loss, nats per token") == f"{losses(tmp_path / 'run', 'val/loss')[-1]:.4f}"
    assert row(card, "steps") == "11 of 12"
    assert (row(card, "sequences a step"), row(card, "tokens seen")) == ("8", f"{11 * 8 * 32:,}")
    assert main(["train", "--run_dir", str(tmp_path / "run"), "--resume"]) == 0
    card = card_of(tmp_path / "run" / "model")
    assert evaluation(card) == (12, 4, 4 * 32)
    assert (row(card, "steps"), row(card, "tokens seen")) == ("12 of 12", f"{12 * 8 * 32:,}")


def test_documents_apart_have_fewer_tokens_to_predict(train, tmp_path):
    rows = [{"text": f"a document of number {number}"} for number in range(200)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    apart = {"data.source": tmp_path / "t.jsonl", "data.pack": "documents", "tokenizer.special_tokens": True}
    assert train(tmp_path / "run", **apart) == 0
    step, num_windows, num_tokens = evaluation(card_of(tmp_path / "run" / "model"))
    assert (step, num_windows) == (12, 4)
    assert 4 * 28 <= num_tokens < 4 * 32


@pytest.mark.parametrize("is_mixed", [False, True])
def test_conversations_count_answers_and_rows(train, tmp_path, is_mixed):
    talk = {"messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "That one."}]}
    (tmp_path / "chat.jsonl").write_text(40 * (json.dumps(talk) + "\n"))
    source = f"[{{source: {tmp_path / 'chat.jsonl'}}}]" if is_mixed else tmp_path / "chat.jsonl"
    overrides = {"data.mix": source, "data.source": "pydoc"} if is_mixed else {"data.source": source}
    assert train(tmp_path / "run", **overrides, **{"train.sample_prompts": "Which?", "train.eval_windows": 64}) == 0
    card = card_of(tmp_path / "run" / "model")
    num_answer = len("That one.") + 1  # with the token that ends it
    assert evaluation(card) == (12, 4, 4 * num_answer)  # of 4 conversations, one a row
    assert "4 fixed sequences of conversations, of up to 32 tokens" in card
    assert row(card, "tokens seen, padding included") == f"{12 * 4 * 32:,}"
    assert "question(tokenizer" in card
    if not is_mixed:
        assert row(card, "of which are the assistant's and count") == f"{36 * num_answer}"


def test_a_mix_measures_one_window_of_each_source_at_least(train, tmp_path, text_file):
    mix = f"[{{source: {text_file}, weight: 99}}, {{source: pydoc}}]"
    assert train(tmp_path / "run", **{"data.mix": mix, "data.source": "pydoc", "train.eval_windows": 2}) == 0
    assert evaluation(card_of(tmp_path / "run" / "model")) == (12, 3, 3 * 32)


def test_a_stream_keeps_validation_tokens(train, tmp_path):
    assert train(tmp_path / "run", **{"data.source": "pydoc", "data.streaming": True, "data.val_tokens": 100}) == 0
    card = card_of(tmp_path / "run" / "model")
    kept = int(row(card, "validation tokens that were kept").replace(",", ""))
    assert kept >= 100
    assert "| training tokens |" not in card


def test_steps_that_changed_nothing_are_told(train, tmp_path):
    hot = {"train.learning_rate": 1e30, "train.on_nonfinite": "skip", "train.warmup_steps": 0, "train.max_steps": 8}
    hot["train.sample_every_steps"] = 0
    assert train(tmp_path / "run", **hot) == 0
    card = card_of(tmp_path / "run" / "model")
    assert re.fullmatch(r"8 of 8, [1-7] of which did not change the weights", row(card, "steps"))

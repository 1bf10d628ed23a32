"""Training with the state carried from step to step, and with documents told apart."""

import json

import pytest
import torch

from bdh.cli.main import main
from bdh.cli.settings import parse_settings
from bdh.monitor import Monitor, MonitorConfig
from bdh.train.config import RunSettings
from bdh.train.loop import fit, training_step
from bdh.train.setup import open_run

from .conftest import TINY, losses, weights

CARRY = {"train.carry_state": "true", "tokenizer.special_tokens": "true"}


@pytest.fixture
def documents(tmp_path):
    lines = [json.dumps({"text": f"Document {i} says that {i} and {i + 1} are neighbours. " * 3}) for i in range(200)]
    path = tmp_path / "documents.jsonl"
    path.write_text("\n".join(lines))
    return path


def opened(folder, source, **overrides):
    flags = {**TINY, "data.source": source, "run_dir": folder, "data.cache_dir": folder.parent / "cache", **overrides}
    argv = [f"--{name}={value}" for name, value in flags.items()]
    return open_run(parse_settings(RunSettings, argv, prog="p", description="d"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"train.gradient_accumulation_steps": 2, "model.decay": 8},
        {"data.streaming": "true", "data.shuffle_buffer_documents": 20},
        {"train.dtype": "float16", "train.recompute": "pass"},
    ],
    ids=["mapped", "accumulated-decay", "streaming", "float16-checkpointing"],
)
def test_a_run_that_is_stopped_halfway_resumes_bit_equal(train, documents, tmp_path, overrides):
    """60 steps in one go, and 30 and 30 in two processes' worth of state: the same losses and weights."""
    settings = {
        "data.source": documents,
        "train.max_steps": 60,
        "train.eval_every_steps": 20,
        "train.sample_every_steps": 0,
        "checkpoint.every_steps": 30,
        **CARRY,
        **overrides,
    }
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    assert train(straight, **settings) == 0
    assert train(halves, **settings, **{"train.stop_at_step": 30}) == 0
    assert main(["train", "--run_dir", str(halves), "--resume"]) == 0
    assert len(losses(straight)) == 60
    assert losses(straight) == losses(halves)
    assert losses(straight, "val/loss") == losses(halves, "val/loss")
    ours, theirs = weights(straight), weights(halves)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("parts", [1, 2], ids=["one pass", "accumulated"])
def test_a_step_reads_on_where_the_one_before_ended(documents, tmp_path, parts):
    """With a learning rate of nothing, three steps are one text of three blocks read by one model."""
    run = opened(
        tmp_path / "run",
        documents,
        **CARRY,
        **{"train.batch_size": 4 // parts, "train.gradient_accumulation_steps": parts},
        **{"model.dropout": 0.0, "train.learning_rate": 1e-30, "train.weight_decay": 0},
    )
    twin = run.corpus.train_loader(4, run.settings.train.seed, carry_state=True)
    batches = [twin.next() for _ in range(3)]
    run.optimizers.set_learning_rate(0)
    for _ in range(3):
        training_step(run, run.model, *run.batches.next())
    results = run.guard.read(3)

    tokens = torch.cat([batch.input_ids for batch in batches], 1)
    starts = torch.cat([torch.zeros(4, 32, dtype=torch.bool) if b.starts is None else b.starts for b in batches], 1)
    assert starts.any()
    with torch.no_grad():
        output = run.model.eval()(tokens, document_starts=starts, use_cache=True)
    for batch, result, logits in zip(batches, results, output.logits.split(32, 1), strict=True):
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        assert result.loss == pytest.approx(expected.item(), rel=1e-5)  # float32, other order
    stored = run.carried.tensors()
    torch.testing.assert_close(stored["positions"], output.cache.positions)
    for index, sums in enumerate(output.cache.sums):
        torch.testing.assert_close(stored[f"sums.{index}"], sums, rtol=1e-4, atol=1e-4)
    assert not any(tensor.requires_grad for tensor in stored.values())


def test_evaluating_and_sampling_leave_the_carried_state_alone(train, documents, tmp_path):
    settings = {"data.source": documents, **CARRY}
    assert train(tmp_path / "often", **settings, **{"train.eval_every_steps": 1, "train.sample_every_steps": 1}) == 0
    assert train(tmp_path / "seldom", **settings, **{"train.eval_every_steps": 12, "train.sample_every_steps": 0}) == 0
    assert losses(tmp_path / "often") == losses(tmp_path / "seldom")


def test_a_loss_that_is_not_finite_does_not_spoil_the_steps_behind_it(documents, tmp_path):
    """Its state, not finite either, would make every later step so: the rows begin anew."""
    run = opened(tmp_path / "run", documents, **CARRY, **{"train.on_nonfinite": "skip", "train.sample_every_steps": 0})
    calls = []

    def break_once(module, inputs, output):
        calls.append(1)
        return output * float("nan") if len(calls) == 3 else output

    handle = run.model.encoder.register_forward_hook(break_once)  # two passes a step: in the second step
    with Monitor(run.folder, MonitorConfig(backends=["console", "jsonl"]), total_steps=12) as monitor:
        assert fit(run, monitor) == "finished"
    handle.remove()
    assert run.progress.skipped_steps == 1
    assert all(torch.isfinite(tensor).all() for tensor in run.carried.tensors().values())
    assert [loss is not None for loss in losses(run.folder)] == [True, False, *[True] * 10]


def test_the_banner_says_what_the_carried_states_take(train, documents, tmp_path, capsys):
    settings = {"data.source": documents, "train.gradient_accumulation_steps": 2, "train.max_steps": 2}
    assert train(tmp_path / "run", **settings, **CARRY) == 0
    # 2 passes of 128 neurons and width 16, float32, for 8 rows.
    assert "carried on for 8 sequences: 131,072 bytes" in capsys.readouterr().err
    assert train(tmp_path / "plain", **settings) == 0
    assert "carried" not in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"train.carry_state": "false"}, {"data.pack": "documents"}], ids=str)
def test_a_resume_that_reads_the_text_in_another_way_is_refused(train, documents, tmp_path, capsys, change):
    assert train(tmp_path / "run", **{"data.source": documents, "train.stop_at_step": 3, **CARRY}) == 0
    capsys.readouterr()
    assert train(tmp_path / "run", "--resume", **{"data.source": documents, **CARRY, **change}) == 2
    assert f"{next(iter(change))}: " in capsys.readouterr().err


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_run_with_documents_apart_has_the_loss_of_each_document_alone(documents, tmp_path, streaming):
    run = opened(
        tmp_path / "run",
        documents,
        **{"tokenizer.special_tokens": "true", "data.pack": "documents", "data.streaming": streaming},
        **{"model.dropout": 0.0, "train.block_size": 256, "train.batch_size": 2},
    )
    batch = run.corpus.train_loader(2, run.settings.train.seed).next()
    run.optimizers.set_learning_rate(0)
    nats, number = 0.0, 0
    with torch.no_grad():
        for row in batch.tokens:
            for document in torch.tensor_split(row, (row == 258).nonzero()[:, 0] + 1):
                if len(document) > 1:
                    nats += run.model.eval()(document[None], labels=document[None]).loss.item() * (len(document) - 1)
                    number += len(document) - 1
    assert number < 2 * 256  # there are several documents
    training_step(run, run.model, *run.batches.next())
    assert run.guard.read(1)[0].loss == pytest.approx(nats / number, rel=1e-5)  # float32, other order


def test_documents_apart_without_an_end_of_documents_stops_before_anything_is_written(train, tmp_path, capsys):
    assert train(tmp_path / "run", **{"data.pack": "documents"}) == 2
    assert "data.pack is 'documents', but the tokenizer has no <eos>" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_validation_tells_documents_apart_as_the_training_does(documents, tmp_path):
    common = {"tokenizer.special_tokens": "true"}
    for name, overrides, expected in (
        ("plain", {}, None),
        ("documents", {"data.pack": "documents"}, 258),
        ("carried", {"train.carry_state": "true"}, 258),
        ("no-end", {"train.carry_state": "true", "tokenizer.special_tokens": "false"}, None),
    ):
        assert opened(tmp_path / name, documents, **{**common, **overrides}).document_end == expected

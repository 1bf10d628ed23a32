"""The libraries around transformers take the model as they take every other."""

import math

import pytest
import torch


@pytest.fixture
def rows():
    """Eight texts of one phrase, begun at different places: ids (12,) each, which are their own labels."""
    phrase = torch.tensor([5, 9, 2, 7, 30, 11] * 4)
    return [{"input_ids": phrase[i : i + 12], "labels": phrase[i : i + 12]} for i in range(8)]


def test_transformers_trainer_trains_and_evaluates(make_model, rows, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = make_model(initializer_range=0.02)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=5,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=3,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=5,
        logging_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.state.global_step == len(losses) == 5
    assert before == pytest.approx(math.log(61), abs=0.1)  # all tokens alike
    # With two accumulated batches the first logged loss is their mean, not their sum.
    assert losses[0] == pytest.approx(before, abs=0.1)
    assert evaluated[-1] < before - 0.5
    with torch.no_grad():
        batch = torch.stack([row["input_ids"] for row in rows])
        assert evaluated[-1] == pytest.approx(model(batch, labels=batch).loss.item(), abs=1e-5)


def test_peft_trains_adapters_and_generates(make_model, tokens):
    peft = pytest.importorskip("peft")
    base = make_model()
    expected = base.generate(tokens[:1, :6], max_new_tokens=5, do_sample=False, pad_token_id=0)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["encoder", "decoder"], r=2)
    model = peft.get_peft_model(base, config)

    def generated():
        return model.generate(input_ids=tokens[:1, :6], max_new_tokens=5, do_sample=False, pad_token_id=0)

    assert torch.equal(generated(), expected)  # fresh adapters add nothing
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):  # in the first, the one factor of an adapter is 0, and so is the gradient of the other
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        losses.append(loss.item())
        trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        optimizer.step()
    assert sorted({name.split(".")[2] for name in trained}) == ["decoder", "encoder"]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in trained.values())
    assert losses[-1] < losses[0] - 0.1
    assert generated().shape == expected.shape

    merged = model.merge_and_unload()
    changed = [name for name, weight in merged.state_dict().items() if not torch.equal(weight, before[name])]
    assert sorted(changed) == ["decoder.weight", "encoder.weight"]
    mask = torch.ones(1, 6, dtype=torch.int64)
    assert merged.generate(tokens[:1, :6], attention_mask=mask, max_new_tokens=5, pad_token_id=0).shape == (1, 11)

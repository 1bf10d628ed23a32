"""Padded batches in the libraries that make them: what a text gives does not depend on what it is padded with."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from bdh.cli.main import main
from bdh.tokenizer import byte_tokenizer
from tests.model.conftest import FIXTURES, read_golden

TEXTS = ["a", "the longest one of them, by far", "in between"]


@pytest.fixture(params=["converted", "exported", "trained with special tokens", "of an earlier version"])
def folder(request, make_model, byte_model, tmp_path):
    """A model and its tokenizer, as they come out of each place that makes them."""
    from bdh.train.export import export_model

    path = tmp_path / "model"
    if request.param == "converted":
        golden = read_golden(FIXTURES / "tiny.safetensors")
        torch.save({"model": golden.weights, "config": golden.config}, tmp_path / "reference.pt")
        assert main(["convert", str(tmp_path / "reference.pt"), str(path)]) == 0
    elif request.param == "exported":
        export_model(byte_model, byte_tokenizer(), path, "")
    elif request.param == "trained with special tokens":
        export_model(make_model(vocab_size=260), byte_tokenizer(special_tokens=True), path, "")
    else:
        byte_model.save_pretrained(path)
        byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def loaded(folder):
    """The two; of an earlier version with the padding that transformers' error advises."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        with pytest.raises(ValueError, match="pad_token") as refused:
            tokenizer(TEXTS, padding=True)
        assert "tokenizer.add_special_tokens({'pad_token': '[PAD]'})" in str(refused.value)
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return model, tokenizer


def test_each_text_of_a_padded_batch_is_continued_as_alone(loaded):
    model, tokenizer = loaded
    tokenizer.padding_side = "left"
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    batch = model.generate(**tokenizer(TEXTS, padding=True, return_tensors="pt"), **options)
    for text, row in zip(TEXTS, batch, strict=True):
        alone = model.generate(**tokenizer(text, return_tensors="pt"), **options)[0]
        assert row[-8:].tolist()[: len(alone) - len(text)] == alone[len(text) :].tolist()
    texts = model.generate_texts(tokenizer, TEXTS, temperature=0, max_new_tokens=8)
    assert texts == [[model.generate_text(tokenizer, text, temperature=0, max_new_tokens=8)] for text in TEXTS]


def test_the_side_of_exports_is_that_of_generation(folder, request):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if "earlier" not in request.node.name:
        assert tokenizer.padding_side == "left"
        config, generation = (
            json.loads((folder / name).read_text()) for name in ("config.json", "generation_config.json")
        )
        for role in ("pad", "bos", "eos"):
            of_tokenizer = getattr(tokenizer, f"{role}_token_id")
            assert config.get(f"{role}_token_id") == generation.get(f"{role}_token_id") == of_tokenizer


def test_a_pipeline_gives_the_same_in_batches(loaded):
    model, tokenizer = loaded
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 8, "do_sample": False, "return_tensors": True}
    alone, batched = (generate(TEXTS, batch_size=size, **options) for size in (1, 2))
    for (one,), (other,), text in zip(alone, batched, TEXTS, strict=True):
        assert other["generated_token_ids"][-8:] == one["generated_token_ids"][len(text) :]


def test_the_harness_own_model_class_scores_and_generates_in_batches(loaded):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    def asked(kind, *arguments):
        return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]

    model, tokenizer = loaded
    # Without <eos> it needs to be told what a text with nothing before it starts from.
    start = 10 if tokenizer.eos_token is None else None
    one, two = (
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, device="cpu", prefix_token_id=start)
        for size in (1, 2)
    )
    scored = asked("loglikelihood", ("a cat", " sat"), ("the quick brown fox", " jumped"), ("b", " c"))
    scored += asked("loglikelihood", ("", "nothing before it"))
    for alone, batched in zip(one.loglikelihood(scored), two.loglikelihood(scored), strict=True):
        assert batched[0] == pytest.approx(alone[0], abs=1e-3)
        assert batched[1] == alone[1]
    if start is not None:  # it decodes <eos> to stop there
        return
    options = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    prompts = asked("generate_until", *((text, options) for text in TEXTS))
    assert two.generate_until(prompts) == one.generate_until(prompts)


def test_trl_collates_padded_texts_and_ends_them(folder, request):
    """What the trainer for instructions does to texts before a model sees them."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if "earlier" in request.node.name:
        assert tokenizer.eos_token is None
        return
    rows = [{"input_ids": tokenizer(text + tokenizer.eos_token)["input_ids"]} for text in TEXTS]
    assert all(row["input_ids"][-1] == tokenizer.eos_token_id for row in rows)
    batch = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)(rows)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    loss = model(**batch).loss
    by_hand = [
        torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        for ids in (torch.tensor([row["input_ids"]]) for row in rows)
    ]
    assert loss.item() == pytest.approx(torch.cat(by_hand).mean().item(), abs=1e-4)


def test_ids_outside_of_the_vocabulary_are_refused_where_they_are_seen(model):
    ids = torch.tensor([[61, 3, 4]])
    with pytest.raises(ValueError, match="ids from 3 to 61: must be within 0 to 60"):
        model(ids)
    masked = model(ids, attention_mask=torch.tensor([[0, 1, 1]])).logits[:, 1:]
    torch.testing.assert_close(masked, model(ids[:, 1:]).logits)


def test_all_256_bytes_stay_bytes_where_that_is_asked_for(tmp_path):
    golden = read_golden(FIXTURES / "tiny.safetensors")
    torch.save({"model": golden.weights, "config": golden.config}, tmp_path / "reference.pt")
    out = tmp_path / "model"
    assert main(["convert", str(tmp_path / "reference.pt"), str(out), "--pad_and_eos", "false"]) == 0
    assert AutoTokenizer.from_pretrained(out).all_special_ids == []


def test_the_vocabulary_can_be_resized_for_added_tokens(byte_model, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]", "eos_token": "[EOS]"})
    byte_model.resize_token_embeddings(len(tokenizer))
    byte_model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == loaded.lm_head.out_features == 258
    assert loaded(torch.tensor([[257, 256, 65]])).logits.shape == (1, 3, 258)

"""A head that tells texts apart, and vectors of texts, with the libraries that people use for it."""

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, Trainer, TrainingArguments

from bdh import BDHForSequenceClassification, BDHModel
from bdh.tokenizer import byte_tokenizer, with_padding


@pytest.fixture
def classifier(make_model, tmp_path):
    make_model(vocab_size=256, pad_token_id=255).save_pretrained(tmp_path / "language_model")
    torch.manual_seed(0)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "language_model", num_labels=3)
    assert type(loaded) is BDHForSequenceClassification
    return loaded.eval()


def test_it_reads_the_last_token_on_either_side_of_the_padding(classifier):
    rows = [[5, 9, 200, 31], [7, 2]]
    alone = torch.cat([classifier(torch.tensor([row])).logits for row in rows])
    assert alone.shape == (2, 3)
    hidden = classifier.base_model(torch.tensor([rows[0]])).last_hidden_state
    torch.testing.assert_close(alone[:1], classifier.score(hidden[:, -1]))
    right = torch.tensor([rows[0], [*rows[1], 255, 255]])
    left = torch.tensor([rows[0], [255, 255, *rows[1]]])
    torch.testing.assert_close(classifier(right).logits, alone, atol=1e-5, rtol=1e-4)
    for ids in (right, left):
        masked = classifier(ids, attention_mask=(ids != 255).long())
        torch.testing.assert_close(masked.logits, alone, atol=1e-5, rtol=1e-4)
    assert masked.cache is None


@pytest.mark.parametrize(
    ("labels", "problem_type"),
    [
        (torch.tensor([0, 2]), "single_label_classification"),
        (torch.tensor([[0.5, 1, -1], [1, 2, 3]]), "regression"),
        (torch.tensor([[0.0, 1, 1], [1, 0, 0]]), "multi_label_classification"),
    ],
)
def test_its_loss_is_that_of_transformers(classifier, labels, problem_type):
    classifier.config.problem_type = problem_type
    output = classifier(torch.tensor([[1, 2, 3], [4, 5, 6]]), labels=labels)
    expected = {
        "single_label_classification": torch.nn.functional.cross_entropy,
        "regression": torch.nn.functional.mse_loss,
        "multi_label_classification": torch.nn.functional.binary_cross_entropy_with_logits,
    }[problem_type](output.logits, labels)
    torch.testing.assert_close(output.loss, expected)


def test_trainer_fine_tunes_it_and_it_is_saved_and_loaded(classifier, tmp_path):
    tokenizer = with_padding(byte_tokenizer())
    texts = [f"{word} {number}" for number in range(8) for word in ("red", "blue", "green")]
    rows = [{**tokenizer(text), "labels": number % 3} for number, text in enumerate(texts)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        max_steps=25,
        per_device_train_batch_size=6,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(classifier, arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] < 3  # the mean of two accumulated batches, not their sum
    assert losses[-1] < 0.2
    trainer.save_model(tmp_path / "classifier")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    batch = tokenizer(["red 3", "blue 12", "green 1"], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = loaded(**batch).logits
        torch.testing.assert_close(logits, classifier.eval()(**batch).logits)
    assert logits.argmax(1).tolist() == [0, 1, 2]


def test_sentence_transformers_pools_the_backbone(make_model, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    folder = tmp_path / "model"
    make_model(vocab_size=256, pad_token_id=255).save_pretrained(folder)
    with_padding(byte_tokenizer()).save_pretrained(folder)
    words = Transformer(str(folder))
    encoder = SentenceTransformer(modules=[words, Pooling(words.get_embedding_dimension(), "mean")], device="cpu")
    texts = ["a short one", "and one that is a good deal longer than that"]
    found = encoder.encode(texts, convert_to_tensor=True)

    backbone = AutoModel.from_pretrained(folder).eval()
    assert type(backbone) is BDHModel
    with torch.no_grad():
        expected = [backbone(torch.tensor([list(text.encode())])).last_hidden_state.mean(1) for text in texts]
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-4)

    encoder.save(str(tmp_path / "encoder"))
    again = SentenceTransformer(str(tmp_path / "encoder"), device="cpu")
    torch.testing.assert_close(again.encode(texts, convert_to_tensor=True), found)

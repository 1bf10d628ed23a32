from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bdh import BDHConfig, BDHForCausalLM
from bdh.evaluate.probes import ModelReader, Question, measure_recall
from bdh.tokenizer import byte_tokenizer

FILLER = np.frombuffer(b"Of all the things that one may say of filler, few are worth the telling. " * 3, np.uint8)


class BookReader:
    """Knows what it has read: it looks the question up in the last ``memory`` tokens."""

    def __init__(self, memory: int):
        self.memory = memory

    def start(self, num_texts):
        self.rows = [[] for _ in range(num_texts)]
        self.num_read = 0

    def read(self, tokens):
        self.num_read += tokens.numel()
        for row, new in zip(self.rows, tokens.tolist(), strict=True):
            row.extend(new)

    def score(self, questions):
        found = []
        for row, question in zip(self.rows, questions, strict=True):
            known = bytes(question.query + question.value) in bytes(row[-self.memory :])
            found.append(([0.0 if known else -5.0] * len(question.value), known))
        return found


def test_full_recall_and_its_control_are_told_apart():
    for recall in measure_recall(BookReader(10**6), byte_tokenizer(), FILLER, distances=(64, 300), trials=5):
        assert (recall.trials, recall.accuracy, recall.control_accuracy) == (5, 1.0, 0.0)
        assert (recall.log_probability, recall.control_log_probability) == (0.0, -5.0)


def test_a_memory_that_ends_between_two_distances_is_found_out():
    reader = BookReader(300)
    near, far = measure_recall(reader, byte_tokenizer(), FILLER, distances=(290, 250), trials=3, texts_at_once=4)
    assert (near.distance, near.accuracy) == (250, 1.0)
    assert (far.distance, far.accuracy, far.log_probability) == (290, 0.0, -5.0)


def test_the_fact_stands_as_far_away_as_is_said_and_each_text_is_read_once():
    class Noting(BookReader):
        seen: list = []  # noqa: RUF012

        def score(self, questions):
            half = len(questions) // 2
            for row, without, question in zip(self.rows[:half], self.rows[half:], questions, strict=False):
                fact = bytes(question.fact)
                self.seen.append(len(row) - bytes(row).rindex(fact) - len(fact))
                assert len(row) == len(without)
                assert fact not in bytes(without)
                assert bytes(row).replace(fact, b"") in bytes(without) or row != without
            return super().score(questions)

    reader = Noting(10**6)
    measure_recall(reader, byte_tokenizer(), FILLER, distances=(10, 700), trials=2)
    assert reader.seen == [10, 10, 700, 700]
    assert reader.num_read == 2 * 2 * (128 + 700)


@pytest.fixture
def model():
    torch.manual_seed(3)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "mlp_internal_dim_multiplier": 8}
    return BDHForCausalLM(BDHConfig(**sizes, initializer_range=0.3)).eval()


def test_a_models_scores_are_those_of_one_pass_over_the_whole_text(model):
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(256, (3, 1500), generator=generator)
    questions = [Question([], [65, 66], [67, 68, 69]), Question([], [1], [2]), Question([], [7, 8], [9, 10, 11])]
    reader = ModelReader(model)
    reader.start(3)
    for part in text.split([1, 1099, 400], dim=1):
        reader.read(part)
        reader.score(questions)  # asking leaves no trace
    for row, (nats, hit) in enumerate(reader.score(questions)):
        question = questions[row]
        whole = torch.cat([text[row], torch.tensor(question.query + question.value)])[None]
        with torch.no_grad():
            logits = model(whole[:, :-1]).logits[0, -len(question.value) :]
        values = torch.tensor(question.value)
        expected = logits.log_softmax(-1).gather(-1, values[:, None])[:, 0]
        # The text is summed in other chunks than in one piece.
        assert nats == pytest.approx(expected.tolist(), abs=1e-4)
        assert hit == bool((logits.argmax(-1) == values).all())


def test_the_seed_decides(model):
    def measured(seed):
        return measure_recall(ModelReader(model), byte_tokenizer(), FILLER, distances=(64, 128), trials=3, seed=seed)

    assert measured(1) == measured(1)
    assert measured(1) != measured(2)


def test_trials_read_together_or_apart_give_the_same(model):
    kinds = (2, 6)
    apart, together = (
        measure_recall(ModelReader(model), byte_tokenizer(), FILLER, distances=(64,), trials=3, texts_at_once=rows)[0]
        for rows in kinds
    )
    assert apart.log_probability == pytest.approx(together.log_probability, abs=1e-5)
    assert apart.accuracy == together.accuracy


def test_few_rows_are_read_together_where_states_are_large(model):
    reader = ModelReader(model)
    assert reader.texts_that_fit(17) == 16
    assert reader.texts_that_fit(1) == 2
    large = BDHConfig(n_embd=256, n_layer=6, n_head=4, mlp_internal_dim_multiplier=128)
    reader = ModelReader(SimpleNamespace(config=large, new_state=lambda: None))
    assert reader.texts_that_fit(16) == 4  # 201 MB each


@pytest.mark.parametrize("arguments", [{"distances": ()}, {"distances": (0,)}, {"trials": 0}])
def test_what_measures_nothing_is_refused(arguments):
    with pytest.raises(ValueError, match="all at least 1"):
        measure_recall(BookReader(1), byte_tokenizer(), FILLER, **arguments)
    with pytest.raises(ValueError, match="no tokens"):
        measure_recall(BookReader(1), byte_tokenizer(), FILLER[:0])

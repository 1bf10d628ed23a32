import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bdh import BDHConfig, BDHForCausalLM
from bdh.data.batches import Batch, starts_after
from bdh.data.corpus import ValidationPart
from bdh.evaluate.loss import evaluate_parts, evaluate_text, perplexity
from bdh.ops import naive

TOLERANCE = 1e-6  # float32 logits, summed in float64


@pytest.fixture
def model() -> BDHForCausalLM:
    torch.manual_seed(3)
    config = BDHConfig(n_embd=16, n_layer=2, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=32, dropout=0.5)
    return BDHForCausalLM(config)


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(4).integers(0, 32, 203).astype(np.uint8)


def measured(model, batch, *, bytes_per_token=1.0, **how):
    """Of the sequences of one batch."""
    metrics, _ = evaluate_parts(model, [ValidationPart("", batch, bytes_per_token)], **how)
    return metrics


def loss_by_hand(model, tokens, pieces) -> tuple[float, float]:
    """Mean loss and accuracy over (start, first predicted, end) pieces, one plain forward pass each."""
    model.eval()
    nats, hits = [], []
    for start, first, end in pieces:
        ids = torch.from_numpy(tokens[start : end + 1].astype(np.int64))[None]
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits[0]
        targets = ids[0, 1:]
        kept = slice(first - start - 1, None)
        nats += F.cross_entropy(logits, targets, reduction="none")[kept].tolist()
        hits += (logits.argmax(-1) == targets)[kept].tolist()
    return sum(nats) / len(nats), sum(hits) / len(hits)


def test_windows_one_after_the_other_with_a_short_last_one(model, tokens):
    metrics = evaluate_text(model, tokens, bytes_per_token=1.0, block_size=50, max_batch_size=3)
    pieces = [(s, s + 1, min(s + 50, 202)) for s in range(0, 202, 50)]
    loss, accuracy = loss_by_hand(model, tokens, pieces)
    assert metrics.num_tokens == 202
    assert metrics.loss == pytest.approx(loss, abs=TOLERANCE)
    assert metrics.accuracy == pytest.approx(accuracy)


@pytest.mark.parametrize("stride", [1, 7, 20, 49])
def test_a_stride_predicts_every_token_once_with_more_context(model, tokens, stride):
    metrics = evaluate_text(model, tokens, bytes_per_token=1.0, block_size=50, stride=stride)
    pieces, known, start = [], 0, 0
    while known < 202:
        end = min(start + 50, 202)
        pieces.append((start, known + 1, end))
        known, start = end, start + stride
    loss, _ = loss_by_hand(model, tokens, pieces)
    assert metrics.num_tokens == 202
    assert metrics.loss == pytest.approx(loss, abs=TOLERANCE)


def test_a_carried_state_sees_the_whole_text(model, tokens):
    metrics = evaluate_text(model, tokens, bytes_per_token=1.0, block_size=50, carry_state=True)
    loss, _ = loss_by_hand(model, tokens, [(0, 1, 202)])
    # The text is summed in other chunks than in one piece.
    assert metrics.loss == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("length", [2, 3, 50, 51, 52])
def test_lengths_around_one_block(model, tokens, length):
    metrics = evaluate_text(model, tokens[:length], bytes_per_token=1.0, block_size=50)
    assert metrics.num_tokens == length - 1


def test_bits_per_byte_count_the_bytes_of_a_token(model, tokens):
    metrics = evaluate_text(model, tokens, bytes_per_token=2.5, block_size=50)
    assert metrics.bits_per_byte == pytest.approx(metrics.loss / math.log(2) / 2.5)
    assert metrics.perplexity == pytest.approx(math.exp(metrics.loss))
    assert metrics.nats_per_byte == pytest.approx(metrics.loss / 2.5)


def test_the_perplexity_of_a_model_that_has_diverged_is_infinite_and_not_an_error():
    assert perplexity(709.0) == math.exp(709)
    assert perplexity(710.0) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_evaluation_draws_no_random_numbers_and_keeps_the_mode(model, tokens):
    model.train()
    before = torch.get_rng_state()
    windows = torch.from_numpy(tokens[:200].astype(np.int64)).view(4, 50)
    first = measured(model, Batch(windows))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert measured(model, Batch(windows)) == first  # dropout 0.5 is off


def test_the_batch_size_does_not_change_the_result(model, tokens):
    windows = torch.from_numpy(tokens[:200].astype(np.int64)).view(8, 25)
    one, all_at_once = (measured(model, Batch(windows), max_batch_size=n) for n in (1, 8))
    assert one.loss == pytest.approx(all_at_once.loss, abs=TOLERANCE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stride": 0}, "stride is 0: must be within 1 and block_size, 10"),
        ({"stride": 11}, "stride is 11"),
        ({"stride": 5, "carry_state": True}, "with carry_state it must be block_size"),
    ],
)
def test_a_stride_that_fits_nothing_is_refused(model, tokens, arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate_text(model, tokens, bytes_per_token=1.0, block_size=10, **arguments)


def test_a_text_without_anything_to_predict_is_refused(model):
    with pytest.raises(ValueError, match="1 token: at least 2"):
        evaluate_text(model, np.zeros(1, dtype=np.uint8), bytes_per_token=1.0, block_size=10)


def test_loss_by_position_is_the_mean_over_the_windows(model, tokens):
    windows = torch.from_numpy(tokens[:140].astype(np.int64)).view(7, 20)
    metrics = measured(model, Batch(windows), max_batch_size=3)
    with torch.no_grad():
        logits = model.eval()(windows[:, :-1]).logits
    nats = F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")  # (7, 19)
    assert metrics.loss_by_position == pytest.approx(nats.mean(0).tolist(), abs=TOLERANCE)
    octaves = {f"loss_at/{start}": nats[:, start - 1 : 2 * start - 1].mean().item() for start in (1, 2, 4, 8, 16)}
    assert metrics.loss_at() == pytest.approx(octaves, abs=TOLERANCE)


@pytest.mark.parametrize("block_size", [7, 25, 60])
@pytest.mark.parametrize("max_batch_size", [1, 3])
def test_stretches_are_read_through_with_the_state_and_their_loss_is_kept_by_position(
    model, tokens, block_size, max_batch_size
):
    metrics = evaluate_text(
        model,
        tokens,
        bytes_per_token=1.0,
        block_size=block_size,
        carry_state=True,
        stretch_tokens=60,
        max_batch_size=max_batch_size,
    )
    loss, accuracy = loss_by_hand(model, tokens, [(s, s + 1, min(s + 60, 202)) for s in range(0, 202, 60)])
    assert metrics.num_tokens == 202
    assert metrics.loss == pytest.approx(loss, abs=TOLERANCE)
    assert metrics.accuracy == pytest.approx(accuracy)
    assert len(metrics.loss_by_position) == 60
    for position in (0, 21, 22, 59):  # the last stretch has 22 tokens
        pieces = [(s, s + position + 1, s + position + 1) for s in range(0, 202, 60) if s + position < 202]
        assert metrics.loss_by_position[position] == pytest.approx(
            loss_by_hand(model, tokens, pieces)[0], abs=TOLERANCE
        )
    assert metrics.loss_by_block(30) == pytest.approx(
        [np.mean(metrics.loss_by_position[:30]), np.mean(metrics.loss_by_position[30:])]
    )


@pytest.mark.parametrize("how", [{"carry_state": True}, {"carry_state": True, "stretch_tokens": 101}, {}], ids=str)
def test_nothing_is_seen_across_the_end_of_a_document(model, tokens, how):
    """The text is that of its documents, each alone; their first tokens are not predicted."""
    tokens[[30, 41, 50, 101, 120]] = 9  # ends, some of them the last tokens of a block or a stretch
    tokens[[t for t in range(203) if tokens[t] == 9 and t not in (30, 41, 50, 101, 120)]] = 8
    metrics = evaluate_text(model, tokens, bytes_per_token=1.0, block_size=10, document_end=9, **how)
    cuts = {31, 42, 51, 102, 121}
    if "stretch_tokens" in how:
        cuts |= {101}
    if not how:
        cuts |= set(range(0, 202, 10))
    bounds = [0, *sorted(cuts - {0})]
    ends = {31: 30, 42: 41, 51: 50, 102: 101, 121: 120}  # a cut inside a document shares its token with the next piece
    pieces = [(start, start + 1, ends.get(end, end)) for start, end in zip(bounds, [*bounds[1:], 202], strict=True)]
    pieces = [piece for piece in pieces if piece[2] >= piece[1]]
    loss, _ = loss_by_hand(model, tokens, pieces)
    assert metrics.num_tokens == 202 - 5 == sum(end - start for start, _, end in pieces)
    assert metrics.loss == pytest.approx(loss, abs=TOLERANCE)


def test_windows_tell_documents_apart_too(model, tokens):
    windows = torch.from_numpy(np.stack([tokens[:21], tokens[60:81]]).astype(np.int64))
    windows[windows == 9] = 8
    windows[0, 12] = 9
    metrics = measured(model, Batch.of_documents(windows, starts_after(windows, 9)))
    flat = windows.flatten().numpy()
    loss, _ = loss_by_hand(model, flat, [(0, 1, 12), (13, 14, 20), (21, 22, 41)])
    assert metrics.num_tokens == 39
    assert metrics.loss == pytest.approx(loss, abs=TOLERANCE)
    # At the place behind the end only the other window predicts.
    assert metrics.loss_by_position[12] == pytest.approx(loss_by_hand(model, flat, [(21, 34, 34)])[0], abs=TOLERANCE)


def windowed_loss(model, tokens, window, bounds) -> float:
    """Of pieces read from nothing, (start, end), by the banded scores of naive.py."""
    reference = model.to_reference()
    names = ("embed.weight", "encoder", "encoder_v", "decoder", "lm_head")
    weights = naive.Weights(*(reference[name] for name in names))
    nats = []
    for start, end in bounds:
        ids = torch.from_numpy(tokens[start : end + 1].astype(np.int64))
        logits = naive.forward(ids[None, :-1], weights, model.config.n_layer, window=window)[0]
        nats += F.cross_entropy(logits, ids[1:], reduction="none").tolist()
    return sum(nats) / len(nats)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stretch_tokens", [None, 60])
def test_a_window_attends_to_the_last_tokens_only(model, tokens, stretch_tokens, dtype):
    how = {"carry_state": True, "stretch_tokens": stretch_tokens, "window": 12, "max_batch_size": 3}
    paths = []
    metrics = evaluate_text(model.to(dtype), tokens, bytes_per_token=1.0, block_size=50, announce=paths.append, **how)
    bounds = [(start, min(start + (stretch_tokens or 202), 202)) for start in range(0, 202, stretch_tokens or 202)]
    assert metrics.loss == pytest.approx(windowed_loss(model, tokens, 12, bounds), abs=1e-5)
    assert metrics.num_tokens == 202
    assert model.training
    (path,) = paths
    assert ("kernels" if dtype == torch.float32 else "torch") in path
    assert "window of 12 tokens" in path


def test_a_window_ends_where_a_document_starts(model, tokens):
    tokens[tokens == 9] = 8
    tokens[[30, 41, 50, 101, 120]] = 9
    how = {"carry_state": True, "window": 12, "document_end": 9, "max_batch_size": 3}
    metrics = evaluate_text(model, tokens, bytes_per_token=1.0, block_size=10, **how)
    bounds = [(0, 30), (31, 41), (42, 50), (51, 101), (102, 120), (121, 202)]
    assert metrics.num_tokens == 202 - 5
    assert metrics.loss == pytest.approx(windowed_loss(model, tokens, 12, bounds), abs=1e-5)


@pytest.mark.parametrize("how", [{}, {"stretch_tokens": 101}, {"document_end": 9}, {"block_size": 7}], ids=str)
def test_kernels_and_forward_measure_the_same(model, tokens, how):
    arguments = {"bytes_per_token": 1.0, "block_size": 50, "carry_state": True, **how}
    paths = []
    by_kernels = evaluate_text(model, tokens, announce=paths.append, **arguments)
    by_forward = evaluate_text(model.double(), tokens, announce=paths.append, **arguments)
    assert "kernels" in paths[0]
    assert "forward" in paths[1]
    assert by_kernels.num_tokens == by_forward.num_tokens
    assert by_kernels.loss == pytest.approx(by_forward.loss, abs=1e-5)
    assert by_kernels.loss_by_position == pytest.approx(by_forward.loss_by_position, abs=1e-4)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"window": 12}, "window is 12: must be given with carry_state"),
        ({"window": 0, "carry_state": True}, "window is 0: must be a whole number of tokens, at least 1"),
    ],
)
def test_a_window_that_fits_nothing_is_refused(model, tokens, how, message):
    with pytest.raises(ValueError, match=message):
        evaluate_text(model, tokens, bytes_per_token=1.0, block_size=10, **how)


def test_stretches_without_a_state_are_refused(model, tokens):
    with pytest.raises(ValueError, match="stretch_tokens is 20: must be at least 1, and given with carry_state"):
        evaluate_text(model, tokens, bytes_per_token=1.0, block_size=10, stretch_tokens=20)

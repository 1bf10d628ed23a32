"""torch.export, ONNX and torch.compile: one program for every number of texts and tokens, which computes what forward does."""

from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnxruntime
import pytest
import torch
from torch.export import Dim

from bdh import BDHConfig, BDHForCausalLM, SynapticState
from bdh.model.conversion import export_onnx
from bdh.ops.blocks.plan import LayerOptions

CLOSE = {"atol": 2e-5, "rtol": 2e-5}


@pytest.fixture(scope="module")
def small():
    config = {"vocab_size": 61, "n_embd": 24, "n_head": 3, "n_layer": 2, "mlp_internal_dim_multiplier": 6}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BDHForCausalLM(BDHConfig(**config, dropout=0.0, initializer_range=0.1, chunk_size=4))
    return model.eval()


@pytest.fixture(scope="module")
def smallest(small):
    """For what takes the longer the more layer steps there are."""
    model = deepcopy(small)
    model.config.n_layer = 1
    return model


def ids(B: int, T: int) -> torch.Tensor:
    return torch.randint(61, (B, T), generator=torch.Generator().manual_seed(B * 100 + T))


def test_a_plain_call_is_exported_with_its_state(small):
    program = torch.export.export(small, (ids(2, 12),))
    found, expected = program.module()(ids(2, 12)), small(ids(2, 12))
    torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
    assert isinstance(found.cache, SynapticState)
    torch.testing.assert_close(found.cache.sums, expected.cache.sums, **CLOSE)
    assert torch.equal(found.cache.positions, expected.cache.positions)


@pytest.mark.slow
def test_an_exported_program_takes_any_batch_and_length_and_is_saved(small, tmp_path):
    sizes = {0: Dim("batch"), 1: Dim("tokens")}
    program = torch.export.export(small, (), {"input_ids": ids(2, 12)}, dynamic_shapes={"input_ids": sizes})
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for B, T in ((1, 1), (3, 5), (2, 90)):  # forward takes the last in chunks
        found, expected = loaded(input_ids=ids(B, T)), small(ids(B, T))
        torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
        torch.testing.assert_close(found.cache.sums, expected.cache.sums, **CLOSE)
        assert found.cache.num_columns == T


def test_an_exported_step_goes_on_from_a_state_and_leaves_it(small):
    given = small(ids(2, 6)).cache
    before = given.clone()
    batch = Dim("batch")
    of_state = [[{0: batch}] * 2, {0: batch}, Dim.DYNAMIC]
    with torch.no_grad():  # where forward writes to the state
        program = torch.export.export(
            small,
            (),
            {"input_ids": ids(2, 1), "cache": given},
            dynamic_shapes={"input_ids": {0: batch}, "cache": of_state},
        )
    step = program.module()
    found = step(input_ids=ids(2, 1), cache=given)
    torch.testing.assert_close(given.sums, before.sums, atol=0, rtol=0)
    expected = small(ids(2, 1), cache=before)
    torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(found.cache.sums, before.sums, **CLOSE)
    torch.testing.assert_close(
        step(input_ids=ids(2, 1), cache=found.cache).logits,
        small(ids(2, 1), cache=before).logits,
        **CLOSE,
    )


@pytest.fixture(scope="module")
def program(small):
    """PyTorch's, which takes half a minute to make."""
    made, export = [], torch.onnx.export
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.onnx, "export", lambda *args, **others: made.append(export(*args, **others)) or made[0])
        export_onnx(small, Path(folder, "model.onnx"))
    return made[0]


@pytest.fixture
def ready_made(program, monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: program)


@pytest.fixture
def session(small, tmp_path, ready_made):
    export_onnx(small, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    return onnxruntime.InferenceSession(tmp_path / "model.onnx")


@pytest.mark.slow
def test_onnx_reads_a_text_in_pieces_as_forward_reads_it_whole(small, session):
    assert [each.name for each in session.get_inputs()] == ["input_ids", "attention_mask", "positions", "sums"]
    for B, T, cuts in ((1, 30, (0, 29, 30)), (3, 90, (0, 1, 2, 3, 60, 90))):
        tokens, state = ids(B, T), small.new_state(B)
        expected = small(tokens)
        positions, sums = state.positions.numpy(), torch.stack(state.sums).numpy()
        for start, end in pairwise(cuts):
            inputs = {"input_ids": tokens[:, start:end].numpy(), "positions": positions, "sums": sums}
            mask = np.ones((B, end - start), dtype=np.int64)
            logits, positions, sums = session.run(None, {**inputs, "attention_mask": mask})
            torch.testing.assert_close(torch.tensor(logits), expected.logits[:, start:end], **CLOSE)
        torch.testing.assert_close(torch.tensor(sums), torch.stack(expected.cache.sums), **CLOSE)
        assert positions.tolist() == [T] * B


def test_onnx_leaves_padding_out(small, session):
    tokens, mask = ids(2, 9), torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    state = small.new_state(2)
    inputs = {"input_ids": tokens.numpy(), "attention_mask": mask.numpy(), "positions": state.positions.numpy()}
    logits, positions, _ = session.run(None, {**inputs, "sums": torch.stack(state.sums).numpy()})
    torch.testing.assert_close(torch.tensor(logits[1, 4:]), small(tokens[1:, 4:]).logits[0], **CLOSE)
    assert positions.tolist() == [9, 5]


@torch.no_grad()
def test_onnx_is_exact_far_into_a_text(small, session):
    """In float32 a position of 10^8 has lost its phase, and so it has with frequencies in float32."""
    state = small(ids(2, 9)).cache
    state.positions += 10**8
    inputs = {"input_ids": ids(2, 3).numpy(), "attention_mask": np.ones((2, 3), dtype=np.int64)}
    inputs |= {"positions": state.positions.numpy(), "sums": torch.stack(state.sums).numpy()}
    logits, *_ = session.run(None, inputs)
    torch.testing.assert_close(torch.tensor(logits), small(ids(2, 3), cache=state).logits, **CLOSE)


@torch.no_grad()
def test_onnx_of_a_large_model_refers_to_its_weights_by_a_name_that_stays(small, tmp_path, ready_made, monkeypatch):
    """They lay in a hidden file, named for the temporary one."""
    save = torch.onnx.ONNXProgram.save
    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", lambda self, path: save(self, path, external_data=True))
    export_onnx(small, tmp_path / "model.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    state = small.new_state(1)
    inputs = {"input_ids": ids(1, 3).numpy(), "attention_mask": np.ones((1, 3), np.int64)}
    inputs |= {"positions": state.positions.numpy(), "sums": torch.stack(state.sums).numpy()}
    logits, *_ = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, inputs)
    torch.testing.assert_close(torch.tensor(logits), small(ids(1, 3)).logits, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_it_compiles_to_one_graph_with_and_without_a_state(smallest, dynamic):
    torch.compiler.reset()
    small = smallest
    compiled = torch.compile(small, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for T in (12, 7) if dynamic else (12,):
        torch.testing.assert_close(compiled(ids(2, T), use_cache=False).logits, small(ids(2, T)).logits, **CLOSE)
    state = compiled(ids(2, 6), use_cache=True).cache
    expected = small(ids(2, 6)).cache
    for _ in range(2):
        found = compiled(ids(2, 1), cache=state).logits
        torch.testing.assert_close(found, small(ids(2, 1), cache=expected).logits, **CLOSE)
    assert torch.equal(state.positions, expected.positions)


def test_it_compiles_to_one_graph_in_training_by_the_plain_path(smallest):
    torch.compiler.reset()
    model = deepcopy(smallest).train()
    model.layer_options = LayerOptions(path="plain")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(ids(2, 12), labels=ids(2, 12)).loss
    torch.testing.assert_close(loss, model(ids(2, 12), labels=ids(2, 12)).loss)
    loss.backward()
    assert model.encoder.weight.grad.abs().sum() > 0


@pytest.mark.slow
@torch.no_grad()
def test_it_compiles_to_code(smallest):
    """With the compiler that is taken by default, once."""
    torch.compiler.reset()
    compiled = torch.compile(smallest, fullgraph=True)
    torch.testing.assert_close(compiled(ids(2, 12)).logits, smallest(ids(2, 12)).logits, **CLOSE)

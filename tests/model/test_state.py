import pytest
import torch
from safetensors.torch import save_file

from bdh import SynapticState
from bdh.generate.advance import Advancer, StepInput
from bdh.model.state import Columns


@pytest.fixture
def state():
    generator = torch.Generator().manual_seed(0)
    sums = [torch.randn(3, 2, 6, 4, generator=generator) for _ in range(2)]
    return SynapticState(sums, torch.tensor([5, 7, 10**9]), 12)


def assert_equal(a: SynapticState, b: SynapticState) -> None:
    assert len(a.sums) == len(b.sums)
    assert all(torch.equal(x, y) for x, y in zip(a.sums, b.sums, strict=True))
    assert torch.equal(a.positions, b.positions)
    assert a.num_columns == b.num_columns


def test_filter_takes_rows_in_the_given_order_and_more_than_once(state):
    chosen = state.filter([2, 0, 2])
    assert chosen.positions.tolist() == [10**9, 5, 10**9]
    assert all(torch.equal(s, whole[[2, 0, 2]]) for s, whole in zip(chosen.sums, state.sums, strict=True))
    chosen.sums[0].zero_()
    assert state.sums[0].any()


def test_concat_undoes_filter(state):
    assert_equal(SynapticState.concat([state.filter([0]), state.filter(torch.tensor([1, 2]))]), state)


def test_concat_refuses_states_of_different_models_and_none_at_all(state):
    other = SynapticState.zeros((1, 2, 6, 5), 2)
    with pytest.raises(ValueError, match=r"different models cannot be joined.*\(2, 2, 6, 4\).*\(2, 2, 6, 5\)"):
        SynapticState.concat([state, other])
    with pytest.raises(ValueError, match="concat got no states"):
        SynapticState.concat([])


def test_a_clone_shares_no_memory(state):
    clone = state.clone()
    assert_equal(clone, state)
    for tensor in (*clone.sums, clone.positions):
        tensor.zero_()
    assert state.positions.tolist() == [5, 7, 10**9]
    assert all(s.all() for s in state.sums)


def test_a_model_that_goes_on_from_a_clone_leaves_the_original(model, tokens):
    with torch.no_grad():
        original = model(tokens[:, :10], use_cache=True).cache
        kept = original.clone()
        model(tokens[:, 10:11], cache=original.clone())
        assert_equal(original, kept)
        model(tokens[:, 10:11], cache=original)
    assert original.positions.tolist() == [11, 11]
    assert not torch.equal(original.sums[0], kept.sums[0])


def test_a_view_shares_memory_with_its_batch(state):
    view = state.sequence(1)
    assert (view.position, view.batch_size) == (7, 1)
    view.sums[1].fill_(3)
    view.position = 8
    assert state.sums[1][1].eq(3).all()
    assert state.positions.tolist() == [5, 8, 10**9]
    view.clear()
    assert not state.sums[0][1].any()
    assert state.sums[0][0].any()
    with pytest.raises(ValueError, match="the state has 3 sequences: only a single one has a position"):
        _ = state.position
    with pytest.raises(IndexError):
        state.sequence(3)


def test_a_torn_sequence_is_torn_in_its_batch_and_its_neighbours_are_whole(state):
    first, last = state.sequence(0), state.sequence(-1)
    last.is_torn = True
    assert (first.is_torn, last.is_torn, state.is_torn) == (False, True, True)
    for use in (state.clone, last.clone, lambda: state.filter([0]), lambda: first.copy_(last), lambda: last.save("s")):
        with pytest.raises(RuntimeError, match="half-written"):
            use()
    assert first.clone().position == 5
    last.copy_(first)  # overwritten, it is whole again
    assert not state.is_torn
    assert state.positions.tolist() == [5, 7, 5]
    state.is_torn = True
    assert first.is_torn
    state.clear()
    assert not first.is_torn


def test_a_state_is_copied_into_its_like_alone(state):
    kept = state.clone()
    for other in (state.filter([0]), SynapticState(state.sums, state.positions, 12, "sums, scaled")):
        with pytest.raises(ValueError, match="cannot be copied into one"):
            other.copy_(state)
    assert_equal(state, kept)


def test_forward_takes_no_torn_state_and_no_other_kind(model, tokens):
    state = model.new_state(2)
    state.is_torn = True
    with pytest.raises(RuntimeError, match="half-written"):
        model(tokens, cache=state)
    state.clear()
    state.kind = "sums bfloat16"
    with pytest.raises(ValueError, match="of kind 'sums bfloat16': forward reads and writes sums alone"):
        model(tokens, cache=state)


def test_nbytes_counts_sums_and_positions(state):
    assert state.nbytes == 2 * 3 * 2 * 6 * 4 * 4 + 3 * 8


def test_the_size_is_that_which_the_configuration_tells(model, tokens):
    short = model(tokens[:, :2], use_cache=True).cache
    long = model(tokens, use_cache=True).cache
    assert short.nbytes == long.nbytes == 2 * (model.config.state_bytes_per_sequence + 8)


def test_detach_cuts_the_graph_and_keeps_the_numbers(model, tokens):
    attached = model(tokens, use_cache=True).cache
    assert attached.sums[0].requires_grad
    detached = attached.detach()
    assert not any(s.requires_grad for s in detached.sums)
    assert_equal(detached, attached)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_saved_state_comes_back_bit_for_bit(state, dtype, tmp_path):
    state = SynapticState([s.to(dtype) for s in state.sums], state.positions, state.num_columns)
    state.save(tmp_path / "state.safetensors")
    loaded = SynapticState.load(tmp_path / "state.safetensors")
    assert_equal(loaded, state)
    assert loaded.sums[0].dtype == dtype


def test_the_state_of_a_window_is_saved_too(model, tmp_path):
    advancer = Advancer(model, window=5)
    state = advancer.new_state(2)
    advancer.advance([StepInput(state.sequence(0), [1, 2, 3, 4]), StepInput(state.sequence(1), [5])])
    state.save(tmp_path / "state.safetensors")
    loaded = SynapticState.load(tmp_path / "state.safetensors")
    assert (loaded.kind, loaded.positions.tolist()) == ("window:5", [4, 1])
    torch.testing.assert_close(loaded.tensors, state.tensors, rtol=0, atol=0)


def test_a_text_goes_on_from_a_saved_state_as_if_never_stopped(model, tokens, tmp_path):
    with torch.no_grad():
        whole = model(tokens).logits
        model(tokens[:, :13], use_cache=True).cache.save(tmp_path / "s")
        rest = model(tokens[:, 13:], cache=SynapticState.load(tmp_path / "s")).logits
    # The state regroups float32 sums.
    torch.testing.assert_close(rest, whole[:, 13:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_a_cut_off_file_is_refused(state, share, tmp_path):
    path = tmp_path / "state.safetensors"
    state.save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"state\.safetensors is not a complete state file"):
        SynapticState.load(path)


def test_other_files_are_refused(tmp_path):
    save_file({"sums.0": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"weights\.safetensors is not a saved state"):
        SynapticState.load(tmp_path / "weights.safetensors")
    (tmp_path / "text").write_text("To be or not to be, that is the question")
    with pytest.raises(ValueError, match="text is not a complete state file"):
        SynapticState.load(tmp_path / "text")
    with pytest.raises(FileNotFoundError, match=r"there is no state file .*missing"):
        SynapticState.load(tmp_path / "missing")


@pytest.mark.parametrize("sizes", [[21], [9, 12], [5, 1, 1, 1, 13], [9, 1, 1, 1, 1, 1]])
@pytest.mark.parametrize("num_removed", [0, 1, 3])
def test_a_recording_state_takes_columns_back(make_model, tokens, sizes, num_removed):
    model = make_model(decay=5)
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    state = model.new_state(2)
    state.activate_past_recording()
    with torch.no_grad():
        end = 0
        for size in sizes:
            end += size
            model(tokens[:, end - size : end], attention_mask=mask[:, :end], cache=state)
        state.crop(-num_removed)
        kept = model(tokens[:, : end - num_removed], attention_mask=mask[:, : end - num_removed]).cache
    assert state.num_columns == kept.num_columns
    assert torch.equal(state.positions, kept.positions)
    for a, b in zip(state.sums, kept.sums, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # float32, in another order


def test_taking_back_what_is_not_recorded_is_refused(model, tokens):
    state = model(tokens, use_cache=True).cache
    state.crop(0)
    for removed in (-1, 1):
        with pytest.raises(ValueError, match=f"crop got {removed}: must be between -0"):
            state.crop(removed)
    state.activate_past_recording()
    model(tokens[:, :5], cache=state)
    with pytest.raises(ValueError, match="crop got -6: must be between -5"):
        state.crop(-6)
    assert state.num_columns == 26


def test_columns_that_cannot_be_read_again_stay(state):
    """The state was left without any, and could not be told from one that has read nothing."""

    def fail(*_):
        raise MemoryError

    state.activate_past_recording()
    state.remember(Columns(torch.zeros(3, 4, 4), None, None), fail)
    state.num_columns += 4
    state.sums = [sums + 1 for sums in state.sums]
    before = state.clone()
    with pytest.raises(MemoryError):
        state.crop(-2)
    assert_equal(state, before)


def test_the_name_that_transformers_had_for_it_before_is_taken_too(model, tokens):
    state = model(tokens[:, :9], use_cache=True).cache
    with pytest.warns(FutureWarning, match="Use `cache` instead"):
        old = model(tokens[:, 9:], past_key_values=state.clone()).logits
    assert torch.equal(old, model(tokens[:, 9:], cache=state).logits)
    with pytest.warns(FutureWarning, match="Use `cache` instead"):
        prepared = model.prepare_inputs_for_generation(tokens, next_sequence_length=1, past_key_values=state)
    assert prepared["cache"] is state
    output = model(tokens, use_cache=True)
    assert output.past_key_values is output.cache is output["past_key_values"] is not None

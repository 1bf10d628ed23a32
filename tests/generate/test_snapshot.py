"""Snapshots: a sequence goes on from one exactly as if it had never stopped, and from no other model's."""

import json
import math
import resource
from decimal import Decimal, getcontext

import pytest
import torch
from safetensors.torch import load_file, save_file

from bdh.generate.advance import Advancer, StepInput
from bdh.generate.snapshot import Snapshot
from bdh.model.fingerprint import fingerprint
from bdh.model.state import SynapticState
from bdh.ops.attention import turns_per_token
from bdh.storage import DiskFullError


def random_tokens(count, seed=0, vocabulary=61):
    return torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture
def snapshot(model):
    """After 10 tokens of which the state has read 9."""
    tokens = random_tokens(10)
    advancer = Advancer(model)
    state = advancer.new_state()
    (logits,) = advancer.advance([StepInput(state, tokens[:9])])
    return Snapshot(
        state=state,
        tokens=tokens,
        logits=logits,
        generator_state=torch.Generator().manual_seed(3).get_state(),
        num_prompt_tokens=7,
        pending=tokens[9:],
        decoder={"window": [1, 2], "pending": 'é\ufffd "checksum":"', "stopped": False},
        notes={"messages": [{"role": "user", "content": "Grüße"}]},
    )


def assert_equal(a: Snapshot, b: Snapshot) -> None:
    assert a.state.kind == b.state.kind
    assert a.state.position == b.state.position
    torch.testing.assert_close(a.state.tensors, b.state.tensors, rtol=0, atol=0)
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(a.generator_state, b.generator_state)
    for name in ("tokens", "num_prompt_tokens", "pending", "decoder", "notes"):
        assert getattr(a, name) == getattr(b, name)


def sampled(model, snapshot: Snapshot, count: int) -> list[int]:
    """Further tokens, drawn with the snapshot's generator."""
    advancer, generator = Advancer(model), torch.Generator()
    generator.set_state(snapshot.generator_state)
    state, pending, tokens = snapshot.state.clone(), snapshot.pending, []
    for _ in range(count):
        (logits,) = advancer.advance([StepInput(state, pending)])
        pending = torch.multinomial(logits.softmax(-1), 1, generator=generator).tolist()
        tokens += pending
    return tokens


def test_what_was_saved_comes_back_bit_for_bit_and_goes_on_alike(model, snapshot, tmp_path):
    snapshot.save(tmp_path / "s", model)
    loaded = Snapshot.load(tmp_path / "s", model)
    assert_equal(loaded, snapshot)
    assert sampled(model, loaded, 20) == sampled(model, snapshot, 20)


def test_a_sequence_that_has_read_nothing_and_draws_nothing_can_be_saved(model, tmp_path):
    Snapshot(Advancer(model).new_state(), [], None).save(tmp_path / "s", model)
    loaded = Snapshot.load(tmp_path / "s", model)
    assert (loaded.tokens, loaded.logits, loaded.generator_state, loaded.state.position) == ([], None, None, 0)


def test_a_state_that_is_a_part_of_other_memory_is_stored_alone(model, snapshot, tmp_path):
    pool = SynapticState.concat([snapshot.state.filter([0, 0]), snapshot.state, snapshot.state.filter([0])])
    snapshot.save(tmp_path / "alone", model)
    expected = snapshot.clone()
    snapshot.state = pool.sequence(2)
    snapshot.save(tmp_path / "part", model)
    assert_equal(Snapshot.load(tmp_path / "part", model), expected)
    assert (tmp_path / "part").stat().st_size == (tmp_path / "alone").stat().st_size


def test_a_clone_shares_nothing(snapshot):
    clone = snapshot.clone()
    assert_equal(clone, snapshot)
    assert clone.nbytes == snapshot.nbytes
    for tensor in (*clone.state.sums, clone.logits, clone.generator_state):
        tensor.zero_()
    clone.tokens.append(1)
    clone.pending.clear()
    clone.decoder["window"].append(3)
    clone.notes["messages"][0]["content"] = "?"
    assert all(t.any() for t in (*snapshot.state.sums, snapshot.logits, snapshot.generator_state))
    assert (len(snapshot.tokens), len(snapshot.pending), snapshot.decoder["window"]) == (10, 1, [1, 2])
    assert snapshot.notes == {"messages": [{"role": "user", "content": "Grüße"}]}


def test_the_file_may_go_when_it_has_been_read(model, snapshot, tmp_path):
    """What safetensors gives are parts of the mapped file."""
    path = tmp_path / "s"
    snapshot.save(path, model)
    loaded = Snapshot.load(path, model)
    path.write_bytes(bytes(path.stat().st_size))
    assert_equal(loaded, snapshot)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"seed": 1}, "the same configuration with other weights"),
        ({"n_layer": 2}, "another configuration: n_layer is 3 there and 2 here"),
        ({"rope_theta": 10_000.0}, "another configuration: rope_theta is 65536.0 there and 10000.0 here"),
    ],
)
def test_a_snapshot_of_another_model_is_refused(model, make_model, snapshot, tmp_path, fields, told):
    model.config.name_or_path = "somewhere/dragon"
    snapshot.save(tmp_path / "s", model)
    other = make_model(**fields)
    with pytest.raises(ValueError, match="s is a snapshot of another model, 'dragon' \\(fingerprint") as caught:
        Snapshot.load(tmp_path / "s", other)
    assert told in str(caught.value)
    assert fingerprint(model)[:12] in str(caught.value)
    assert fingerprint(other)[:12] in str(caught.value)


def test_the_same_model_from_another_folder_takes_it(model, make_model, snapshot, tmp_path):
    snapshot.save(tmp_path / "s", model)
    assert_equal(Snapshot.load(tmp_path / "s", make_model(chunk_size=5)), snapshot)


@pytest.mark.parametrize("share", [0, 0.001, 0.01, 0.5, 0.999])
def test_a_cut_off_file_is_refused(model, snapshot, share, tmp_path):
    path = tmp_path / "s"
    snapshot.save(path, model)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match="s is not a complete snapshot file"):
        Snapshot.load(path, model)


def test_every_altered_byte_is_found(model, snapshot, tmp_path):
    """All of the header, and places all over the tensors: by other bits, and by a blank, which JSON overlooks."""
    path = tmp_path / "s"
    snapshot.save(path, model)
    content = path.read_bytes()
    header_end = 8 + int.from_bytes(content[:8], "little")
    places = [*range(header_end), *range(header_end, len(content), 997), len(content) - 1]
    for place in places:
        new = {content[place] ^ 1, content[place] ^ 0x80, 0x09} - {content[place]}
        altered = bytearray(content)
        altered[place] = sorted(new)[place % len(new)]
        path.write_bytes(altered)
        with pytest.raises(ValueError, match=r"altered|not a complete snapshot|not a snapshot"):
            Snapshot.load(path, model)
    path.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="s is not a complete snapshot file"):
        Snapshot.load(path, model)


def test_other_files_are_refused(model, tmp_path):
    save_file({"tokens": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="weights is not a snapshot that this version reads: its format is None"):
        Snapshot.load(tmp_path / "weights", model)
    (tmp_path / "text").write_text("To be or not to be, that is the question")
    with pytest.raises(ValueError, match="text is not a complete snapshot file"):
        Snapshot.load(tmp_path / "text", model)
    with pytest.raises(FileNotFoundError, match="there is no snapshot file"):
        Snapshot.load(tmp_path / "missing", model)
    with pytest.raises(FileNotFoundError, match="is a folder, not a snapshot file"):
        Snapshot.load(tmp_path, model)


def test_a_later_format_is_refused(model, snapshot, tmp_path):
    snapshot.save(tmp_path / "s", model)
    save_file(load_file(tmp_path / "s"), tmp_path / "later", metadata={"format": "bdh-snapshot-9", "facts": "{}"})
    with pytest.raises(ValueError, match="its format is 'bdh-snapshot-9', not 'bdh-snapshot-1'"):
        Snapshot.load(tmp_path / "later", model)


def test_a_folder_that_is_not_there_is_named(model, snapshot, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere for the snapshot s"):
        snapshot.save(tmp_path / "nowhere" / "s", model)


def test_a_full_disk_leaves_the_earlier_file(model, snapshot, tmp_path):
    """A limit on the size of files stands for it; Python ignores the signal that comes with it."""
    path = tmp_path / "s"
    snapshot.save(path, model)
    earlier = path.read_bytes()
    snapshot.tokens.append(1)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(earlier) // 2, old[1]))
    try:
        with pytest.raises(DiskFullError, match="the disk is full"):
            snapshot.save(path, model)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert path.read_bytes() == earlier
    assert [each.name for each in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("position", [10**9 - 1, 10**9, 2**31 + 5, 2**53 + 1])
def test_a_position_is_kept_exactly(model, snapshot, position, tmp_path):
    snapshot.state.position = position
    snapshot.save(tmp_path / "s", model)
    assert Snapshot.load(tmp_path / "s", model).state.position == position


@pytest.mark.parametrize("shift", [10**6, 10**9 - 20, 10**9])
def test_only_differences_of_positions_matter_up_to_a_billion(make_model, shift):
    """A text that begins at position 10^9 gives the logits of one that begins at 0.

    A frequency has 53 bits, so a phase is off by at most shift * 2^-53 of its turns, 1.1e-7 of a turn or 7e-7 rad
    (and half as much where a turn's fraction was rounded). These move logits of size 1 by a few times as much,
    through three passes; a phase in float32 would be off by whole turns.
    """
    model = make_model().double()
    tokens = random_tokens(23)
    (near, near_state), (far, far_state) = (read_from(model, tokens, position) for position in (0, shift))
    torch.testing.assert_close(far, near, rtol=0, atol=2e-5)
    turned = zip(near_state.sums, far_state.sums, strict=True)
    assert not all(torch.allclose(a, b) for a, b in turned)  # the position did reach the rotation


@pytest.mark.parametrize("position", [10**9, 10**9 + 1])
def test_a_token_at_a_billion_is_turned_by_the_exact_angle(model, position):
    """The neurons' keys, which the state after one token holds, against angles in 60 decimal digits."""
    model = model.double()
    advancer = Advancer(model, path="torch")
    state, start = advancer.new_state(), advancer.new_state()
    state.position = position
    advancer.advance([StepInput(start, [5])])
    advancer.advance([StepInput(state, [5])])
    getcontext().prec = 60
    N = model.config.neurons_per_head
    angles = []
    for frequency in turns_per_token(N, model.config.rope_theta).tolist():
        turns = Decimal(frequency) * position
        angles.append(2 * math.pi * float(turns - int(turns)))
    turn = torch.polar(torch.ones(N // 2, dtype=torch.float64), torch.tensor(angles, dtype=torch.float64))
    unturned = torch.view_as_complex(torch.cat(start.sums).unflatten(2, (-1, 2)).movedim(3, -1).contiguous())
    turned = torch.view_as_complex(torch.cat(state.sums).unflatten(2, (-1, 2)).movedim(3, -1).contiguous())
    # Half an ulp of 1.6e8 turns, the fastest pair's at this position, is 1.5e-8 of a turn: 1e-7 rad.
    torch.testing.assert_close(turned, unturned * turn[:, None], rtol=2e-7, atol=1e-12)


def read_from(model, tokens, position):
    advancer = Advancer(model)
    state = advancer.new_state()
    state.position = position
    pieces = [tokens[:9], *([token] for token in tokens[9:])]
    logits = torch.cat([advancer.advance([StepInput(state, piece, "all")])[0] for piece in pieces])
    assert state.position == position + len(tokens)
    return logits, state


def test_the_facts_of_a_file_are_plain_to_read(model, snapshot, tmp_path):
    snapshot.save(tmp_path / "s", model)
    content = (tmp_path / "s").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    facts = json.loads(header["__metadata__"]["facts"])
    assert facts["position"] == 9
    assert facts["model"]["configuration"]["n_embd"] == 24

import json

import pytest
import torch

from bdh.generate.advance import Advancer, StepInput
from bdh.generate.snapshot import Snapshot
from bdh.serve.config import StateSettings
from bdh.serve.states import StateStore
from tests.serve.conftest import made_model


@pytest.fixture(scope="module")
def advancer():
    return Advancer(made_model(256))


@pytest.fixture
def snapshot(advancer):
    def make(text: str = "abc") -> Snapshot:
        state = advancer.new_state()
        (logits,) = advancer.advance([StepInput(state, list(text.encode()))])
        return Snapshot(state, list(text.encode()), logits)

    return make


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def make_store(advancer, clock, tmp_path):
    def make(on_disk: bool = False, **settings) -> StateStore:
        folder = str(tmp_path / "states") if on_disk else None
        return StateStore(StateSettings(folder=folder, **settings), advancer.model, clock)

    return make


def test_a_state_is_its_owners(make_store, snapshot):
    store = make_store()
    saved = store.put(snapshot(), owner="ann", model="m")
    assert store.snapshot(saved.id, "ann").tokens == [97, 98, 99]
    for use in (store.get, store.snapshot, store.delete):
        with pytest.raises(KeyError):
            use(saved.id, "bob")
    store.delete(saved.id, "ann")
    with pytest.raises(KeyError):
        store.get(saved.id, "ann")


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_nobody_uses_is_forgotten(make_store, snapshot, clock, on_disk):
    store = make_store(on_disk, ttl=100)
    old, used = (store.put(snapshot(), owner="ann", model="m") for _ in range(2))
    clock.now += 99
    store.get(used.id, "ann")
    clock.now += 2
    assert [each.id for each in store.of_owner("ann")] == [used.id]
    with pytest.raises(KeyError):
        store.snapshot(old.id, "ann")


def test_the_disk_keeps_what_the_memory_does_not(make_store, snapshot, advancer, tmp_path):
    size = snapshot().nbytes
    store = make_store(True, max_bytes=size, folder_bytes=3 * size)
    saved = [store.put(snapshot(text), owner="ann", model="m") for text in ("one", "two", "three")]
    assert store.bytes_in_memory == size
    found = store.snapshot(saved[0].id, "ann")
    assert found.tokens == list(b"one")
    torch.testing.assert_close(found.state.tensors, snapshot("one").state.tensors, rtol=0, atol=0)
    store.put(snapshot("four"), owner="ann", model="m")  # "two" is the least recently used
    left = make_store(True)
    assert sorted(bytes(left.snapshot(each.id, "ann").tokens) for each in left.of_owner("ann")) == [
        b"four",
        b"one",
        b"three",
    ]
    assert len(list((tmp_path / "states").iterdir())) == 6


def test_another_process_knows_when_a_state_was_used(make_store, snapshot, clock):
    store = make_store(True, ttl=100)
    saved = store.put(snapshot(), owner="ann", model="m")
    clock.now += 80
    store.get(saved.id, "ann")
    clock.now += 80
    assert make_store(True, ttl=100).get(saved.id, "ann").id == saved.id
    clock.now += 101
    with pytest.raises(KeyError):
        make_store(True, ttl=100).get(saved.id, "ann")


def test_what_is_damaged_is_left_out_or_told(make_store, snapshot, tmp_path):
    store = make_store(True)
    kept, cut, altered = (store.put(snapshot(), owner="ann", model="m") for _ in range(3))
    folder = tmp_path / "states"
    (folder / f"{cut.id}.json").write_text('{"id": ')
    (folder / "state-elsewhere.json").write_text(json.dumps({"id": "../secret"}))
    data = bytearray((folder / f"{altered.id}.safetensors").read_bytes())
    data[-5] ^= 1
    (folder / f"{altered.id}.safetensors").write_bytes(data)
    (folder / "state-half.safetensors").write_bytes(b"of a process that died")
    again = make_store(True)
    assert {each.id for each in again.of_owner("ann")} == {kept.id, altered.id}
    assert again.snapshot(kept.id, "ann").tokens == [97, 98, 99]
    with pytest.raises(ValueError, match="has been altered"):
        again.snapshot(altered.id, "ann")
    assert not (folder / "state-half.safetensors").exists()


def test_states_of_another_model_are_refused(make_store, snapshot, tmp_path):
    saved = make_store(True).put(snapshot(), owner="ann", model="m")
    other = StateStore(StateSettings(folder=str(tmp_path / "states")), made_model(256, seed=1), lambda: 1000.0)
    with pytest.raises(ValueError, match="another model"):
        other.snapshot(saved.id, "ann")


def test_states_of_another_tokenizer_are_refused(make_store, snapshot, advancer, clock, tmp_path):
    """The same weights went on from tokens that meant other text."""

    def store(tokenizer):
        settings = StateSettings(folder=str(tmp_path / "states"))
        return StateStore(settings, advancer.model, clock, tokenizer=tokenizer)

    before = make_store(True).put(snapshot(), owner="ann", model="m")  # by a version that did not record it
    saved = store("a").put(snapshot(), owner="ann", model="m")
    with pytest.raises(ValueError, match=f"{saved.id} was saved with another tokenizer"):
        store("b").snapshot(saved.id, "ann")
    for each in (before, saved):
        assert store("a").snapshot(each.id, "ann").tokens == [97, 98, 99]


def test_responses_on_the_disk_make_room_for_states_and_keep_their_text(make_store, snapshot, tmp_path):
    size = snapshot().nbytes
    store = make_store(True, folder_bytes=int(2.5 * size))
    named = store.put(snapshot("named"), owner="ann", model="m")
    ids = [f"resp_{number:032x}" for number in range(3)]
    for number, each in enumerate(ids):
        assert store.put_response(each, {"number": number}, snapshot(), owner="ann", model="m")
    assert {each.id for each in store.of_owner("ann")} == {ids[2], named.id}
    store.put(snapshot("another"), owner="ann", model="m")
    again = make_store(True, folder_bytes=int(2.5 * size))
    assert [again.get(each, "ann").response for each in ids] == [{"number": number} for number in range(3)]
    assert again.snapshot(named.id, "ann").tokens == list(b"named")
    with pytest.raises(KeyError):
        again.snapshot(ids[2], "ann")
    assert len(list((tmp_path / "states").glob("*.safetensors"))) == 2


def test_files_of_states_and_responses_are_for_nobody_else(make_store, snapshot, tmp_path):
    store = make_store(True)
    store.put(snapshot(), owner="ann", model="m", text="a secret")
    store.put_response(f"resp_{0:032x}", {"text": "a secret"}, snapshot(), owner="ann", model="m")
    files = [path for path in (tmp_path / "states").iterdir() if path.suffix in (".json", ".safetensors")]
    assert {(len(files), path.stat().st_mode & 0o077) for path in files} == {(4, 0)}


def test_one_larger_than_all_that_may_be_kept_is_refused(make_store, snapshot):
    for store in (make_store(max_bytes=10), make_store(True, folder_bytes=10)):
        with pytest.raises(ValueError, match="all saved states together must have at most 10"):
            store.put(snapshot(), owner="ann", model="m")
        assert store.num_states == 0

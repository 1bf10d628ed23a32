"""Conversations: nothing is read twice, and what was said is what the template makes of it, whatever happens."""

from itertools import chain

import pytest
import torch

from bdh.generate.advance import Advancer, StepInput
from bdh.generate.chat import Conversation
from bdh.generate.engine import Engine
from bdh.generate.params import SamplingParams
from bdh.generate.snapshot import Snapshot
from bdh.tokenizer import byte_tokenizer, train_tokenizer, with_chat_template
from bdh.tokenizer.chat import ChatEncoder

SYSTEM, USER, ASSISTANT, END = 256, 257, 258, 259


@pytest.fixture
def chat_bytes():
    return with_chat_template(byte_tokenizer(), "default", needs_one=True)


@pytest.fixture
def advancer(make_model, request):
    return Advancer(make_model(vocab_size=260), path=getattr(request, "param", "torch"))


# For a mark: with torch's operations, and with whatever is fastest here.
ON_EVERY_PATH = pytest.mark.parametrize("advancer", ["torch", "auto"], indirect=True)


def conversation_of(advancer, tokenizer, params=None, **settings) -> Conversation:
    return Conversation(Engine(advancer.model, tokenizer, advancer=advancer), params, **settings)


@pytest.fixture
def talk(advancer, chat_bytes):
    """Makes conversations with one model."""

    def make(seed=1, tokenizer=chat_bytes, **settings) -> Conversation:
        names = {"max_tokens", "temperature", "top_k", "top_p", "stop", "repetition_penalty"}
        options = {"max_tokens": 8, **{name: settings.pop(name) for name in names & settings.keys()}}
        return conversation_of(advancer, tokenizer, SamplingParams(seed=seed, **options), **settings)

    return make


@pytest.fixture
def write(byte_model):
    """Makes texts that a model of bytes continues."""

    def make(seed=1, max_tokens=8, stop=(), **settings) -> Conversation:
        options = SamplingParams(seed=seed, max_tokens=max_tokens, stop=list(stop))
        return conversation_of(Advancer(byte_model, path="torch"), byte_tokenizer(), options, **settings)

    return make


def said(conversation: Conversation, text: str) -> str:
    return "".join(conversation.say(text))


def tokens_of(conversation: Conversation) -> list[int]:
    return conversation._now.snapshot.tokens


def spans_of(conversation: Conversation) -> list[list[int]]:
    return conversation._now.spans


def assert_same_place(a: Conversation, b: Conversation) -> None:
    """To the bit."""
    one, two = a._now.snapshot, b._now.snapshot
    assert (one.tokens, one.pending, one.state.position) == (two.tokens, two.pending, two.state.position)
    torch.testing.assert_close(one.state.tensors, two.state.tensors, rtol=0, atol=0)
    assert torch.equal(one.logits, two.logits)
    assert torch.equal(a._generator.get_state(), b._generator.get_state())
    assert (a.messages, a.system, a._now.lengths) == (b.messages, b.system, b._now.lengths)


@ON_EVERY_PATH
def test_the_state_reads_what_the_template_gives_and_nothing_twice(talk):
    conversation = talk(system="Be brief.")
    replies = [said(conversation, text) for text in ("Hi", "1+1", "<|end|>")]
    spans = spans_of(conversation)
    assert spans[::2] == [
        [SYSTEM, *b"Be brief.", END, USER, *b"Hi", END, ASSISTANT],
        [END, USER, *b"1+1", END, ASSISTANT],
        [END, USER, *b"<|end|>", END, ASSISTANT],  # spelt by the user, so it is text
    ]
    assert [len(span) for span in spans[1::2]] == [8, 8, 8]
    assert [m["content"] for m in conversation.messages] == ["Hi", replies[0], "1+1", replies[1], "<|end|>", replies[2]]
    assert list(chain.from_iterable(spans)) == tokens_of(conversation)
    # All but the last token, which nothing has followed; those that were written are read as they are fed back.
    assert conversation.position == len(tokens_of(conversation)) - 1
    assert conversation.stats.tokens_read == sum(map(len, spans[::2])) + 2  # the last written ones of two replies
    fresh = conversation.engine.advancer.new_state()
    (logits,) = conversation.engine.advancer.advance([StepInput(fresh, tokens_of(conversation)[:-1])])
    # float32 sums in another grouping
    torch.testing.assert_close(conversation._now.snapshot.logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
def test_with_other_tokenizers_the_messages_give_the_same_template_tokens(make_model, kind):
    tokenizer = with_chat_template(
        train_tokenizer(["Be brief. Hi Yes 1+1 2 é"] * 50, kind, 270), "default", needs_one=True
    )
    advancer = Advancer(make_model(vocab_size=len(tokenizer)), path="torch")
    notices = []
    conversation = conversation_of(advancer, tokenizer, SamplingParams(max_tokens=6, seed=1), notify=notices.append)
    for text in ("Hi", "1+1 Yes", "Be brief."):
        said(conversation, text)
    encoder = ChatEncoder(tokenizer)
    canonical = conversation._template_spans(encoder, [*conversation.messages, {"role": "user", "content": "é"}])
    given = [token for span in canonical for token in span]
    assert given == encoder.prompt([*conversation.messages, {"role": "user", "content": "é"}])
    assert canonical[:-1:2] == spans_of(conversation)[::2]
    assert notices == []


def test_the_token_that_ends_an_answer_is_read_with_the_next_message(talk, advancer):
    conversation = talk(temperature=0)
    text = said(conversation, "Hi")
    third = spans_of(conversation)[1][2]
    assert third not in spans_of(conversation)[1][:2]
    advancer.model.generation_config.eos_token_id = third
    ended = talk(temperature=0)
    assert text.startswith(said(ended, "Hi"))
    assert spans_of(ended)[1] == spans_of(conversation)[1][:2]
    assert ended._now.snapshot.pending == []
    said(ended, "1")
    assert spans_of(ended)[2] == [END, USER, *b"1", END, ASSISTANT]


@ON_EVERY_PATH
@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("plain", [False, True])
def test_a_saved_conversation_goes_on_as_if_it_had_never_stopped(talk, tmp_path, plain, temperature):
    going = talk(temperature=temperature, plain=plain, system="Be brief.")
    for text in ("Hi", "and then?"):
        said(going, text)
    going.save(tmp_path / "talk")
    restored = talk(seed=2, temperature=temperature, plain=plain)
    said(restored, "something else")
    restored.load(tmp_path / "talk")
    assert_same_place(restored, going)
    for text in ("on", "", "and on"):
        assert said(restored, text) == said(going, text)
        assert_same_place(restored, going)


def test_a_conversation_of_nothing_is_saved_with_its_generator(talk, tmp_path):
    going = talk(seed=None)
    going.save(tmp_path / "talk")
    restored = talk(seed=None)
    restored.load(tmp_path / "talk")
    assert said(restored, "Hi") == said(going, "Hi")


@ON_EVERY_PATH
def test_undo_goes_back_turn_by_turn_to_the_bit(talk, tmp_path):
    conversation, other = talk(), talk()
    said(conversation, "Hi")
    said(other, "Hi")
    said(conversation, "1+1")
    reply = conversation.messages[-1]["content"]
    assert conversation.undo() == [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": reply}]
    assert_same_place(conversation, other)
    assert said(conversation, "1+1") == reply
    conversation.undo()
    conversation.undo()
    assert (conversation.messages, conversation.position, conversation.num_undoable) == ([], 0, 0)
    assert said(conversation, "Hi") == other.messages[1]["content"]
    conversation.reset()
    with pytest.raises(ValueError, match="there is no turn to undo"):
        conversation.undo()


def test_without_a_seed_the_same_message_gets_another_reply_after_undo(talk):
    conversation = talk(seed=None, max_tokens=30)
    reply = said(conversation, "Hi")
    conversation.undo()
    assert said(conversation, "Hi") != reply  # 30 random bytes


def test_undo_keeps_states_within_its_bytes(talk, advancer):
    room = int(2.5 * (advancer.state_bytes + 260 * 4))
    conversation = talk(max_undo_bytes=room)
    for text in "abcde":
        said(conversation, text)
    assert conversation.num_undoable == 2
    conversation.undo()
    conversation.undo()
    assert [m["content"] for m in conversation.messages if m["role"] == "user"] == ["a", "b", "c"]
    with pytest.raises(
        ValueError, match=rf"not available: undo keeps at most {room:,} bytes of states \({advancer.state_bytes:,} each"
    ):
        conversation.undo()
    assert len(conversation.messages) == 6
    said(conversation, "f")


@ON_EVERY_PATH
def test_an_interrupted_reply_stays_as_far_as_it_came(talk):
    conversation, whole = talk(max_tokens=50), talk(max_tokens=50)
    text = said(whole, "Hi")
    pieces = conversation.say("Hi")
    shown = next(pieces) + next(pieces)
    conversation.interrupt()
    shown += "".join(pieces)
    assert text.startswith(shown.rstrip("\ufffd"))
    assert conversation.messages[-1]["content"] == shown
    assert len(spans_of(conversation)[1]) < 50
    assert spans_of(whole)[1][: len(spans_of(conversation)[1])] == spans_of(conversation)[1]
    said(conversation, "x")
    assert spans_of(conversation)[2] == [END, USER, *b"x", END, ASSISTANT]


def test_a_reply_that_is_not_read_to_its_end_stays_too(talk):
    conversation = talk(max_tokens=50)
    pieces = conversation.say("Hi")
    next(pieces)
    pieces.close()
    assert 1 <= len(spans_of(conversation)[1]) < 50
    assert conversation.num_undoable == 1


@ON_EVERY_PATH
def test_a_reply_stopped_before_its_first_token_has_never_been(talk):
    conversation, other = talk(), talk()
    said(conversation, "Hi")
    said(other, "Hi")
    pieces = conversation.say("a long message " * 100)
    conversation.interrupt()
    assert list(pieces) == []
    assert_same_place(conversation, other)
    conversation.say("never read")
    assert said(conversation, "1") == said(other, "1")


class Failing(Advancer):
    """Fails in the given step, half-way through."""

    def __init__(self, model):
        super().__init__(model, path="torch")
        self.steps_left = 10**9

    def read_all(self, inputs):
        self.steps_left -= 1
        if self.steps_left < 0:
            inputs[0].state.sums[0].fill_(torch.nan)
            raise MemoryError("no more of it")
        return super().read_all(inputs)


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_turn_that_fails_has_never_been(advancer, chat_bytes, talk, steps):
    failing = Failing(advancer.model)
    conversation, other = conversation_of(failing, chat_bytes, SamplingParams(max_tokens=8, seed=1)), talk()
    said(conversation, "Hi")
    said(other, "Hi")
    failing.steps_left = steps
    with pytest.raises(RuntimeError, match="no more of it"):
        said(conversation, "1")
    failing.steps_left = 10**9
    assert_same_place(conversation, other)
    assert said(conversation, "1") == said(other, "1")


def test_a_stop_string_ends_a_reply_and_stays_in_the_memory(write):
    whole = write(max_tokens=40)
    said(whole, "The ")
    written = bytes(spans_of(whole)[1])
    letters = [chr(byte) for byte in written if 32 < byte < 127]
    stop = letters[3]
    conversation = write(max_tokens=40, stop=[stop])
    shown = said(conversation, "The ")
    assert stop not in shown
    assert bytes(spans_of(conversation)[1]) == written[: written.index(stop.encode()) + 1]
    assert conversation.messages[-1]["content"] == shown + stop


REWRITING = (
    "{% for m in messages[-3:] %}{% if m.role == 'assistant' %}A{% generation %}{{ m.content }}<|end|>"
    "{% endgeneration %}{% else %}Q{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}A{% endif %}"
)


def test_a_template_that_rewrites_the_past_is_read_anew_and_that_is_said_once(make_model, tmp_path):
    """This one keeps three messages, and so drops the first ones from the third turn on."""
    (tmp_path / "own.jinja").write_text(REWRITING)
    tokenizer = with_chat_template(byte_tokenizer(), str(tmp_path / "own.jinja"), needs_one=True)
    advancer, notices = Advancer(make_model(vocab_size=257), path="torch"), []
    conversation = conversation_of(advancer, tokenizer, SamplingParams(max_tokens=4, seed=1), notify=notices.append)
    said(conversation, "a")
    said(conversation, "b")
    assert notices == []
    for text in "cd":
        before = conversation.messages
        said(conversation, text)
        wanted = ChatEncoder(tokenizer).prompt([*before, {"role": "user", "content": text}])
        given, written, last, _ = spans_of(conversation)
        # The answer in the tokens that the model wrote, where those are the text.
        assert bytes(written).decode(errors="replace") == before[-1]["content"]
        assert [*given, *before[-1]["content"].encode(), *last] == wanted
    assert notices == ["the chat template changes what was said before: all of it is read again for every reply"]
    assert conversation.num_undoable == 4


def test_another_system_message_is_read_in_front_of_what_was_said(talk, write):
    conversation = talk()
    said(conversation, "Hi")
    conversation.set_system("Be.")
    said(conversation, "1")
    given, first, then, _ = spans_of(conversation)
    assert given == [SYSTEM, *b"Be.", END, USER, *b"Hi", END, ASSISTANT]
    assert then == [END, USER, *b"1", END, ASSISTANT]
    conversation.undo()
    assert spans_of(conversation)[1] == first  # in the tokens that the model wrote
    text = write(system="In front. ")
    said(text, "Hi ")
    text.set_system("Before. ")
    said(text, "you")
    first, _, then, _ = spans_of(text)
    assert (bytes(first), bytes(then)) == (b"Before. Hi ", b"you")


def test_a_system_message_that_the_template_refuses_changes_nothing(tmp_path, make_model):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + REWRITING
    (tmp_path / "own.jinja").write_text(template)
    tokenizer = with_chat_template(byte_tokenizer(), str(tmp_path / "own.jinja"), needs_one=True)
    advancer = Advancer(make_model(vocab_size=257), path="torch")
    with pytest.raises(ValueError, match="no system here"):
        conversation_of(advancer, tokenizer, system="Be brief.")
    conversation = conversation_of(advancer, tokenizer, SamplingParams(max_tokens=4))
    with pytest.raises(ValueError, match="no system here"):
        conversation.set_system("Be brief.")
    assert conversation.system is None
    said(conversation, "Hi")


def test_without_a_template_the_text_goes_on(write):
    conversation = write()
    with pytest.raises(ValueError, match="the prompt is empty"):
        conversation.say("")
    said(conversation, "The ")
    said(conversation, "")
    said(conversation, " tail")
    spans = spans_of(conversation)
    assert [bytes(span) for span in spans[::2]] == [b"The ", b"", b" tail"]
    one_go = write(max_tokens=16)
    said(one_go, "The ")
    assert spans[1] + spans[3] == spans_of(one_go)[1]
    assert conversation.is_plain
    assert conversation.stats.tokens_written <= 24


def test_a_seed_begins_the_draws_anew(talk):
    conversation = talk(seed=5)
    reply = said(conversation, "Hi")
    conversation.reset()
    assert said(conversation, "Hi") == reply
    other = talk(seed=None)
    other.set_seed(5)
    assert said(other, "Hi") == reply
    with pytest.raises(ValueError, match="seed is"):
        other.set_seed(2**64)
    assert other.params.seed == 5


def test_options_between_turns_count_for_the_next(talk):
    greedy, conversation = talk(temperature=0), talk(temperature=1)
    conversation.set_params(temperature=0, top_k=3)
    assert said(conversation, "Hi") == said(greedy, "Hi")


@pytest.mark.parametrize(
    ("options", "is_held"),
    [
        ({"top_k": 2}, lambda rank, share, mass: rank < 2),
        ({"top_p": 0.5}, lambda rank, share, mass: mass < 0.5),
        ({"min_p": 0.4}, lambda rank, share, mass: share >= 0.4),
    ],
    ids=["top_k", "top_p", "min_p"],
)
def test_what_is_drawn_is_what_the_options_leave(advancer, chat_bytes, options, is_held):
    conversation = conversation_of(advancer, chat_bytes, SamplingParams(max_tokens=60, seed=1, **options))
    said(conversation, "Hi")
    tokens, state = tokens_of(conversation), advancer.new_state()
    given = len(spans_of(conversation)[0])
    all_logits = advancer.advance([StepInput(state, tokens[:-1], "all")])[0]
    for token, logits in zip(tokens[given:], all_logits[given - 1 :], strict=True):
        ranked, order = logits.softmax(-1).sort(descending=True)
        rank = order.tolist().index(token)
        assert is_held(rank, ranked[rank] / ranked[0], ranked[:rank].sum())


def test_a_file_of_another_model_or_tokenizer_leaves_the_conversation_alone(talk, make_model, chat_bytes, tmp_path):
    path = tmp_path / "talk"
    other = conversation_of(
        Advancer(make_model(seed=1, vocab_size=260), path="torch"), chat_bytes, SamplingParams(max_tokens=4)
    )
    said(other, "Hi")
    other.save(path)
    conversation, same = talk(), talk()
    said(conversation, "Hi")
    said(same, "Hi")
    with pytest.raises(ValueError, match="a snapshot of another model"):
        conversation.load(path)
    plain = talk(plain=True)
    said(plain, "Hi")
    plain.save(path)
    with pytest.raises(ValueError, match="with another tokenizer or chat template"):
        conversation.load(path)
    Snapshot(conversation.engine.advancer.new_state(), [], None).save(path, conversation.engine.model)
    with pytest.raises(ValueError, match="is a snapshot of a plain sequence, not of a conversation"):
        conversation.load(path)
    assert_same_place(conversation, same)
    assert conversation.num_undoable == 1
    with pytest.raises(ValueError, match="the tokenizer has 256 entries and the model 260"):
        talk(tokenizer=byte_tokenizer())


def test_turns_of_a_loaded_conversation_cannot_be_undone_and_later_ones_can(talk, tmp_path):
    conversation = talk()
    said(conversation, "Hi")
    conversation.save(tmp_path / "talk")
    conversation.load(tmp_path / "talk")
    with pytest.raises(ValueError, match="none from before a conversation was loaded"):
        conversation.undo()
    said(conversation, "1")
    conversation.undo()
    assert len(conversation.messages) == 2


def test_a_state_of_another_kind_is_made_from_the_tokens_and_that_is_said(talk, advancer, chat_bytes, tmp_path):
    conversation, notices = talk(), []
    for text in ("Hi", "1+1"):
        said(conversation, text)
    conversation.save(tmp_path / "talk")
    options = SamplingParams(max_tokens=8, seed=1)
    other = conversation_of(
        Advancer(advancer.model, path="torch", window=500), chat_bytes, options, notify=notices.append
    )
    other.load(tmp_path / "talk")
    (notice,) = notices
    assert "of another kind, 'sums' and not 'window:500'" in notice
    snapshot = other._now.snapshot
    assert (snapshot.tokens, snapshot.state.position) == (tokens_of(conversation), conversation.position)
    # float32 sums in another grouping
    torch.testing.assert_close(snapshot.logits, conversation._now.snapshot.logits, rtol=1e-3, atol=1e-3)
    said(other, "x")


@ON_EVERY_PATH
def test_what_other_weights_have_read_is_read_anew(talk, tmp_path):
    """A turn went on from the state of a model that has been trained since, and a file said that it was the new one's."""
    notices = []
    conversation, other = talk(notify=notices.append, temperature=0), talk(temperature=0)
    said(conversation, "Hi")
    said(other, "Hi")
    conversation.engine.model.decoder.weight.data.neg_()
    conversation.save(tmp_path / "changed")
    other.load(tmp_path / "changed")
    # From the file, and from nothing, the weights of now have read the same.
    assert said(conversation, "1+1") == said(other, "1+1")
    assert tokens_of(conversation) == tokens_of(other)
    fresh = conversation.engine.advancer.new_state()
    (logits,) = conversation.engine.advancer.advance([StepInput(fresh, tokens_of(conversation)[:-1])])
    # float32 sums in another grouping
    torch.testing.assert_close(conversation._now.snapshot.logits, logits, rtol=1e-4, atol=1e-4)
    assert [notice for notice in notices if "weights have changed" in notice] == notices[:2]
    assert len(notices) == 2

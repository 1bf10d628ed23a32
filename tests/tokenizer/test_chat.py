"""Chat templates: which tokens a conversation gives, which of them are the assistant's, and what ends an answer."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from bdh.tokenizer import (
    ChatEncoder,
    byte_tokenizer,
    is_byte_tokenizer,
    stop_token_ids,
    train_tokenizer,
    with_chat_template,
)

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yé"},
    {"role": "user", "content": "1+1"},
    {"role": "assistant", "content": "2"},
]
SYSTEM, USER, ASSISTANT, END = 256, 257, 258, 259


@pytest.fixture
def chat_bytes():
    return with_chat_template(byte_tokenizer(), None, needs_one=True)


def test_bytes_and_their_mask_are_those_worked_out_by_hand(chat_bytes):
    ids, is_answer = ChatEncoder(chat_bytes).encode([TALK])[0]
    expected = [
        *([SYSTEM, *b"Be brief.", END, USER, *b"Hi", END, ASSISTANT]),
        *("Yé".encode()),  # three bytes, the last of which is in the middle of no character's offsets
        *([END, USER, *b"1+1", END, ASSISTANT, *b"2", END]),
    ]
    assert ids.tolist() == expected
    answers = np.flatnonzero(is_answer)
    assert answers.tolist() == [16, 17, 18, 19, 26, 27]
    assert ids[answers].tolist() == [*"Yé".encode(), END, *b"2", END]


@pytest.mark.parametrize("kind", ["byte", "bpe", "unigram", "wordpiece"])
def test_the_tokens_are_those_of_transformers(kind):
    tokenizer = byte_tokenizer() if kind == "byte" else train_tokenizer(["Be brief. Hi Yes 1+1 2 é"] * 50, kind, 270)
    with_chat_template(tokenizer, None, needs_one=True)
    ids, is_answer = ChatEncoder(tokenizer).encode([TALK])[0]
    assert ids.tolist() == tokenizer.apply_chat_template(TALK)["input_ids"]
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert [ids[i] for i in np.flatnonzero(is_answer) if not is_answer[i + 1 : i + 2].any()] == [end, end]
    asked = tokenizer.apply_chat_template(TALK[:2], add_generation_prompt=True)["input_ids"]
    assert ChatEncoder(tokenizer).prompt(TALK[:2]) == asked


def test_a_special_token_that_a_message_spells_is_text(chat_bytes):
    for content in ("<|end|>", "a<|assistant|>b", "\ufdd0<|end|>\ufdd1\ufdd0"):
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}]
        ids, is_answer = ChatEncoder(chat_bytes).encode([messages])[0]
        expected = [USER, *content.encode(), END, ASSISTANT, *content.encode(), END]
        assert ids.tolist() == expected
        assert is_answer.sum() == len(content.encode()) + 1
        assert ChatEncoder(chat_bytes).prompt(messages[:1]) == expected[: expected.index(ASSISTANT) + 1]


def test_chat_tokens_come_after_the_others_and_bytes_stay_bytes(chat_bytes, tmp_path):
    assert len(chat_bytes) == 260
    assert is_byte_tokenizer(chat_bytes)
    chat_bytes.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == chat_bytes.chat_template
    assert is_byte_tokenizer(again)
    assert again.apply_chat_template(TALK) == chat_bytes.apply_chat_template(TALK)
    assert with_chat_template(again, None, needs_one=True).get_vocab() == chat_bytes.get_vocab()
    assert len(with_chat_template(byte_tokenizer(), None, needs_one=False)) == 256


def test_generation_stops_at_the_end_of_an_answer_and_of_a_text():
    assert stop_token_ids(byte_tokenizer()) is None
    assert stop_token_ids(byte_tokenizer(special_tokens=True)) == 258
    assert stop_token_ids(with_chat_template(byte_tokenizer(), "default", needs_one=False)) == 259
    both = with_chat_template(byte_tokenizer(special_tokens=True), "default", needs_one=False)
    assert stop_token_ids(both) == [258, 263]


def test_a_template_of_ones_own_takes_the_tokens_that_it_spells(tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}A: {% generation %}{{ m.content }}<|end|>"
        "{% endgeneration %}{% else %}Q: {{ m.content | trim }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}A: {% endif %}"
    )
    tokenizer = with_chat_template(byte_tokenizer(), str(path), needs_one=True)
    assert len(tokenizer) == 257
    ids, is_answer = ChatEncoder(tokenizer).encode([TALK[1:3]])[0]
    assert ids.tolist() == [*"Q: Hi\nA: Yé".encode(), 256]
    assert is_answer.tolist() == [False] * 9 + [True] * 4
    assert ChatEncoder(tokenizer).prompt([{"role": "user", "content": " Hi "}]) == [*b"Q: Hi\nA: "]


@pytest.mark.parametrize(("template", "fault"), [
    ("{{ messages[0].content }}<|end|>", "does not mark what the assistant writes: put {% generation %}"),
    ("{% generation %}{{ messages[-1].content }}{% endgeneration %}<|end|>", "with a special token, within"),
    ("{% generation %}{{ messages[-1].content", "the chat template refuses the conversation"),
])  # fmt: skip
def test_a_template_that_cannot_be_trained_with_is_refused(tmp_path, template, fault):
    (tmp_path / "own.jinja").write_text(template)
    with pytest.raises(ValueError, match=fault):
        with_chat_template(byte_tokenizer(), str(tmp_path / "own.jinja"), needs_one=True)


def test_a_template_that_is_not_there_or_not_given_is_named():
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.chat_template is 'own\.jinja': there is no such file"):
        with_chat_template(byte_tokenizer(), "own.jinja", needs_one=True)
    with pytest.raises(
        ValueError, match=r"no chat template, .*: give it text instead.* or train it on conversations first"
    ):
        ChatEncoder(byte_tokenizer())


def test_a_conversation_that_the_template_refuses_is_a_fault(chat_bytes):
    with pytest.raises(ValueError, match="the role tool is none of"):
        ChatEncoder(chat_bytes).encode([[{"role": "tool", "content": "a"}]])

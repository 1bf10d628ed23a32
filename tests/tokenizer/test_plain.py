"""The tokenizer without transformers gives what transformers gives."""

import json
import threading
from datetime import datetime

import pytest
from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GPT2Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from bdh.tokenizer import ChatEncoder, byte_tokenizer, train_tokenizer, with_chat_template, with_padding
from bdh.tokenizer.chat import render_chat
from bdh.tokenizer.plain import PlainTokenizer, document_end_id, vocabulary_size
from tests.tokenizer.conftest import NASTY_TEXTS, TRAINING_TEXT

TALK = [
    {"role": "system", "content": "Be <b>brief</b>."},
    {"role": "user", "content": " Hi 'é' <eos> "},
    {"role": "assistant", "content": "Yé\n"},
    {"role": "user", "content": "1+1"},
]


@pytest.fixture(
    scope="module", params=["byte", "padded bytes", "byte with special tokens", "bpe", "unigram", "wordpiece"]
)
def both(request, tmp_path_factory):
    """transformers' tokenizer as it reads a folder, ours of that folder, and ours of transformers'."""
    kind, folder = request.param, tmp_path_factory.mktemp("tokenizer")
    if kind.startswith("byte"):
        made = byte_tokenizer(special_tokens=kind.endswith("special tokens"))
    else:
        made = with_padding(byte_tokenizer()) if kind == "padded bytes" else train_tokenizer([TRAINING_TEXT], kind, 320)
    made = with_chat_template(made, "default", needs_one=True)
    made.clean_up_tokenization_spaces = made.init_kwargs["clean_up_tokenization_spaces"] = kind == "wordpiece"
    made.save_pretrained(folder)
    theirs, ours = AutoTokenizer.from_pretrained(folder), PlainTokenizer.load(folder)
    assert ours is not None
    return theirs, ours, PlainTokenizer.of(theirs)


def test_texts_are_encoded_and_decoded_alike(both):
    theirs, *several = both
    for ours in several:
        for text in NASTY_TEXTS:
            for special in (False, True):
                expected = theirs(text, add_special_tokens=special, split_special_tokens=True)["input_ids"]
                assert ours.encode(text, add_special_tokens=special) == expected
            ids = theirs(text)["input_ids"]  # of special tokens too
            for skip in (False, True):
                expected = theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
                assert ours.decode(ids, skip_special_tokens=skip) == expected


def test_all_that_is_read_of_a_tokenizer_is_the_same(both):
    theirs, *several = both
    for ours in several:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "special_tokens_map", "chat_template"):
            assert getattr(ours, name) == getattr(theirs, name), name
        assert ours.clean_up_tokenization_spaces == theirs.clean_up_tokenization_spaces
        assert (len(ours), ours.get_vocab()) == (len(theirs), theirs.get_vocab())
        assert list(ours.added_tokens_decoder.items()) == list(theirs.added_tokens_decoder.items())
        ids = [*range(len(ours)), 10**6]
        assert [ours.convert_ids_to_tokens(i) for i in ids] == [theirs.convert_ids_to_tokens(i) for i in ids]
        assert (vocabulary_size(ours), document_end_id(ours)) == (vocabulary_size(theirs), document_end_id(theirs))
        encoder = ChatEncoder(ours)
        assert encoder.hash == ChatEncoder(theirs).hash
        assert encoder.encode([TALK[:2]])[0][0].tolist() == ChatEncoder(theirs).encode([TALK[:2]])[0][0].tolist()


def test_a_wrapped_tokenizer_is_not_wrapped_again_and_does_not_disturb(both):
    theirs, ours, _ = both
    assert PlainTokenizer.of(ours) is ours
    wrapped = PlainTokenizer.of(theirs)
    before = theirs("<eos> a")["input_ids"]
    wrapped.encode("<eos> a")
    assert theirs("<eos> a")["input_ids"] == before


TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] | trim + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "what templates of the hub use": """
{%- set ns = namespace(n=0) %}{%- for m in messages %}
  {%- if m.role == 'system' %}{% continue %}{% endif %}
  {%- set ns.n = ns.n + loop.index %}
  [{{ ns.n }} {{ m | tojson }} {{ dict(a=m.content) | tojson(indent=2) }}] {{ eos_token }}
  {%- if loop.index > 2 %}{% break %}{% endif %}
{% endfor %}
{{ strftime_now('%Y') }} {{ tools is none }} {{ documents is none }} {{ messages[-1:] | tojson(sort_keys=true) }}
""",
    "answers": "{% for m in messages %}{% generation %}{{ m.content }}<{{ bos_token }}>{% endgeneration %}-{% endfor %}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("prompt", [False, True])
def test_a_template_is_rendered_alike(template, prompt):
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    thinking = [{"role": "assistant", "content": "a", "reasoning": "hm"}]
    for talk in (TALK, TALK + thinking):
        texts, spans = render_jinja_template(
            [talk],
            chat_template=template,
            return_assistant_tokens_mask="generation" in template.partition("%}")[2][:40],
            add_generation_prompt=prompt,
            **tokens,
        )
        text, found = render_chat(template, talk, add_generation_prompt=prompt, **tokens)
        assert text == texts[0]
        assert found == (spans[0] if spans else [])
    assert str(datetime.now().year) in render_chat(TEMPLATES["what templates of the hub use"], TALK, **tokens)[0]


@pytest.mark.parametrize("template", [
    "{{ raise_exception('no') }}",
    "{{ ''.__class__.__mro__ }}",
    "{% set n = namespace(_a=1) %}",
    "{{ messages.append(1) }}",
    "{% for",
])  # fmt: skip
def test_what_a_template_may_not_do_is_refused(template):
    with pytest.raises(TemplateError):
        render_chat(template, TALK)
    with pytest.raises(TemplateError):
        render_jinja_template([TALK], chat_template=template)


def test_threads_do_not_see_each_others_answers():
    template = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    faults = []

    def render(length: int) -> None:
        for _ in range(200):
            text, spans = render_chat(template, [{"content": "x" * length}] * 3)
            if spans != [(0, length), (length, 2 * length), (2 * length, 3 * length)]:
                faults.append((text, spans))

    threads = [threading.Thread(target=render, args=(n,)) for n in (1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def test_several_templates_are_read_by_their_names(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    tokenizer.save_pretrained(tmp_path)
    assert PlainTokenizer.load(tmp_path).chat_template == AutoTokenizer.from_pretrained(tmp_path).chat_template
    (tmp_path / "chat_template.jinja").unlink()
    facts = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(facts | {"chat_template": "in the configuration"}))
    for path in (tmp_path / "additional_chat_templates").glob("*"):
        path.unlink()
    assert PlainTokenizer.load(tmp_path).chat_template == "in the configuration"


def test_tokens_that_only_the_configuration_has_are_added(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    facts = json.loads(path.read_text())
    tool = {"content": "<tool>", "lstrip": False, "rstrip": True, "normalized": False, "special": False}
    more = {"eos_token": "<end>", "extra_special_tokens": ["<x>"], "image_token": "<image>"}
    path.write_text(json.dumps(facts | more | {"added_tokens_decoder": {"256": tool}}))
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path), PlainTokenizer.load(tmp_path)
    assert ours.get_vocab() == theirs.get_vocab()
    assert list(ours.added_tokens_decoder.items()) == list(theirs.added_tokens_decoder.items())
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.special_tokens_map == theirs.special_tokens_map


def test_what_only_transformers_can_read_is_left_to_it(tmp_path):
    vocab = json.loads(byte_tokenizer().backend_tokenizer.to_str())["model"]["vocab"]
    GPT2Tokenizer(vocab=vocab, merges=[]).save_pretrained(tmp_path / "gpt2")
    assert PlainTokenizer.load(tmp_path / "gpt2") is None
    (tmp_path / "bare").mkdir()
    Tokenizer.from_str(byte_tokenizer().backend_tokenizer.to_str()).save(str(tmp_path / "bare" / "tokenizer.json"))
    assert PlainTokenizer.load(tmp_path / "bare") is None


def test_a_damaged_file_is_named(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=f"the tokenizer files of {tmp_path} cannot be read"):
        PlainTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"cannot be read: there is no tokenizer\.json$"):  # "os error 2", and no name
        PlainTokenizer.load(tmp_path)

"""Texts of a form: held exactly, at no cost to what the model says within it, nor to those beside it."""

import importlib.util
import json
import re
from dataclasses import asdict, replace

import pytest
import torch

from bdh import BDHConfig, BDHForCausalLM
from bdh.extras import install_command
from bdh.generate.engine import Engine
from bdh.generate.grammar import GRAMMAR_FAULT, Grammars, Matcher
from bdh.generate.params import EngineConfig, SamplingParams, params_from
from bdh.generate.snapshot import Snapshot
from bdh.tokenizer import byte_tokenizer, train_tokenizer
from bdh.tokenizer.plain import token_bytes

SCHEMA = {
    "type": "object",
    "properties": {
        "size": {"enum": ["small", "groß"]},
        "count": {"type": "integer", "minimum": -5, "maximum": 120},
        "name": {"type": "string", "maxLength": 4},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["size", "count", "name", "tags"],
    "additionalProperties": False,
}
TEXTS = ["Die Straße ist naß, und der Vogel singt.", "Ένα πουλί στο δέντρο.", '{"a": [1, 2], "b": "naïve"}']


def fits(text):
    """Whether a text is of SCHEMA."""
    found = json.loads(text)
    return (
        list(found) == list(SCHEMA["required"])
        and found["size"] in ("small", "groß")
        and type(found["count"]) is int
        and -5 <= found["count"] <= 120
        and len(found["name"]) <= 4
        and len(found["tags"]) <= 2
        and all(type(each) is bool for each in found["tags"])
    )


def made(tokenizer):
    sizes = {"n_embd": 24, "n_head": 3, "n_layer": 2, "mlp_internal_dim_multiplier": 6}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BDHConfig(vocab_size=len(tokenizer), dropout=0.0, initializer_range=0.3, **sizes)
        return BDHForCausalLM(config).eval()


TOKENIZERS = {
    "bytes": byte_tokenizer,
    "bytes with ends": lambda: byte_tokenizer(special_tokens=True),
    "bpe": lambda: train_tokenizer(TEXTS * 20, "bpe", 330),
    "unigram": lambda: train_tokenizer(TEXTS * 20, "unigram", 330),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def pair(request):
    tokenizer = TOKENIZERS[request.param]()
    return made(tokenizer), tokenizer


@pytest.fixture(scope="module")
def bytes_pair():
    tokenizer = byte_tokenizer(special_tokens=True)
    return made(tokenizer), tokenizer


def engine_of(pair, **config):
    return Engine(*pair, config=EngineConfig(**config))


@pytest.fixture
def engine(bytes_pair):
    return engine_of(bytes_pair)


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"seed": 3},
        {"seed": 4, "top_k": 3, "temperature": 2.0},
        {"seed": 5, "top_p": 0.3, "repetition_penalty": 1.5, "frequency_penalty": 0.5},
        {"seed": 6, "min_p": 0.2, "logit_bias": {65: 100.0}, "min_tokens": 400},
    ],
)
def test_a_text_that_ends_has_its_form_however_it_is_sampled(pair, settings):
    params = SamplingParams(max_tokens=1500, grammar={"json_schema": SCHEMA}, **settings)
    found = engine_of(pair).generate(["abc", "Das ", '{"'], params)
    assert [each[0].finish_reason for each in found] == ["stop"] * 3
    assert all(fits(each[0].text) for each in found)


@pytest.mark.parametrize(
    ("pattern", "endings"),
    [
        (r"[0-9]{3}-(ab|é){1,6}!", {"stop"}),
        (r"(yes|no)", {"stop"}),
        (r"[0-9]+", {"stop", "length"}),
        (r"", {"stop"}),
        (r"(?s:.{1,5})", {"stop"}),
        ("a/\nstart: /b\\/", {"stop"}),
    ],
)
def test_a_text_matches_its_pattern_from_end_to_end(pair, pattern, endings):
    for seed in range(4):
        params = SamplingParams(max_tokens=60, seed=seed, grammar={"regex": pattern}, logprobs=0)
        completion = engine_of(pair).generate("abc", params)[0][0]
        assert completion.finish_reason in endings
        assert len(completion.logprobs) == len(completion.token_ids)
        if completion.finish_reason == "stop":
            assert re.fullmatch(pattern, completion.text)


def test_the_text_is_the_models_own_where_that_has_the_form(pair):
    """Of a model that writes no bytes that are no text: neither <unk>, nor halves of characters."""
    tokenizer = pair[1]
    no_text = {
        number: -100.0
        for number, each in enumerate(token_bytes(tokenizer))
        if number != tokenizer.eos_token_id and (not each or max(each) > 127)
    }
    for settings in ({"temperature": 0}, {"seed": 1, "top_p": 0.9, "repetition_penalty": 1.2}):
        params = SamplingParams(max_tokens=40, logit_bias=no_text, **settings)
        free = engine_of(pair).generate("Once upon", params)[0][0]
        assert free.token_ids
        for pattern in ("(?s:.*)", re.escape(free.text) + "(?s:.*)"):
            held = engine_of(pair).generate("Once upon", replace(params, grammar={"regex": pattern}))[0][0]
            assert (held.token_ids, held.finish_reason) == (free.token_ids, free.finish_reason)


def test_every_way_of_writing_what_must_follow_is_allowed():
    """Of a word that is the only one allowed, the library's own way of writing it was."""
    tokenizer = train_tokenizer(["the bird and the bird"] * 20, "bpe", 290)
    spellings, grammars = token_bytes(tokenizer), Grammars(tokenizer, len(tokenizer))
    for grammar, text in (({"regex": "the bird"}, b"the bird"), ({"json_schema": {"const": "the"}}, b'"the"')):
        allowed = Matcher(grammars.compile(grammar), len(tokenizer)).allowed()
        assert {spellings[i] for i in allowed.nonzero()[:, 0].tolist()} == {
            each for each in spellings if each and text.startswith(each)
        }
    assert len([each for each in spellings if each and b"the bird".startswith(each)]) > 1


def test_the_end_of_a_text_may_come_only_where_the_form_is_whole(bytes_pair):
    """The model wants to end at once, and later wants nothing but to go on."""
    end = bytes_pair[1].eos_token_id
    always = SamplingParams(max_tokens=50, temperature=0, logit_bias={end: 100.0}, grammar={"regex": "[a-z]{4,9}"})
    never = replace(always, logit_bias={end: -100.0})
    ignoring = replace(always, ignore_eos=True)
    for params, length, reason in ((always, 4, end), (never, 9, None), (ignoring, 9, None)):
        completion = engine_of(bytes_pair).generate("abc", params)[0][0]
        assert (len(completion.text), completion.finish_reason, completion.stop_reason) == (length, "stop", reason)
        assert end not in completion.token_ids


def test_a_stop_string_or_max_tokens_cuts_it_as_ever(engine):
    free = SamplingParams(max_tokens=30, temperature=0, grammar={"regex": "[a-z]{20}"})
    (text,) = [engine.generate("abc", free)[0][0].text]
    cut = engine.generate("abc", replace(free, stop=[text[7:9]]))[0][0]
    assert (cut.finish_reason, text.startswith(cut.text), len(cut.text) < 20) == ("stop", True, True)
    short = engine.generate("abc", replace(free, max_tokens=5))[0][0]
    assert (short.finish_reason, short.text) == ("length", text[:5])
    nothing = engine.generate("abc", replace(free, max_tokens=0))[0][0]
    assert (nothing.finish_reason, nothing.text) == ("length", "")


@pytest.mark.parametrize("path", ["kernels", "torch"])
def test_those_beside_it_write_what_they_write_alone(bytes_pair, path):
    """And each of its own does: several of a prompt, with prompts that share a beginning, in small steps."""
    beginning = "The beginning that all of these prompts share, so that it is read once and kept. " * 2
    requests = [
        (beginning + "one", SamplingParams(max_tokens=60, seed=1)),
        (beginning + "two", SamplingParams(max_tokens=300, seed=2, n=3, grammar={"json_schema": SCHEMA})),
        ("three", SamplingParams(max_tokens=60, temperature=0)),
        (beginning + "four", SamplingParams(max_tokens=60, seed=4, grammar={"regex": "[a-f]{30}"})),
    ]
    alone = [engine_of(bytes_pair, path=path).generate([prompt], params)[0] for prompt, params in requests]
    engine = engine_of(bytes_pair, path=path, prefix_cache_bytes=1 << 26, tokens_per_step=24)
    for _ in range(2):  # the second time from the kept states
        together = engine.generate(*map(list, zip(*requests, strict=True)))
        assert [[each.token_ids for each in several] for several in together] == [
            [each.token_ids for each in several] for several in alone
        ]
    assert all(fits(each.text) for each in alone[1])
    assert len({each.text for each in alone[1]}) == 3


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_step_that_is_retried_takes_no_token_twice(bytes_pair, monkeypatch, moment):
    """In one step of several the model fails once; those whose state did not move are read alone."""
    params = [SamplingParams(max_tokens=200, seed=seed, grammar={"json_schema": SCHEMA}) for seed in range(3)]
    expected = [engine_of(bytes_pair).generate("abc", each)[0][0] for each in params]
    engine = engine_of(bytes_pair, path="torch")
    step, fails = engine.advancer.read_all, []

    def failing(feeds):
        if fails:
            fails.pop()
            if moment == "after":
                step(feeds[:1])
            raise RuntimeError("out of memory")
        return step(feeds)

    monkeypatch.setattr(engine.advancer, "read_all", failing)
    ids, found = [engine.add_request("abc", each) for each in params], {}
    for number in range(10**6):
        if not engine.has_work:
            break
        if number in (4, 9):
            fails.append(True)
        found |= {o.request_id: o.completion for o in engine.step() if o.completion is not None}
    whole = [number for number, request in enumerate(ids) if found[request].finish_reason != "error"]
    assert len(whole) == (3 if moment == "before" else len(whole))
    assert whole
    for number in whole:
        assert found[ids[number]].token_ids == expected[number].token_ids


def test_a_text_that_was_cut_off_goes_on_from_its_snapshot_within_its_form(bytes_pair, tmp_path):
    params = SamplingParams(max_tokens=400, seed=7, grammar={"json_schema": SCHEMA})
    whole = engine_of(bytes_pair).generate("abc", params)[0][0]
    engine = engine_of(bytes_pair)
    request = engine.add_request("abc", params)
    while engine.stats().generated_tokens < 20:
        engine.step()
    engine.abort(request, keep_snapshot=True)
    (completion,) = [output.completion for output in engine.step()]
    completion.snapshot.save(tmp_path / "text", bytes_pair[0])
    snapshot = Snapshot.load(tmp_path / "text", bytes_pair[0])

    rest = replace(params, seed=None, max_tokens=380, grammar={**params.grammar, "written": len(completion.token_ids)})
    rest = SamplingParams(**json.loads(json.dumps(asdict(rest))))  # as servers keep it
    other = engine_of(bytes_pair)
    other.add_request(None, rest, snapshot=snapshot)
    outputs = [output for _ in range(400) if other.has_work for output in other.step()]
    assert completion.token_ids + outputs[-1].completion.token_ids == whole.token_ids
    assert outputs[-1].completion.finish_reason == "stop"

    # Without it, what follows is a text of its own.
    other.add_request(None, replace(rest, seed=1, grammar=params.grammar), snapshot=snapshot)
    outputs = [output for _ in range(400) if other.has_work for output in other.step()]
    assert fits(outputs[-1].completion.text)
    for grammar, told in (
        ({"regex": "[a-z]+", "written": 20}, GRAMMAR_FAULT),
        ({"regex": "[a-z]+", "written": 999}, "grammar.written is 999: must be at most 23"),
    ):
        with pytest.raises(ValueError, match=told):
            other.add_request(None, replace(rest, grammar=grammar), snapshot=snapshot)
    assert not other.has_work


@pytest.mark.parametrize(
    ("grammar", "told"),
    [
        ({}, "grammar has nothing: must have one of json_schema and regex"),
        ({"regex": "a", "json_schema": {}}, "must have one of"),
        ({"regex": "a", "lark": "x"}, "grammar.lark is not a field of a grammar"),
        ({"regex": 3}, "grammar.regex is 3: must be a regular expression"),
        ({"regex": "a", "written": -1}, "grammar.written is -1"),
        ({"json_schema": "{}"}, "must be a JSON schema, an object"),
        ({"json_schema": {"x-guidance": {"lenient": True}, "not": {}}}, "x-guidance"),
        ({"json_schema": {"minimum": float("nan")}}, "grammar.json_schema is not JSON: "),
        ({"json_schema": {"const": "x" * 100_000}}, "must have at most 100,000"),
        ({"regex": "\ud800"}, "half of a surrogate pair"),
        ({"regex": "(a"}, "grammar.regex cannot be enforced: .*unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"json_schema": {"type": "objekt"}}, "grammar.json_schema cannot be enforced: Invalid type: objekt"),
        ({"json_schema": {"not": {}}}, 'Unimplemented keys: \\["not"\\]'),
        ({"json_schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "minimum \\(5\\) is greater"),
        ({"json_schema": {"$ref": "#"}}, "no text can match it"),
        ({"json_schema": {"$ref": "http://127.0.0.1:1/x"}}, "does not fetch"),
        ({"json_schema": {"type": "integer", "multipleOf": 999_999_937}}, "fuel exhausted"),
    ],
)
def test_a_grammar_that_cannot_be_held_is_refused_with_its_reason(engine, grammar, told):
    with pytest.raises(ValueError, match=told):
        engine.add_request("abc", SamplingParams(grammar=grammar))
    assert not engine.has_work


def test_a_schema_in_many_levels_is_refused(engine):
    schema = {}
    for _ in range(200):
        schema = {"anyOf": [schema]}
    with pytest.raises(ValueError, match="more than 100 lists and objects"):
        engine.grammars.compile({"json_schema": schema})


def test_patterns_that_a_text_would_have_to_follow_all_at_once_are_bounded(engine):
    patterns = [{"pattern": f".*{letter}.*"} for letter in "abcdefghijklmnopqrstuvw"]
    chain = {f"d{place}": {"$ref": f"#/$defs/d{place + 1}", **each} for place, each in enumerate(patterns)}
    chain |= {f"d{len(patterns)}": {"type": "string"}}
    beside = {"anyOf": patterns[1:], "pattern": "z"}
    for schema in ({"allOf": patterns}, {"$defs": chain, "$ref": "#/$defs/d0"}, beside):
        with pytest.raises(ValueError, match="has 23 patterns and formats, and combines schemas"):
            engine.check(SamplingParams(grammar={"json_schema": schema}))
    several = {f"v{place}": {"type": "string", **each} for place, each in enumerate(patterns)}
    each_alone = {"type": "object", "properties": several, "title": "Letters"}
    listed = {"$defs": {"letters": {"allOf": [each_alone]}}, "$ref": "#/$defs/letters", "description": "one of them"}
    for schema in (each_alone, listed):
        engine.check(SamplingParams(grammar={"json_schema": schema}))


def test_a_request_has_its_grammar_compiled_before_its_first_step(bytes_pair, monkeypatch):
    engine, compiled = engine_of(bytes_pair), []
    engine.add_request("a", SamplingParams(n=3, max_tokens=4, grammar={"regex": "[ab]{4}"}))
    monkeypatch.setattr(engine.grammars, "compile", compiled.append)
    texts = [output.completion.text for _ in range(8) for output in engine.step() if output.completion is not None]
    assert (len(texts), compiled) == (3, [])
    assert all(re.fullmatch("[ab]{4}", text) for text in texts)


def test_a_grammar_that_grows_too_complex_ends_its_own_text(engine):
    bomb = SamplingParams(max_tokens=200, ignore_eos=True, grammar={"regex": "((a{1,1000}){1,1000}){1,1000}"})
    beside = SamplingParams(max_tokens=50, seed=1)
    expected = engine.generate("abc", beside)[0][0].text
    (first,), (second,) = engine.generate(["abc", "abc"], [bomb, beside])
    assert first.finish_reason == "error"
    assert first.error.startswith(GRAMMAR_FAULT)
    assert set(first.text) == {"a"}
    assert second.text == expected


def test_tokens_without_bytes_of_their_own_are_refused():
    tokenizer = train_tokenizer(TEXTS * 20, "wordpiece", 120)
    with pytest.raises(ValueError, match=r"cannot be enforced with this tokenizer: .* is WordPiece, not ByteLevel"):
        Engine(made(tokenizer), tokenizer).check(SamplingParams(grammar={"regex": "a"}))


def test_the_bytes_of_tokens_are_what_they_decode_to(pair):
    tokenizer, found = pair[1], token_bytes(pair[1])
    assert len(found) == len(tokenizer)
    ids = torch.randint(len(found), (50, 20), generator=torch.Generator().manual_seed(0)).tolist()
    for each in ids:
        text = tokenizer.decode(each, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert b"".join(found[number] for number in each).decode("utf-8", "replace") == text


def test_equal_grammars_are_compiled_once_and_the_least_used_are_forgotten(bytes_pair):
    grammars = Grammars(bytes_pair[1], 260)
    first = grammars.compile({"json_schema": SCHEMA})
    assert grammars.compile(json.loads(json.dumps({"json_schema": SCHEMA, "written": 3}))) is first
    for number in range(100):
        grammars.compile({"regex": f"a{{{number}}}"})
    assert grammars._compiled.cache_info().currsize <= 64
    assert grammars.compile({"json_schema": SCHEMA}) is not first


def test_without_the_library_it_is_said_what_to_install(bytes_pair, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=re.escape(install_command("serve"))):
        engine_of(bytes_pair).check(SamplingParams(grammar={"regex": "a"}))


def test_settings_of_a_file_take_a_grammar():
    assert params_from({"grammar": {"regex": "a"}}).grammar == {"regex": "a"}
    assert params_from({"grammar": None}).grammar is None
    with pytest.raises(ValueError, match="grammar is 'a': must be an object with json_schema or regex"):
        params_from({"grammar": "a"})

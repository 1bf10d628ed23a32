import json
import random
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

from bdh.generate.advance import Advancer
from bdh.generate.engine import Engine
from bdh.generate.params import EngineConfig, SamplingParams
from bdh.model.state import SynapticState


def drained(engine, *, each_step=lambda: None):
    """All outputs until there is nothing to do, and the completions by request and index."""
    outputs, found = [], {}
    while engine.has_work:
        each_step()
        for output in engine.step():
            outputs.append(output)
            if output.completion is not None:
                found[output.request_id, output.index] = output.completion
    return outputs, found


@pytest.fixture
def make_engine(byte_model, tokenizer):
    def make(model=None, **config):
        return Engine(model or byte_model, tokenizer, config=EngineConfig(**config))

    return make


@pytest.fixture
def engine(make_engine):
    return make_engine()


def mixed_requests(count, seed):
    """Prompts of 1 to 150 bytes, greedy and sampled, of different lengths."""
    draw = random.Random(seed)
    requests = []
    for number in range(count):
        prompt = bytes(draw.choices(range(32, 127), k=draw.choice([1, 5, 30, 150]))).decode()
        params = SamplingParams(max_tokens=draw.randint(1, 40), seed=number)
        if number % 3 == 0:
            params.temperature = 0
        if number % 3 == 1:
            params.repetition_penalty, params.frequency_penalty, params.top_p = 1.2, 0.5, 0.9
        requests.append((prompt, params))
    return requests


def test_requests_that_come_and_go_write_what_each_writes_alone(make_engine):
    requests = mixed_requests(16, seed=1)
    alone = [make_engine().generate(prompt, params)[0][0] for prompt, params in requests]
    engine, waiting = make_engine(tokens_per_step=24, max_running=5), list(requests)

    def arrive():
        for _ in range(min(len(waiting), arrivals.randint(0, 2))):
            engine.add_request(*waiting.pop(0))

    arrivals = random.Random(2)
    engine.add_request(*waiting.pop(0))
    found = {}
    while waiting or engine.has_work:
        arrive()
        found |= {o.request_id: o.completion for o in engine.step() if o.completion is not None}
    assert [found[number].token_ids for number in range(16)] == [each.token_ids for each in alone]
    assert [found[number].text for number in range(16)] == [each.text for each in alone]


def test_the_outputs_of_the_steps_are_the_text_of_the_whole(engine):
    for prompt, params in mixed_requests(6, seed=3):
        engine.add_request(prompt, params)
    outputs, found = drained(engine)
    for (number, index), completion in found.items():
        of_it = [o for o in outputs if (o.request_id, o.index) == (number, index)]
        assert "".join(o.text for o in of_it) == completion.text
        assert [t for o in of_it for t in o.token_ids] == completion.token_ids
        assert [o.completion is not None for o in of_it] == [False] * (len(of_it) - 1) + [True]


def test_texts_are_those_of_the_models_generate(byte_model, tokenizer, engine):
    """The first continuation has the seed itself, and the same samplers in the same order."""
    for settings in ({"temperature": 0}, {"seed": 3, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01}):
        ours = engine.generate("The ", SamplingParams(max_tokens=40, **settings))[0][0]
        theirs = byte_model.generate_text(tokenizer, "The ", max_new_tokens=40, **settings)
        assert ours.text == theirs


@pytest.mark.parametrize("path", ["kernels", "torch"])
def test_greedy_tokens_are_those_of_the_whole_text_read_anew(byte_model, make_engine, path):
    prompt = list(b"Some prompt, of 30 characters.")
    found = make_engine(path=path).generate([prompt], SamplingParams(max_tokens=30, temperature=0))[0][0]
    tokens = list(prompt)
    for _ in range(30):
        with torch.no_grad():
            tokens.append(int(byte_model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    assert found.token_ids == tokens[30:]
    assert (found.finish_reason, found.num_prompt_tokens) == ("length", 30)


def test_states_are_admitted_by_their_bytes(make_engine, byte_model):
    state_bytes = Advancer(byte_model).state_bytes
    engine = make_engine(max_state_bytes=3 * state_bytes + 1)
    for number in range(7):
        engine.add_request("abc", SamplingParams(max_tokens=10 + number, temperature=0))
    seen = []
    _, found = drained(engine, each_step=lambda: seen.append(engine.stats()))
    assert max(stats.state_bytes for stats in seen) == 3 * state_bytes
    assert max(stats.running for stats in seen) == 3
    assert sorted(len(each.token_ids) for each in found.values()) == list(range(10, 17))
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.state_bytes) == (0, 0, 0)
    assert stats.finished == {"length": 7}
    assert stats.generated_tokens == sum(range(10, 17))
    assert stats.prompt_tokens == 21
    with pytest.raises(ValueError, match="n is 4: must be at most 3, the states of"):
        engine.add_request("abc", SamplingParams(n=4))
    with pytest.raises(ValueError, match="max_state_bytes is 100: must be at least"):
        make_engine(max_state_bytes=100)


def test_a_long_prompt_does_not_keep_others_from_their_next_token(make_engine):
    engine = make_engine(tokens_per_step=16)
    quick = engine.add_request("ab", SamplingParams(max_tokens=60, ignore_eos=True))
    engine.step()
    long = engine.add_request([65] * 500, SamplingParams(max_tokens=1))
    steps = 0
    while engine.has_work:
        steps += 1
        written = {output.request_id for output in engine.step()}
        if steps <= 30:
            assert written == {quick}  # in every step, while the other is read: 15 tokens a step
        if long in written:
            break
    assert steps == 34


def test_many_that_write_do_not_starve_a_prompt(make_engine):
    engine = make_engine(tokens_per_step=8, max_running=20)
    for _ in range(10):
        engine.add_request("a", SamplingParams(max_tokens=100, ignore_eos=True))
    for _ in range(12):
        engine.step()
    late = engine.add_request("abcdef", SamplingParams(max_tokens=3))
    steps = 1
    while not any(output.request_id == late for output in engine.step()):
        steps += 1
    assert steps <= 6


def test_several_continuations_read_the_prompt_once(engine, make_engine):
    params = SamplingParams(max_tokens=25, n=4, seed=5)
    completions = engine.generate("A prompt", params)[0]
    assert engine.stats().prompt_tokens == 8
    assert len({completion.text for completion in completions}) == 4
    again = make_engine().generate("A prompt", params)[0]
    assert [c.text for c in again] == [c.text for c in completions]
    for index, completion in enumerate(completions):
        single = SamplingParams(max_tokens=25, seed=params.seed_of(index))
        assert make_engine().generate("A prompt", single)[0][0].text == completion.text
    greedy = engine.generate("A prompt", SamplingParams(max_tokens=9, n=2, temperature=0))[0]
    assert greedy[0].token_ids == greedy[1].token_ids


def test_without_a_seed_texts_differ(engine):
    texts = {engine.generate("A", SamplingParams(max_tokens=30))[0][0].text for _ in range(3)}
    assert len(texts) == 3


def test_stop_strings_and_tokens_end_a_text_and_are_no_part_of_it(engine):
    whole = engine.generate("The ", SamplingParams(max_tokens=60, seed=1))[0][0]
    stop = next(whole.text[i : i + 2] for i in range(10, 50) if "\ufffd" not in whole.text[i : i + 2])
    cut = engine.generate("The ", SamplingParams(max_tokens=60, seed=1, stop=["never there", stop]))[0][0]
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    token = whole.token_ids[20]
    ended = engine.generate("The ", SamplingParams(max_tokens=60, seed=1, stop_token_ids=[token]))[0][0]
    assert ended.token_ids == whole.token_ids[: whole.token_ids.index(token)]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", token)


def test_the_models_own_end_counts_unless_it_is_ignored(byte_model, make_engine):
    free = make_engine().generate("The ", SamplingParams(max_tokens=30, seed=1))[0][0]
    byte_model.generation_config.eos_token_id = end = free.token_ids[10]
    engine = make_engine()
    ended = engine.generate("The ", SamplingParams(max_tokens=30, seed=1))[0][0]
    assert ended.token_ids == free.token_ids[: free.token_ids.index(end)]
    ignoring = engine.generate("The ", SamplingParams(max_tokens=30, seed=1, ignore_eos=True))[0][0]
    assert ignoring.token_ids == free.token_ids
    later = engine.generate("The ", SamplingParams(max_tokens=30, min_tokens=20, seed=1))[0][0]
    assert end not in later.token_ids[:20]
    assert len(later.token_ids) >= 20


def test_log_probabilities_are_the_models(byte_model, engine):
    params = SamplingParams(max_tokens=12, seed=2, temperature=0.5, presence_penalty=2, logprobs=3, prompt_logprobs=2)
    completion = engine.generate("A prompt", params)[0][0]
    tokens = [*b"A prompt", *completion.token_ids]
    with torch.no_grad():
        expected = byte_model(torch.tensor([tokens]), use_cache=False).logits[0].log_softmax(-1)
    entries = completion.prompt_logprobs + completion.logprobs
    assert entries[0] is None
    assert [entry.token for entry in entries[1:]] == tokens[1:]
    for place, entry in enumerate(entries[1:]):
        top = expected[place].topk(len(entry.top))
        assert entry.logprob == pytest.approx(float(expected[place, entry.token]), abs=1e-4)  # another order of sums
        assert [token for token, _ in entry.top] == top.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(top.values.tolist(), abs=1e-4)
        assert len(entry.top) == (2 if place < 7 else 3)


def test_prompt_log_probabilities_of_a_prompt_in_pieces(make_engine):
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    prompt = [random.Random(1).randrange(256) for _ in range(90)]
    whole = make_engine(tokens_per_step=1000).generate([prompt], params)[0][0]
    pieces = make_engine(tokens_per_step=7).generate([prompt], params)[0][0]
    assert [e.logprob for e in pieces.prompt_logprobs[1:]] == [e.logprob for e in whole.prompt_logprobs[1:]]
    assert len(pieces.prompt_logprobs) == 90
    assert (pieces.token_ids, pieces.finish_reason) == ([], "length")


def test_echo_puts_the_prompt_in_front(engine):
    params = {"max_tokens": 8, "seed": 4}
    plain = engine.generate("Say é: ", SamplingParams(**params))[0][0]
    engine.add_request("Say é: ", SamplingParams(echo=True, **params))
    outputs, found = drained(engine)
    (completion,) = found.values()
    assert completion.text == "Say é: " + plain.text == "".join(output.text for output in outputs)


def test_aborted_requests_give_what_they_have_and_their_states(engine):
    first = engine.add_request("abc", SamplingParams(max_tokens=50, seed=1, ignore_eos=True))
    second = engine.add_request("abc", SamplingParams(max_tokens=5, n=2, temperature=0))
    for _ in range(4):
        engine.step()
    engine.abort(first)
    engine.abort(12345)  # unknown, or ended long ago
    _, found = drained(engine)
    assert found[first, 0].finish_reason == "abort"
    assert len(found[first, 0].token_ids) == 4
    assert found[second, 1].finish_reason == "length"
    assert engine.stats().state_bytes == 0
    waiting = engine.add_request("abc")
    engine.abort(waiting)
    _, found = drained(engine)
    assert found[waiting, 0].finish_reason == "abort"
    assert engine.stats().state_bytes == 0


class Failing(Advancer):
    """Cannot read the byte Z."""

    def read_all(self, inputs):
        if any(ord("Z") in each.tokens for each in inputs):
            raise RuntimeError("no Z today")
        return super().read_all(inputs)


def test_an_exception_ends_its_own_request_only(byte_model, tokenizer):
    engine = Engine(byte_model, tokenizer, advancer=Failing(byte_model, path="torch"))
    params = SamplingParams(max_tokens=10, temperature=0, logit_bias={ord("Z"): -1000.0}, n=2)
    good = engine.add_request("abc", params)
    bad = engine.add_request("abZ", params)
    with torch.no_grad():
        _, found = drained(engine)
    assert [found[bad, index].finish_reason for index in (0, 1)] == ["error", "error"]
    assert found[bad, 0].error == "no Z today"
    assert found[good, 0].finish_reason == "length"
    assert engine.generate("abc", params)[0][0].token_ids == found[good, 0].token_ids
    assert engine.stats().state_bytes == 0


def test_logits_that_are_no_numbers_end_the_request(byte_model, engine):
    with torch.no_grad():
        byte_model.lm_head.weight[3] = torch.nan
    completion = engine.generate("abc")[0][0]
    assert completion.finish_reason == "error"
    assert "NaN" in completion.error
    assert engine.stats().state_bytes == 0


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("", {}, "the prompt is empty, and this tokenizer has no <bos>"),
        ([], {}, "the prompt has no tokens"),
        ([3, 256, -1], {}, r"the prompt has the token ids \[256, -1\]: must be within 0 and 255"),
        ("a", {"temperature": -1.0}, "temperature is -1.0: must be 0"),
        ("a", {"temperature": float("nan")}, "temperature is nan"),
        ("a", {"top_p": 0.0, "top_k": -1}, "2 settings are wrong"),
        ("a", {"logit_bias": {300: 1.0}}, r"logit_bias is \[300\]: must be token ids within 0 and 255"),
        ("a", {"stop_token_ids": [-1]}, "stop_token_ids"),
        ("a", {"n": 0}, "n is 0: must be at least 1"),
        ("a", {"min_tokens": 9, "max_tokens": 8}, "min_tokens is 9"),
        ("a", {"stop": [""]}, "stop"),
    ],
)
def test_wrong_requests_are_refused_and_change_nothing(engine, prompt, settings, message):
    good = engine.add_request("abc", SamplingParams(max_tokens=3))
    with pytest.raises(ValueError, match=message):
        engine.add_request(prompt, SamplingParams(**settings))
    _, found = drained(engine)
    assert list(found) == [(good, 0)]


def test_an_empty_prompt_begins_with_the_token_that_texts_begin_with(make_model, tokenizer):
    import copy

    with_bos = copy.deepcopy(tokenizer)
    with_bos.add_special_tokens({"bos_token": "<bos>"})
    engine = Engine(make_model(vocab_size=257), with_bos)
    assert engine.generate("", SamplingParams(max_tokens=3))[0][0].num_prompt_tokens == 1


def test_a_snapshot_goes_on_as_if_it_had_never_stopped(make_engine):
    params = SamplingParams(max_tokens=40, seed=6, frequency_penalty=0.3, repetition_penalty=1.1, logprobs=1)
    params.logit_bias = dict.fromkeys(range(128, 256), -1000.0)  # no characters of several bytes, cut in their middle
    whole = make_engine().generate("A prompt", params)[0][0]
    engine = make_engine()
    params.max_tokens = 15
    engine.add_request("A prompt", params, keep_snapshot=True)
    _, found = drained(engine)
    (part,) = found.values()
    params.max_tokens = 25
    other = make_engine(tokens_per_step=3)
    before = part.snapshot.state.clone()
    for _ in range(2):  # it can be used more than once
        other.add_request(None, params, snapshot=part.snapshot)
        _, found = drained(other)
        (rest,) = found.values()
        assert part.token_ids + rest.token_ids == whole.token_ids
        assert part.text + rest.text == whole.text
        assert part.logprobs + rest.logprobs == whole.logprobs
    torch.testing.assert_close(part.snapshot.state.tensors, before.tensors, rtol=0, atol=0)
    assert other.stats().prompt_tokens == 2  # the one token that was pending, each time


@pytest.mark.slow
def test_a_saved_sequence_goes_on_in_another_process(byte_model, tokenizer, make_engine, tmp_path):
    """Bit for bit: tokens and log-probabilities, sampled with penalties."""
    byte_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    params = SamplingParams(max_tokens=40, seed=6, presence_penalty=0.3, top_p=0.95, logprobs=2)
    whole = make_engine().generate("A prompt", params)[0][0]
    engine = make_engine()
    engine.add_request("A prompt", SamplingParams(**{**vars(params), "max_tokens": 15}), keep_snapshot=True)
    _, found = drained(engine)
    (part,) = found.values()
    part.snapshot.save(tmp_path / "part.safetensors", byte_model)
    program = (
        "import sys, json; from dataclasses import asdict; from pathlib import Path\n"
        "from bdh.train.models import load_model; from bdh.generate.engine import Engine\n"
        "from bdh.generate.params import SamplingParams; from bdh.generate.snapshot import Snapshot\n"
        "folder = Path(sys.argv[1]); model, tokenizer = load_model(str(folder / 'model')); engine = Engine(model, tokenizer)\n"
        "params = SamplingParams(max_tokens=25, seed=6, presence_penalty=0.3, top_p=0.95, logprobs=2)\n"
        "engine.add_request(None, params, snapshot=Snapshot.load(folder / 'part.safetensors', model))\n"
        "while engine.has_work:\n"
        "    for output in engine.step():\n"
        "        if output.completion: print(json.dumps([output.completion.token_ids, [asdict(e) for e in "
        "output.completion.logprobs]]))\n"
    )
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    token_ids, logprobs = json.loads(run.stdout)
    assert part.token_ids + token_ids == whole.token_ids
    expected = [asdict(entry) for entry in whole.logprobs[15:]]
    assert logprobs == json.loads(json.dumps(expected))


def test_text_can_follow_a_snapshot(make_engine):
    engine = make_engine()
    greedy = SamplingParams(max_tokens=10, temperature=0)
    engine.add_request("First. ", greedy, keep_snapshot=True)
    _, found = drained(engine)
    (first,) = found.values()
    engine.add_request("Second.", greedy, snapshot=first.snapshot)
    _, found = drained(engine)
    (second,) = found.values()
    whole = [*b"First. ", *first.token_ids, *b"Second."]
    assert second.token_ids == make_engine().generate([whole], greedy)[0][0].token_ids


def test_a_snapshot_of_another_kind_of_state_is_refused(make_engine):
    engine = make_engine()
    engine.add_request("abc", SamplingParams(max_tokens=2), keep_snapshot=True)
    _, found = drained(engine)
    (completion,) = found.values()
    with pytest.raises(ValueError, match="make the engine with the same settings"):
        make_engine(state="bfloat16").add_request(None, snapshot=completion.snapshot)


def test_a_snapshot_in_int16_whose_rows_were_written_at_each_token_is_refused_by_name(make_engine):
    engine = make_engine(state="int16")
    engine.add_request("abc", SamplingParams(max_tokens=2), keep_snapshot=True)
    _, found = drained(engine)
    (completion,) = found.values()
    config = engine.model.config
    shape = config.n_head, config.neurons_per_head
    shapes = {"sums": (torch.int16, (*shape, config.n_embd)), "scales": (torch.float32, (*shape, 2))}
    earlier = SynapticState.empty("sums int16", shapes, config.n_layer)
    with pytest.raises(ValueError, match=r"state is \('sums int16'.*this engine's are \('rows int16'"):
        engine.add_request(None, snapshot=replace(completion.snapshot, state=earlier))
    engine.add_request(None, snapshot=completion.snapshot)


def test_a_shared_beginning_is_read_once_and_changes_no_bit(make_engine):
    shared = [random.Random(4).randrange(256) for _ in range(600)]
    requests = [shared + list(f"question {number}".encode()) for number in range(4)]
    params = SamplingParams(max_tokens=12, seed=9, logprobs=2)
    cold = [make_engine().generate([tokens], params)[0][0] for tokens in requests]
    engine = make_engine(prefix_cache_bytes=1 << 30)
    warm = [engine.generate([tokens], params)[0][0] for tokens in [*requests, requests[0]]]
    for a, b in zip(cold, warm, strict=False):
        assert (a.token_ids, a.logprobs) == (b.token_ids, b.logprobs)
    assert warm[-1].token_ids == cold[0].token_ids
    cached = [each.num_cached_tokens for each in warm]
    assert cached[0] == 0
    assert cached[1] >= 570  # a place a little before the first prompt's end
    assert cached[2] == cached[3] == cached[1]  # where they part, nearby, no further state is worth its copy
    assert cached[4] == cached[1]  # of a long prompt the end itself is not stored
    stats = engine.stats()
    assert stats.prefix_cache_hits == 4
    assert stats.prefix_cache_tokens == sum(cached)
    assert stats.prompt_tokens == sum(map(len, [*requests, requests[0]])) - sum(cached)


def test_a_prompt_that_was_read_before_is_not_read_again(make_engine):
    prompt = "all of it, with the logits behind it. " * 3
    params = SamplingParams(max_tokens=5, seed=3, logprobs=1)
    engine = make_engine(prefix_cache_bytes=1 << 30)
    first, again = (engine.generate(prompt, params)[0][0] for _ in range(2))
    assert (first.num_cached_tokens, again.num_cached_tokens) == (0, len(prompt))
    assert (first.token_ids, first.logprobs) == (again.token_ids, again.logprobs)
    assert engine.stats().prompt_tokens == len(prompt)


def test_short_prompts_are_not_worth_a_state(make_engine):
    engine = make_engine(prefix_cache_bytes=1 << 30)
    short = [engine.generate("ab" * 31, SamplingParams(max_tokens=1))[0][0] for _ in range(2)]
    assert [each.num_cached_tokens for each in short] == [0, 0]


def test_where_prompts_part_a_state_is_stored(make_engine):
    draw = random.Random(5)
    shared = [draw.randrange(256) for _ in range(300)]
    requests = [shared + [draw.randrange(256) for _ in range(400)] for _ in range(3)]
    params = SamplingParams(max_tokens=6, temperature=0)
    engine = make_engine(prefix_cache_bytes=1 << 30)
    warm = [engine.generate([tokens], params)[0][0] for tokens in requests]
    assert [each.num_cached_tokens for each in warm] == [0, 0, 300]
    assert warm[2].token_ids == make_engine().generate([requests[2]], params)[0][0].token_ids


def test_a_state_that_is_to_be_stored_is_not_used_before(make_engine, byte_model):
    """A request ends in the step in which another one forks, into the state that it has left."""
    state_bytes = Advancer(byte_model).state_bytes
    engine = make_engine(prefix_cache_bytes=1 << 30, max_state_bytes=3 * state_bytes, tokens_per_step=100)
    one = SamplingParams(max_tokens=1, temperature=0)
    first = "first prompt " * 6
    engine.add_request(first, one)
    engine.add_request("second", SamplingParams(max_tokens=4, n=2, temperature=0))
    drained(engine)
    again = engine.generate(first, SamplingParams(max_tokens=9, temperature=0))[0][0]
    assert again.num_cached_tokens == len(first)
    expected = make_engine().generate(first, SamplingParams(max_tokens=9, temperature=0))[0][0]
    assert again.token_ids == expected.token_ids


def test_no_memory_for_the_cache_ends_no_request(make_engine, monkeypatch, caplog):
    engine = make_engine(prefix_cache_bytes=1 << 30)

    def put(*arguments):
        raise MemoryError("not a byte")

    monkeypatch.setattr(engine.prefixes.cache, "put", put)
    for _ in range(2):
        assert engine.generate("abc" * 30, SamplingParams(max_tokens=3))[0][0].finish_reason == "length"
    assert "could not be stored: not a byte" in caplog.text


def test_a_full_cache_of_beginnings_only_costs_time(make_engine, byte_model):
    state_bytes = Advancer(byte_model).state_bytes
    engine = make_engine(prefix_cache_bytes=int(2.5 * state_bytes))
    params = SamplingParams(max_tokens=5, temperature=0)
    for number in range(12):
        prompt = f"{number % 5} prompts " * 8
        assert engine.generate(prompt, params)[0][0].token_ids == make_engine().generate(prompt, params)[0][0].token_ids
        assert engine.stats().prefix_cache_bytes <= 2.5 * state_bytes


def test_results_come_in_order_with_few_requests_in_memory(make_engine):
    taken = []

    def requests():
        for number in range(40):
            taken.append(number)
            yield f"{number}", SamplingParams(max_tokens=1 + number % 7, temperature=0)

    engine = make_engine(max_running=3)
    for number, (completion,) in enumerate(engine.map(requests())):
        assert len(completion.token_ids) == 1 + number % 7
        assert len(taken) <= number + 7
    assert number == 39
    # Left before its end, it ends what still runs.
    results = engine.map(iter([("a", SamplingParams(max_tokens=100))] * 9))
    engine.add_request("b")
    with pytest.raises(ValueError, match="the engine is running other requests"):
        next(results)


def test_a_batch_that_is_left_leaves_nothing_behind(engine):
    results = engine.map(iter([("a", SamplingParams(max_tokens=3)), *[("b", SamplingParams(max_tokens=500))] * 9]))
    next(results)
    results.close()
    assert not engine.has_work
    assert engine.stats().state_bytes == 0


@pytest.mark.parametrize("seed", range(3))
def test_random_use_leaks_nothing(make_engine, byte_model, seed):
    draw = random.Random(seed)
    state_bytes = Advancer(byte_model).state_bytes
    engine = make_engine(
        max_state_bytes=6 * state_bytes, tokens_per_step=draw.choice([1, 8, 40]), prefix_cache_bytes=8 * state_bytes
    )
    snapshots, running, ended, refused = [], set(), {}, 0
    for _ in range(250):
        action = draw.random()
        if action < 0.25:
            settings = {
                "max_tokens": draw.choice([0, 1, 12, -1]),
                "n": draw.choice([1, 1, 2, 6, 7]),
                "temperature": draw.choice([0.0, 0.7, -0.1]),
                "top_k": draw.choice([0, 5]),
                "stop": draw.choice([[], ["a", "\n"]]),
                "logprobs": draw.choice([None, 2]),
                "prompt_logprobs": draw.choice([None, None, 1]),
                "logit_bias": draw.choice([{}, {3: 5.0}, {256: 1.0}]),
            }
            prompt = draw.choice(["", "abc", "abc" * 30, "abd" * 40, [1, 2, 999], list(range(100))])
            snapshot = draw.choice([None, *snapshots[-2:]])
            try:
                number = engine.add_request(
                    prompt, SamplingParams(**settings), snapshot=snapshot, keep_snapshot=draw.random() < 0.3
                )
                running.add(number)
            except ValueError:
                refused += 1
        elif action < 0.35 and running:
            engine.abort(draw.choice(sorted(running)))
        else:
            for output in engine.step():
                if output.completion is not None:
                    assert output.completion.finish_reason in ("stop", "length", "abort")
                    ended.setdefault(output.request_id, set()).add(output.index)
                    if output.completion.snapshot is not None:
                        snapshots.append(output.completion.snapshot)
        assert engine.stats().state_bytes <= 6 * state_bytes
        assert engine.stats().prefix_cache_bytes <= 8 * state_bytes
    _, found = drained(engine)
    for number, index in found:
        ended.setdefault(number, set()).add(index)
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.state_bytes) == (0, 0, 0)
    assert set(ended) == running
    assert refused
    assert sum(stats.finished.values()) == sum(map(len, ended.values()))


def test_the_advancer_sees_one_token_of_each_sequence_that_is_continued(byte_model, tokenizer):
    class Recording(Advancer):
        def read_all(self, inputs):
            steps.append(sorted(len(each.tokens) for each in inputs))
            return super().read_all(inputs)

    steps = []
    engine = Engine(byte_model, tokenizer, config=EngineConfig(tokens_per_step=10), advancer=Recording(byte_model))
    params = SamplingParams(max_tokens=3, temperature=0)
    engine.add_request("ab", params)
    engine.add_request("c" * 12, params)
    drained(engine)
    assert steps == [[2, 8], [1, 4], [1, 1], [1]]

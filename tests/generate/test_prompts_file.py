import json

import pytest

from bdh.generate.params import SamplingParams, params_from
from bdh.generate.prompts_file import num_done, read_jobs, result_lines
from bdh.generate.sequence import Completion

PARAMS = SamplingParams(max_tokens=5, temperature=0)


def results_of(jobs):
    completions = [[Completion(f"text {i}", [1, 2], "length") for i in range(job.params.n)] for job in jobs]
    return "".join(line for job, found in zip(jobs, completions, strict=True) for line in result_lines(job, found))


def test_each_line_of_a_text_is_a_prompt(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes('one\r\ntwo \u2028 still two\n\n{"prompt": 3}\nlast'.encode())
    assert [job.prompt for job in read_jobs(path, PARAMS)] == ["one", "two \u2028 still two", '{"prompt": 3}', "last"]


def test_objects_may_have_settings_of_their_own_and_more(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "a"},
        {"id": 7, "prompt": "b", "max_tokens": 9, "stop": "x", "logit_bias": {"65": -1}, "tags": ["t"]},
        {"messages": [{"role": "user", "content": "c"}], "seed": None},
        {
            "prompt": "d",
            "max_new_tokens": 3,
            "num_return_sequences": 1,
            "step": 4,
            "name": "n",
            "output": "o",
            "top": 1,
        },
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    first, second, third, fourth = read_jobs(path, PARAMS)
    assert (first.params, first.facts) == (PARAMS, {"prompt": "a"})
    assert second.params == SamplingParams(max_tokens=9, temperature=0, stop=["x"], logit_bias={65: -1.0})
    assert second.facts == {"id": 7, "tags": ["t"], "prompt": "b"}
    assert third.facts == {"messages": [{"role": "user", "content": "c"}]}
    assert fourth.params == SamplingParams(max_tokens=3, temperature=0)
    assert fourth.facts == {"step": 4, "name": "n", "output": "o", "top": 1, "prompt": "d"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: it is not JSON"),
        (
            '{"prompt": "a", "temprature": 0}',
            "line 2: temprature is not a setting of a prompt: did you mean temperature?",
        ),
        ('{"prompt": "a", "maxNewTokens": 1}', "did you mean max_new_tokens? Give your own data another name"),
        ('{"prompt": "a", "num_beams": 2}', "num_beams is not a setting of a prompt: it applies to all prompts"),
        ('{"prompt": "a", "regex": "b"}', 'write it as {"grammar": {"regex": PATTERN}}'),
        (
            '{"prompt": "a", "n": 1, "num_return_sequences": 2}',
            "num_return_sequences is another name for n, which is also given",
        ),
        ("[1]", "line 2: it is list, not an object"),
        ("{}", "line 2: it must have either a prompt or messages"),
        ('{"prompt": 3}', "line 2: prompt is 3: must be a string"),
        ('{"messages": []}', "must be a list of objects"),
        ('{"prompt": "a", "temperature": -1}', "line 2: temperature is -1: must be 0"),
        ('{"prompt": "a", "temperature": "hot"}', "temperature is 'hot': must be a number"),
        ('{"prompt": "a", "max_tokens": true}', "max_tokens is True: must be a whole number"),
        ('{"prompt": "a", "stop": [1]}', "must be a string or a list of strings"),
        ('{"prompt": "a", "text": "b"}', "text is reserved for results"),
        ('{"prompt": "a", "temperature": NaN}', "line 2: NaN is not a JSON number"),
        ('{"prompt": "a", "score": [-Infinity]}', "line 2: -Infinity is not a JSON number"),
        ('{"prompt": "a", "temperature": 1e999}', "line 2: temperature is inf: must be a finite number"),
        ('{"prompt": "a", "logit_bias": {"3": 1e999}}', "logit_bias is {3: inf}: must be of finite numbers only"),
        ('{"prompt": "a", "seed": 1, "seed": 2}', "line 2: seed is given twice: give it once"),
        ('{"prompt": "a", "logit_bias": {"3": 1, "3": 2}}', "line 2: 3 is given twice: give it once"),
        ('{"prompt": "a", "logit_bias": {"3": 1, "03": 2}}', "must be an object of numbers by token id, each once"),
    ],
)
def test_wrong_lines_are_named(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the text is looked at)
        read_jobs(path, PARAMS)
    assert message in str(caught.value)


def test_all_wrong_lines_are_told_at_once_but_not_thousands(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("[]\n" * 500)
    with pytest.raises(ValueError, match="line 10") as caught:
        read_jobs(path, PARAMS)
    assert "and 490 further lines" in str(caught.value)
    assert "line 11" not in str(caught.value)


def test_missing_and_empty_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file of prompts .*nowhere\.txt"):
        read_jobs(tmp_path / "nowhere.txt", PARAMS)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no prompts"):
        read_jobs(tmp_path / "empty.jsonl", PARAMS)


def test_what_is_done_is_found_wherever_the_file_was_torn(tmp_path):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"prompt {i} ü", "n": 1 + i % 2}) + "\n" for i in range(4)))
    jobs = read_jobs(prompts, PARAMS)
    data = results_of(jobs).encode()
    ends = [len(results_of(jobs[:count]).encode()) for count in range(5)]
    for size in range(len(data) + 1):
        output.write_bytes(data[:size])
        done, end = num_done(output, jobs)
        assert done == max(count for count in range(5) if ends[count] <= size)
        assert end == ends[done]


def test_results_of_other_prompts_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.txt").write_text("one\nthree\n")
    output = tmp_path / "out.jsonl"
    jobs, others = (read_jobs(tmp_path / name, PARAMS) for name in ("a.txt", "b.txt"))
    output.write_text(results_of(jobs))
    with pytest.raises(ValueError, match="line 2, is not a result of the prompt expected there, 'three'"):
        num_done(output, others)
    with pytest.raises(ValueError, match="2 lines, more than the 1 result of all prompts"):
        num_done(output, jobs[:1])
    output.write_text("precious\n")
    with pytest.raises(ValueError, match="line 1, is not a result"):
        num_done(output, jobs)


def test_unknown_settings_are_refused_by_name():
    with pytest.raises(ValueError, match="temprature is not a sampling parameter"):
        params_from({"temprature": 1})
    assert params_from({"stop": "a", "seed": None, "top_p": 1}) == SamplingParams(stop=["a"])

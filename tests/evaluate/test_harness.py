"""The harness itself runs here, on local tasks."""

import json
import math

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance

from bdh import BDHConfig, BDHForCausalLM
from bdh.evaluate.harness import HarnessModel, evaluate_tasks
from bdh.tokenizer import byte_tokenizer

QUESTIONS = [
    {"question": f"What comes after {n}?", "choices": [str(n + 1), str(n + 7), "none", "it is long"], "answer": n % 4}
    for n in range(12)
]
TEXTS = [{"page": text} for text in ("A short one.", "Die Straße ist naß, " * 8, "x", "One two three four. " * 5)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(5)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "mlp_internal_dim_multiplier": 8}
    return BDHForCausalLM(BDHConfig(**sizes, initializer_range=0.5)).eval()


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with a task of each kind, whose data are beside them."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()

    def write(name, rows, **fields):
        (folder / f"{name}.json").write_text("\n".join(map(json.dumps, rows)))
        files = {"data_files": {"test": str(folder / f"{name}.json")}, "cache_dir": str(tmp_path / "cache")}
        task = {"task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", **fields}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))

    write(
        "local_choice",
        QUESTIONS,
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="choices",
        doc_to_target="answer",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )
    measures = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    write(
        "local_pages",
        TEXTS,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{page}}",
        metric_list=[{"metric": name} for name in measures],
    )
    return folder


def log_probabilities(model, tokens: list[int]) -> torch.Tensor:
    """Of all tokens but the first, each seeing all before it, in one plain forward pass."""
    ids = torch.tensor([tokens])
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits[0].double()
    return logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]


def adapter(model, **fields) -> HarnessModel:
    return HarnessModel(model, byte_tokenizer(), **{"max_length": 512, "batch_size": 5, **fields})


def request(kind, *arguments) -> Instance:
    return Instance(kind, {}, arguments, 0)


def test_accuracy_and_perplexity_are_those_computed_from_the_model(model, tasks):
    scores = {(s.task, s.metric): s for s in evaluate_tasks(adapter(model), [str(tasks)])}
    right = 0
    for row in QUESTIONS:
        question = list(row["question"].encode())
        sums = []
        for choice in row["choices"]:
            answer = list(f" {choice}".encode())
            sums.append(log_probabilities(model, question + answer)[-len(answer) :].sum().item())
        right += sums.index(max(sums)) == row["answer"]
    accuracy = scores["local_choice", "acc"]
    assert accuracy.value == right / len(QUESTIONS)
    assert accuracy.num_samples == len(QUESTIONS)
    nats = sum(log_probabilities(model, [10, *row["page"].encode()]).sum().item() for row in TEXTS)
    num_bytes = sum(len(row["page"].encode()) for row in TEXTS)
    found = scores["local_pages", "bits_per_byte"].value
    assert found == pytest.approx(-nats / num_bytes / math.log(2), rel=1e-5)
    assert scores["local_pages", "byte_perplexity"].value == pytest.approx(math.exp(-nats / num_bytes), rel=1e-5)


@pytest.mark.parametrize("how", ["file", "name", "limit"])
def test_a_task_is_found_by_its_file_or_its_name_in_a_folder(model, tasks, how):
    if how == "file":
        scores = evaluate_tasks(adapter(model), [str(tasks / "local_choice.yaml")])
    else:
        limit = 4 if how == "limit" else None
        scores = evaluate_tasks(adapter(model), ["local_choice"], include_path=str(tasks), limit=limit)
    assert {score.task for score in scores} == {"local_choice"}
    assert scores[0].num_samples == (4 if how == "limit" else 12)


@pytest.mark.slow
def test_git_says_nothing_outside_of_a_repository(model, tasks, tmp_path, monkeypatch, capfd):
    """The harness asks it for a commit: `fatal: not a git repository` stood above the figures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    lm = HarnessModel(model, byte_tokenizer(), max_length=None)
    evaluate_tasks(lm, [str(tasks / "local_choice.yaml")])
    assert "git" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_task_that_is_not_there_is_named(model, tasks):
    with pytest.raises(ValueError, match="there is no task local_riddles"):
        evaluate_tasks(adapter(model), ["local_riddles"], include_path=str(tasks))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        evaluate_tasks(adapter(model), ["nowhere.yaml"])


def test_a_file_that_holds_no_task_is_named_beside_one_that_does(model, tasks, tmp_path):
    """It was left out without a word."""
    (tmp_path / "empty.yaml").write_text("metric_list: []\n")
    with pytest.raises(ValueError, match=r"empty\.yaml holds no task"):
        evaluate_tasks(adapter(model), [str(tasks / "local_choice.yaml"), str(tmp_path / "empty.yaml")])


def test_scores_do_not_depend_on_what_shares_the_batch(model):
    pairs = [("The cat", " sat"), ("", "\nAlone"), ("A much longer context than the others", " x"), ("a ", "b")]
    requests = [request("loglikelihood", *pair) for pair in pairs]
    together = adapter(model).loglikelihood(requests)
    for (context, continuation), (score, is_greedy) in zip(pairs, together, strict=True):
        before = list(context.rstrip().encode()) or [10]
        tokens = before + list((context + continuation).encode())[len(context.rstrip()) :]
        expected = log_probabilities(model, tokens)[len(before) - 1 :]
        assert score == pytest.approx(expected.sum().item(), abs=1e-4)
        assert not is_greedy
    assert adapter(model).loglikelihood([request("loglikelihood", "a", "")]) == [(0.0, True)]


def test_what_greedy_decoding_gives_is_greedy(model):
    context = "The cat"
    lm = adapter(model)
    arguments = {"until": ["never"], "max_gen_toks": 6}
    (text,) = lm.generate_until([request("generate_until", context, arguments)])
    ids = list(context.encode())
    with torch.no_grad():
        for _ in range(6):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    assert text == byte_tokenizer().decode(ids[-6:])
    # Bytes that are no text: the harness encodes the context alone, and with what follows it.
    lm.tok_encode = {context: ids[:-6], context + "?": ids}.__getitem__
    assert lm.loglikelihood([request("loglikelihood", context, "?")])[0][1] is True


def test_a_text_stops_at_its_stop_string_and_keeps_its_place(model):
    lm = adapter(model)
    contexts = ["abc", "The quick", "a", "zz top", "m", "xyz", "12"]
    free = {"until": [], "max_gen_toks": 20}
    whole = lm.generate_until([request("generate_until", context, free) for context in contexts])
    for context, text in zip(contexts, whole, strict=True):
        (alone,) = lm.generate_until([request("generate_until", context, free)])
        assert alone == text
        stop = text[3]
        (cut,) = lm.generate_until([request("generate_until", context, {**free, "until": [stop, ""]})])
        assert cut == text[: text.index(stop)]


def test_long_contexts_lose_their_beginning_and_are_counted(model):
    lm = adapter(model, max_length=16)
    long = "0123456789" * 5
    ((score, _),) = lm.loglikelihood([request("loglikelihood", long, "abc")])
    seen = list((long + "abc").encode())[-17:]  # 16 inputs
    assert score == pytest.approx(log_probabilities(model, seen)[-3:].sum().item(), abs=1e-4)
    assert lm.num_cut == 1
    arguments = {"until": [], "max_gen_toks": 5}
    cut, short = lm.generate_until([request("generate_until", text, arguments) for text in (long, long[-16:])])
    assert cut == short
    assert lm.num_cut == 2


def test_a_rolling_text_is_read_in_windows_that_predict_each_token_once(model):
    tokens = [10, *(b"The quick brown fox jumps over the lazy dog" * 2)]
    lm = adapter(model, max_length=32)
    (score,) = lm.loglikelihood_rolling([request("loglikelihood_rolling", bytes(tokens[1:]).decode())])
    expected = 0.0
    for start in range(1, len(tokens), 32):
        end = min(start + 32, len(tokens))
        seen = tokens[max(0, end - 33) : end]
        expected += log_probabilities(model, seen)[-(end - start) :].sum().item()
    assert score == pytest.approx(expected, abs=1e-4)
    assert lm.num_cut == 0


def test_without_a_limit_a_text_of_many_chunks_is_read_whole(model):
    text = " The quick brown fox jumps over the lazy dog." * 60
    lm = adapter(model, max_length=None)
    scores = lm.loglikelihood([request("loglikelihood", text, " End"), request("loglikelihood", "Short", " one")])
    for (score, _), whole in zip(scores, (text + " End", "Short one"), strict=True):
        expected = log_probabilities(model, list(whole.encode()))[-4:].sum().item()
        # The text is summed in other chunks than in one piece.
        assert score == pytest.approx(expected, abs=1e-3)


def test_a_setting_of_the_generation_without_meaning_is_named(model):
    with pytest.raises(ValueError, match="generation_kwargs of the task has penalty_alpha"):
        adapter(model).generate_until([request("generate_until", "a", {"until": [], "penalty_alpha": 0.6})])

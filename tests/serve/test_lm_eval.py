"""The LM Evaluation Harness over HTTP, and in process."""

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from bdh.evaluate.harness import HarnessModel


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


PAIRS = [
    ("The cat", " sat on the mat"),
    ("A longer context, with Straße and 鳥 in it,", " and so on"),
    ("x", "y"),
    ("What comes after", " this"),
]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_log_likelihoods_are_those_of_the_model_in_process(shared_server, bytes_pair, bpe_pair, kind, tmp_path):
    model, tokenizer = bytes_pair if kind == "bytes" else bpe_pair
    server = shared_server(model, tokenizer)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    over_http = LocalCompletionsAPI(
        model="tiny",
        base_url=f"{server.url}/v1/completions",
        tokenizer=str(tmp_path / "tokenizer"),
        tokenizer_backend="huggingface",
        num_concurrent=1,
        batch_size=3,
        max_length=512,
        max_retries=1,
        add_bos_token=False,
        eos_string="\n",
    )
    in_process = HarnessModel(model, tokenizer, max_length=512)
    expected = in_process.loglikelihood(requests("loglikelihood", *PAIRS))
    found = over_http.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    for (a, a_greedy), (b, b_greedy) in zip(expected, found, strict=True):
        assert a == pytest.approx(b, abs=1e-4)
        assert a_greedy == b_greedy
    settings = {"until": ["q"], "max_gen_toks": 12, "temperature": 0}
    asked = requests("generate_until", *((context, settings) for context, _ in PAIRS))
    assert over_http.generate_until(asked, disable_tqdm=True) == in_process.generate_until(asked)

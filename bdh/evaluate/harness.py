"""Evaluates a BDH model on tasks of the LM Evaluation Harness. Can only be imported if lm_eval is installed."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerFast

from bdh.evaluate import check_task_files, is_task_path
from bdh.generate.engine import Engine
from bdh.generate.params import EngineConfig, SamplingParams
from bdh.generate.texts import generate_text, params_of
from bdh.model import BDHForCausalLM
from bdh.model.network import inference
from bdh.tokenizer.plain import document_end_id

_MAX_LOGITS = 2**26  # in a forward pass: 256 MiB in float32
_CHUNK = 1024  # tokens in a forward pass, for texts that are read as a whole
_GENERATION = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_beams"}


@dataclass(frozen=True)
class TaskScore:
    """The value of one metric on one task."""

    task: str
    metric: str
    value: float
    stderr: float | None
    num_samples: int | None


class HarnessModel(TemplateLM):
    """The interface of a BDH model for the harness.

    If the tokenizer has neither ``<bos>`` nor ``<eos>``, texts start after a newline.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        max_length: the maximum number of tokens on which a prediction is based. The beginning of a longer context is
            cut off, and ``num_cut`` counts such contexts. None reads whole contexts, since the size of the model's
            state does not depend on the length.
        batch_size: the maximum number of sequences that are computed together.
    """

    def __init__(
        self,
        model: BDHForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_length: int | None,
        batch_size: int = 16,
    ):
        super().__init__()
        self._model, self.tokenizer = model, tokenizer
        self.max_length, self.batch_size, self.num_cut = max_length, batch_size, 0
        special = [i for i in (tokenizer.bos_token_id, document_end_id(tokenizer)) if i is not None]
        self._start: list[int] = special[:1] or self.tok_encode("\n")

    @property
    def eot_token_id(self) -> int:
        return self._start[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Returns the token ids of a text. What looks like a special token in it is encoded as plain text."""
        return list(self.tokenizer(string, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Returns, for each (context, continuation), the log-probability and whether greedy decoding generates it."""
        # The harness encodes both together and divides the tokens. It has no public name for this; checked with 0.4.13.
        pairs = [
            self._encode_pair(*each.args) if each.args[0] else ([], self.tok_encode(each.args[1])) for each in requests
        ]
        return self._scored([(context or self._start, continuation) for context, continuation in pairs])

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        return self._scored([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-probability of each whole text. Reads long ones in consecutive windows of ``max_length``."""
        pairs = [(self._start, self.tok_encode(request.args[0])) for request in requests]
        return [score for score, _ in self._scored(pairs, counts_cuts=False)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Returns the continuation of each context up to one of its stop strings."""
        asked = [(self._last_part(each.args[0]), *_sampling(each.args[1])) for each in requests]
        by_engine = self._engine.map((context, params) for context, params, num_beams in asked if num_beams == 1)
        texts = []
        for context, params, num_beams in asked:
            if num_beams > 1:
                texts.append(generate_text(self._model, self.tokenizer, context, params, num_beams=num_beams))
                continue
            (completion,) = next(by_engine)
            if completion.error is not None:
                raise RuntimeError(f"a text of the task could not be generated: {completion.error}")
            texts.append(completion.text)
        return texts

    @cached_property
    def _engine(self) -> Engine:
        return Engine(self._model, self.tokenizer, config=EngineConfig(max_running=self.batch_size))

    def _last_part(self, text: str) -> str:
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        if self.max_length is None or len(encoded["input_ids"]) <= self.max_length:
            return text or str(self.tokenizer.decode(self._start))
        self.num_cut += 1
        return text[encoded["offset_mapping"][-self.max_length][0] :]

    def _scored(
        self, pairs: Sequence[tuple[list[int], list[int]]], *, counts_cuts: bool = True
    ) -> list[tuple[float, bool]]:
        """Returns the log-probability of the second part of each pair, and whether all its tokens were the likeliest.

        The log-probability is the sum over the tokens of the second part, given the first.
        """
        windows: list[tuple[int, list[int], int]] = []  # (pair, tokens, how many at their end are predicted)
        for number, (context, continuation) in enumerate(pairs):
            tokens = context + continuation
            longest = self.max_length or len(tokens)
            for start in range(len(context), len(tokens), longest):
                end = min(start + longest, len(tokens))
                windows.append((number, tokens[max(0, end - 1 - longest) : end], end - start))
            self.num_cut += counts_cuts and len(tokens) - 1 > longest
        sums, greedy = [0.0] * len(pairs), [True] * len(pairs)
        windows.sort(key=lambda window: -len(window[1]))
        while windows:
            width = min(len(windows[0][1]) - 1, _CHUNK)
            size = max(1, min(self.batch_size, _MAX_LOGITS // (width * self._model.config.vocab_size)))
            for number, score, is_greedy in self._score_batch(windows[:size]):
                sums[number] += score
                greedy[number] &= is_greedy
            del windows[:size]
        return list(zip(sums, greedy, strict=True))

    def _score_batch(self, windows: list[tuple[int, list[int], int]]) -> Iterator[tuple[int, float, bool]]:
        longest = max(len(tokens) for _, tokens, _ in windows)
        # Padding is after the text, so no prediction depends on it.
        padded = torch.tensor([tokens + [0] * (longest - len(tokens)) for _, tokens, _ in windows])
        padded = padded.to(self._model.device)
        state = self._model.new_state(len(windows)) if longest - 1 > _CHUNK else None
        scores, hits = [], []
        with inference(self._model):
            for inputs, targets in zip(padded[:, :-1].split(_CHUNK, 1), padded[:, 1:].split(_CHUNK, 1), strict=True):
                logits = self._model(inputs, cache=state, use_cache=state is not None).logits.float()
                scores.append(logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0].double().cpu())
                hits.append((logits.argmax(-1) == targets).cpu())
        of_tokens, is_likeliest = torch.cat(scores, 1), torch.cat(hits, 1)  # (B, T - 1)
        for index, (number, tokens, num_predicted) in enumerate(windows):
            part = slice(len(tokens) - 1 - num_predicted, len(tokens) - 1)
            yield number, of_tokens[index, part].sum().item(), bool(is_likeliest[index, part].all())


def evaluate_tasks(
    lm: HarnessModel,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
) -> list[TaskScore]:
    """Runs tasks, and returns their scores in the order of their names.

    Args:
        lm: the model.
        tasks: names of tasks, groups or tags; YAML files; or folders, of which every task is run.
        include_path: a folder with further tasks.
        num_fewshot: the number of solved examples before each question; None for the number that the task sets.
        limit: the number of documents of each task; None for all.

    Raises:
        ValueError: a task does not exist.
        FileNotFoundError: a folder or file does not exist.
    """
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    names, manager = _found_tasks(tasks, include_path)
    counts = {"num_fewshot": num_fewshot, "limit": limit, "bootstrap_iters": 1000}
    # It also records its environment: git prints an error without a repository, and listing packages takes seconds.
    unused: Any = {"get_git_commit_hash": lambda: None, "add_env_info": lambda results: None}
    with patch.multiple("lm_eval.evaluator", create=True, **unused):
        results: Any = simple_evaluate(model=lm, tasks=names, task_manager=manager, log_samples=False, **counts)
    scores = []
    for task, figures in sorted((results["results"] | results.get("groups", {})).items()):
        num_samples = results.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in figures.items():
            metric, _, filter_name = key.partition(",")
            if isinstance(value, int | float) and filter_name and not metric.endswith("_stderr"):
                stderr = figures.get(f"{metric}_stderr,{filter_name}")
                stderr = stderr if isinstance(stderr, int | float) else None
                shown = metric if filter_name == "none" else f"{metric} ({filter_name})"
                scores.append(TaskScore(task, shown, value, stderr, num_samples))
    return scores


def _found_tasks(tasks: Sequence[str], include_path: str | None) -> tuple[list[str], TaskManager]:
    check_task_files(tasks, include_path)
    paths = [include_path] if include_path is not None else []
    names: list[str] = []
    for task in tasks:
        path = Path(task)
        if not is_task_path(task):
            names.append(task)
            continue
        paths.append(str(path if path.is_dir() else path.parent))
        found = TaskManager(include_path=paths[-1], include_defaults=False)
        held = [name for name, entry in found.task_index.items() if entry.yaml_path == path]
        if not (held := found.all_subtasks if path.is_dir() else held):
            raise ValueError(f"{task} holds no task: a task is a YAML file with `task: NAME` in it")
        names += held
    manager = TaskManager(include_path=paths, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):  # reading the harness's own tasks means thousands of files
        manager = TaskManager(include_path=paths)
    if unknown := sorted(set(names) - set(manager.all_tasks)):
        raise ValueError(
            f"there is no task {', '.join(unknown)}: `lm-eval ls tasks` lists the harness's own, and tasks may also "
            "be given as a YAML file or a folder"
        )
    return names, manager


def _sampling(arguments: dict[str, Any]) -> tuple[SamplingParams, int]:
    """Converts the ``generation_kwargs`` of a task to sampling parameters and a number of beams, which is 1 for none.

    Raises:
        ValueError: an argument is not supported.
    """
    given = dict(arguments)
    until = given.pop("until", None) or []
    stop = [each for each in ([until] if isinstance(until, str) else until) if each]
    max_tokens = given.pop("max_gen_toks", 256)
    samples = given.pop("do_sample", given.get("temperature", 0) > 0)
    if unknown := sorted(set(given) - _GENERATION):
        raise ValueError(
            f"generation_kwargs of the task has {', '.join(unknown)}: known are until, max_gen_toks, do_sample, "
            f"{', '.join(sorted(_GENERATION))}"
        )
    if not samples:
        given["temperature"] = 0.0
    num_beams = given.pop("num_beams", 1)
    settings = {"max_new_tokens": max_tokens, "stop": stop, "seed": 0, **given}
    return params_of(None, settings, num_beams=num_beams), num_beams

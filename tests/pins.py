"""What each path of the code computed for a tiny model: recorded once, and held by test_pins.py.

    python -m tests.pins            # writes tests/fixtures/pins/: with code whose results are known to be right

Only names of the public API, settings of the command line and torch's own optimizers are used, so that the records outlive
a restructuring; what is imported from deeper stands in one place, :func:`layer_options` and :func:`make_engine`.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from bdh import BDHConfig, BDHForCausalLM
from bdh.tokenizer import byte_tokenizer

FOLDER = Path(__file__).parent / "fixtures" / "pins"
SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "n_embd": 32,
    "n_head": 2,
    "n_layer": 2,
    "mlp_internal_dim_multiplier": 8,
    "dropout": 0.0,
    "chunk_size": 8,
}
DECAY = [6.0, None]
TEXT = (
    b"A dragon hatchling sat upon a hill and counted stars: one for the wind, two for the river, three for its mother. "
    b"When clouds came over, it sang, for whoever sings can count on in the dark without losing a single light. "
)
NUM_STEPS = 200
# In float32 the last bit of a sum, which differs between processors, grows about tenfold in three steps of this training: on an
# Intel Xeon it was 1e-6 from what an AMD EPYC had recorded after 8 steps, and 4e-5 after 16. float64 has the bits to follow it.
CHECKED_STEPS = {torch.float64: NUM_STEPS, torch.float32: 8}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
SHAPE = (2, 16)  # sequences and tokens of a training batch

# What may have to be adapted when the code is rearranged. ---------------------------------------------------------------


def layer_options(**fields: Any) -> Any:
    from bdh.ops.blocks.plan import LayerOptions

    return LayerOptions(**fields)


def make_engine(model: BDHForCausalLM, settings: dict[str, Any]) -> Any:
    from bdh.generate.engine import Engine
    from bdh.generate.params import EngineConfig

    return Engine(model, byte_tokenizer(), config=EngineConfig(max_state_bytes=10**8, **settings))


def continue_greedily(model: BDHForCausalLM, settings: dict[str, Any], prompts: list[list[int]], count: int) -> Any:
    """The engine's completions, with the log-probabilities of the two likeliest tokens."""
    from bdh.generate.params import SamplingParams

    engine = make_engine(model, settings)
    return [each[0] for each in engine.generate(prompts, SamplingParams(max_tokens=count, temperature=0, logprobs=2))]


# Training losses. -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """How a model is trained."""

    path: str
    form: str = "auto"
    dtype: torch.dtype = torch.float32
    decay: bool = False
    dropout: float = 0.0
    documents: bool = False
    blocks: bool = False  # of one sequence and 8 tokens, with recomputation

    @property
    def name(self) -> str:
        marks = ["decay"] * self.decay + ["dropout"] * (self.dropout > 0) + ["documents"] * self.documents
        marks += ["blocks"] * self.blocks
        return " ".join([str(self.dtype).removeprefix("torch."), self.path, self.form, *marks])


TRAININGS = [
    training
    for dtype in (torch.float64, torch.float32)
    for training in (
        Training("plain", "parallel", dtype),
        Training("plain", "chunked", dtype, decay=True, documents=True),
        Training("plain", "recurrent", dtype),
        Training("torch", "parallel", dtype, documents=True),
        Training("torch", "chunked", dtype, dropout=0.2),
        Training("torch", "auto", dtype, decay=True, blocks=True),
        Training("kernels", "parallel", dtype, documents=True),
        Training("kernels", "chunked", dtype, dropout=0.2),
        Training("kernels", "auto", dtype, decay=True, blocks=True),
    )
    if not (training.path == "kernels" and dtype == torch.float64)
]


def fresh_weights(config: BDHConfig) -> dict[str, torch.Tensor]:
    """float64 weights from NumPy's oldest generator, whose numbers are promised to stay."""
    random = np.random.RandomState(5)
    D, H, N, V = config.n_embd, config.n_head, config.neurons_per_head, config.vocab_size
    shapes = {
        "embed.weight": (V, D),
        "encoder.weight": (H * N, D),
        "decoder.weight": (D, H * N),
        "lm_head.weight": (V, D),
    }
    shapes |= {f"encoder_v.{h}.weight": (N, D) for h in range(H)}
    return {name: torch.from_numpy(random.standard_normal(shapes[name]) * 0.1) for name in sorted(shapes)}


def make_model(weights: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32, **fields: Any) -> BDHForCausalLM:
    model = BDHForCausalLM(BDHConfig(**{**SIZES, **fields})).to(dtype)
    model.load_state_dict(weights)
    return model


def batches(count: int, shape: tuple[int, int]) -> list[torch.Tensor]:
    random = np.random.RandomState(11)
    text = np.frombuffer(TEXT * 3, np.uint8).astype(np.int64)
    starts = random.randint(0, len(TEXT), (count, shape[0]))
    return [torch.from_numpy(np.stack([text[at : at + shape[1]] for at in row])) for row in starts]


def losses_of(training: Training, num_steps: int) -> list[float]:
    decay = DECAY if training.decay else None
    config = BDHConfig(**SIZES, decay=decay)
    fields = {"attention_form": training.form, "decay": decay, "dropout": training.dropout}
    model = make_model(fresh_weights(config), training.dtype, **fields).train()
    blocks = {"rows_per_block": 1, "tokens_per_block": 8, "recompute": "pass"} if training.blocks else {}
    model.layer_options = layer_options(path=training.path, **blocks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, eps=1e-6, weight_decay=0.1)
    starts = None
    if training.documents:
        starts = torch.zeros(SHAPE, dtype=torch.bool)
        starts[0, 5], starts[1, 0], starts[1, 11] = True, True, True
    losses = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for tokens in batches(num_steps, SHAPE):
            loss = model(tokens, labels=tokens, document_starts=starts).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


# Greedy continuations. --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Continuation:
    """How a trained model continues texts greedily."""

    name: str
    engine: dict[str, Any] | None = None  # settings; None for transformers' `generate`
    dtype: torch.dtype = torch.float32
    decay: bool = False
    form: str = "auto"
    tolerance: float = 1e-3  # of the leads


CONTINUATIONS = [
    *(Continuation(f"generate {form}", form=form) for form in ("auto", "parallel", "chunked", "recurrent")),
    Continuation("generate decay", decay=True),
    Continuation("generate float64", dtype=torch.float64),
    Continuation("generate bfloat16", dtype=torch.bfloat16, tolerance=0.15),
    *(
        Continuation(
            f"engine {path} {kind}".strip(),
            {"path": path, "window": 32 if kind == "window" else None},
            decay=kind == "decay",
        )
        for path in ("kernels", "torch")
        for kind in ("", "window", "decay")
    ),
    Continuation("engine torch float64", {"path": "torch"}, dtype=torch.float64),
    Continuation("engine torch bfloat16", {"path": "torch"}, dtype=torch.bfloat16, tolerance=0.15),
    Continuation("engine torch bfloat16 window", {"path": "torch", "window": 32}, dtype=torch.bfloat16, tolerance=0.15),
    *(
        Continuation(
            f"engine kernels {name}",
            {"path": "kernels", **settings},
            decay=name.endswith("decay"),
            tolerance=0.05 if "state" in settings else 0.005,
        )
        for name, settings in {
            "bfloat16 weights": {"weights": "bfloat16"},
            "bfloat16 state": {"state": "bfloat16"},
            "bfloat16 weights state decay": {"weights": "bfloat16", "state": "bfloat16"},
            "bfloat16 weights window": {"weights": "bfloat16", "window": 32},
        }.items()
    ),
]
NUM_NEW_TOKENS = 36
PROMPTS = [list(TEXT[:19]), list(TEXT[60:85]), list(TEXT[130:151])]


def trained_weights(decay: bool) -> dict[str, torch.Tensor]:
    return load_file(FOLDER / ("decay.safetensors" if decay else "paper.safetensors"))


def train_weights(decay: bool) -> dict[str, torch.Tensor]:
    """Until it knows the text by heart: the likeliest token is far ahead of the next then."""
    fields = {"decay": DECAY if decay else None}
    model = make_model(fresh_weights(BDHConfig(**SIZES, **fields)), **fields).train()
    model.layer_options = layer_options(path="kernels")
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for index, tokens in enumerate(batches(1200, (16, 64))):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, (1200 - index) / 600)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"decay {decay}: loss {loss.item():.4f}", file=sys.stderr)
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def continuations_of(case: Continuation) -> list[dict[str, Any]]:
    """For each prompt the text, and how far the logit of each of its tokens is ahead of the second."""
    decay = DECAY if case.decay else None
    weights = {name: weight.to(case.dtype) for name, weight in trained_weights(case.decay).items()}
    model = make_model(weights, case.dtype, attention_form=case.form, decay=decay).eval()
    if case.engine is None:
        return [_generated(model, prompt) for prompt in PROMPTS]
    found = []
    for completion in continue_greedily(model, case.engine, PROMPTS, NUM_NEW_TOKENS):
        leads = [each.top[0][1] - each.top[1][1] for each in completion.logprobs]
        found.append({"text": bytes(completion.token_ids).decode(), "leads": leads})
    return found


def _generated(model: BDHForCausalLM, prompt: list[int]) -> dict[str, Any]:
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=NUM_NEW_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    top = torch.cat(output.logits).float().topk(2).values  # (T, 2)
    text = bytes(output.sequences[0, len(prompt) :].tolist()).decode()
    return {"text": text, "leads": (top[:, 0] - top[:, 1]).tolist()}


def record() -> None:
    torch.set_num_threads(2)
    FOLDER.mkdir(parents=True, exist_ok=True)
    if "losses" not in sys.argv:
        for decay, name in ((False, "paper"), (True, "decay")):
            if "texts" not in sys.argv:
                save_file(train_weights(decay), FOLDER / f"{name}.safetensors")
        texts = {case.name: continuations_of(case) for case in CONTINUATIONS}
        for name, found in texts.items():
            print(f"{name:45} smallest lead {min(min(each['leads']) for each in found):.2f}", file=sys.stderr)
        rounded = {
            name: [{"text": each["text"], "leads": [round(lead, 5) for lead in each["leads"]]} for each in found]
            for name, found in texts.items()
        }
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(found)}" for name, found in rounded.items())
        (FOLDER / "texts.json").write_text(f"{{\n{lines}\n}}\n")
    losses = {each.name: torch.tensor(losses_of(each, NUM_STEPS), dtype=torch.float64) for each in TRAININGS}
    save_file(losses, FOLDER / "losses.safetensors")


if __name__ == "__main__":
    record()

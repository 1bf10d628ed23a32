"""A model as an ONNX file, which onnxruntime runs without PyTorch."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.export import Dim

from bdh.model.modeling import BDHForCausalLM
from bdh.model.state import SynapticState
from bdh.storage import atomic_file, sync


class _Reading(nn.Module):
    """The model with its state as two tensors."""

    def __init__(self, model: BDHForCausalLM):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, positions: torch.Tensor, sums: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        state = SynapticState(list(sums.unbind(0)), positions, 0)
        output = self.model(input_ids, attention_mask=attention_mask, past_key_values=state)
        return output.logits, state.positions, torch.stack(state.sums)


def export_onnx(model: BDHForCausalLM, path: str | Path) -> None:
    """Writes a model that reads on from a state, for every number of sequences B and of tokens T.

    ==============  =========================  ============================================================
    input           type and shape
    ==============  =========================  ============================================================
    input_ids       int64 (B, T)               the next tokens: a prompt, or one for each sequence
    attention_mask  int64 (B, T)               0 marks padding
    positions       int64 (B,)                 tokens read before; zeros start a text
    sums            float32 (L, B, H, N, D)    the state; zeros start a text
    ==============  =========================  ============================================================

    The outputs are logits (B, T, V), new_positions and new_sums: the inputs for what follows. All T x T scores are computed
    at once, so a long text is read in pieces of some hundred tokens. The model is in float32, and in evaluation mode.

    PyTorch writes weights of more than 1.5 GiB to a file of their own: ``model.onnx.data`` beside ``model.onnx``. They are
    moved together, and keep their names.

    Raises:
        ImportError: onnx and onnxscript are not installed.
        ValueError: the model is not in float32.
    """
    if model.dtype != torch.float32:
        raise ValueError(f"the model is in {model.dtype}: must be in float32 to be written as ONNX")
    batch, tokens = Dim("batch"), Dim("tokens")
    state = model.new_state(2)
    ids = torch.zeros(2, 3, dtype=torch.int64, device=model.device)
    was_training = model.training
    try:
        program = torch.onnx.export(
            _Reading(model).eval(),
            (ids, torch.ones_like(ids), state.positions, torch.stack(state.sums)),
            dynamic_shapes=({0: batch, 1: tokens}, {0: batch, 1: tokens}, {0: batch}, {1: batch}),
            input_names=["input_ids", "attention_mask", "positions", "sums"],
            output_names=["logits", "new_positions", "new_sums"],
            dynamo=True,
            verbose=False,
        )
    finally:
        model.train(was_training)
    assert program is not None
    path = Path(path)
    # In a folder of their own the files have their last names, by which the one refers to the other.
    with atomic_file(path) as temporary, TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        written, data = Path(folder, path.name), Path(folder, f"{path.name}.data")
        program.save(str(written))
        if data.exists():
            sync(data)
            data.replace(path.with_name(data.name))
        written.replace(temporary)

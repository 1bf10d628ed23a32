"""Snapshots of sequences: everything that a continuation depends on, in memory and in a file."""

import hashlib
import json
from copy import deepcopy
from dataclasses import dataclass, field, replace
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from bdh.model.fingerprint import Identity, identity, model_name
from bdh.model.network import ModelParts
from bdh.model.state import Pattern, SynapticState
from bdh.model.weights import weights_mark
from bdh.storage import atomic_file, check_file

_FORMAT_NAME = "bdh-snapshot-"
FILE_FORMAT = f"{_FORMAT_NAME}1"
_NO_CHECKSUM = "0" * 64  # the placeholder while the checksum is computed


@dataclass
class Snapshot:
    """A sequence at one point of its generation, from which it continues exactly as if it had not been interrupted."""

    state: SynapticState
    """The model's state, with the position."""
    tokens: list[int]
    """All tokens of the sequence so far, beginning with the prompt. Penalties depend on them."""
    logits: torch.Tensor | None
    """Float32 (V,): the logits for the token after the last one that the state has read; None before the first."""
    generator_state: torch.Tensor | None = None
    """The state of the sequence's ``torch.Generator``; None if it has none."""
    num_prompt_tokens: int = 0
    """The number of tokens that were given rather than generated."""
    pending: list[int] = field(default_factory=list)
    """The last of ``tokens`` that the state has not read yet."""
    decoder: dict[str, Any] = field(default_factory=dict)
    """The state of the text decoder, such as text that it holds back, as JSON types."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Data of the caller to store in the file, such as the messages of a conversation, as JSON types."""

    weights: tuple[Any, ...] | None = None
    """The mark of the weights that read the sequence (:attr:`WeightsMark.content`), or None if it was not recorded.

    Files store the model's fingerprint instead.
    """

    def check_for(self, pattern: Pattern, *, prompt_logprobs: bool) -> None:
        """Raises ``ValueError`` if an engine with states of this pattern cannot continue from the snapshot."""
        if prompt_logprobs:
            raise ValueError(
                "prompt_logprobs was given with a snapshot, whose tokens are not read again: must be left out"
            )
        if not self.tokens:
            raise ValueError("the snapshot has no tokens: there is nothing to continue")
        if self.state.pattern != pattern:
            raise ValueError(
                f"the snapshot's state is {self.state.pattern}, this engine's are {pattern}: "
                "make the engine with the same settings"
            )

    @property
    def nbytes(self) -> int:
        """The size of the tensors in bytes, which is nearly all of the snapshot."""
        return sum(each.nbytes for each in (self.state, self.logits, self.generator_state) if each is not None)

    def clone(self) -> "Snapshot":
        """Returns a copy that shares no memory with this snapshot."""
        return replace(
            self,
            state=self.state.clone(),
            tokens=list(self.tokens),
            logits=None if self.logits is None else self.logits.clone(),
            generator_state=None if self.generator_state is None else self.generator_state.clone(),
            pending=list(self.pending),
            decoder=deepcopy(self.decoder),
            notes=deepcopy(self.notes),
        )

    def save(self, path: str | Path, model: ModelParts) -> None:
        """Writes the snapshot to a safetensors file, atomically.

        Args:
            path: the file.
            model: the model of the sequence, whose fingerprint is stored.

        Raises:
            DiskFullError: the disk is full; an existing file stays as it was.
            FileNotFoundError: the folder does not exist.
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {path.parent} for the snapshot {path.name}")
        known = identity(model)
        tensors = {f"state.{name}": torch.cat(of_steps) for name, of_steps in self.state.tensors.items()}  # (L, ...)
        tensors["tokens"] = torch.tensor(self.tokens, dtype=torch.int64)
        for name, tensor in (("logits", self.logits), ("generator_state", self.generator_state)):
            if tensor is not None:
                tensors[name] = tensor.clone()  # safetensors refuses views of other tensors
        facts = {
            "kind": self.state.kind,
            "position": self.state.position,
            "num_prompt_tokens": self.num_prompt_tokens,
            "pending": self.pending,
            "decoder": self.decoder,
            "notes": self.notes,
            "model": {"name": model_name(model), "configuration": known.configuration, "weights": known.weights},
        }
        metadata = {"format": FILE_FORMAT, "facts": json.dumps(facts, sort_keys=True), "checksum": _NO_CHECKSUM}
        with atomic_file(path, private=True) as temporary:
            save_file({name: tensor.detach().cpu() for name, tensor in tensors.items()}, temporary, metadata=metadata)
            with temporary.open("r+b") as file:
                place = _place_of_checksum(file, _NO_CHECKSUM)
                checksum = _checksum(file, place)
                file.seek(place)
                file.write(checksum.encode())

    @classmethod
    def load(cls, path: str | Path, model: ModelParts) -> "Snapshot":
        """Reads a file that :meth:`save` wrote, onto the model's device.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is truncated, modified or not a snapshot, or the snapshot belongs to another model.
        """
        path = Path(path)
        check_file(path, "snapshot file")
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FILE_FORMAT:
                    raise ValueError(
                        f"{path} is not a snapshot that this version reads: its format is "
                        f"{metadata.get('format')!r}, not {FILE_FORMAT!r}"
                    )
                _check(path, metadata.get("checksum", ""))
                facts = json.loads(metadata["facts"])
                _refuse_others(path, model, facts["model"])
                # Copied because safetensors returns views of the mapped file, which may change.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a complete snapshot file: {error}") from error
        of_state = [name for name in tensors if name.startswith("state.")]
        sums = {name.removeprefix("state."): list(tensors[name].to(model.device).split(1)) for name in of_state}
        state = SynapticState(sums, torch.tensor([facts["position"]]), facts["position"], facts["kind"])
        return cls(
            state=state,
            tokens=tensors["tokens"].tolist(),
            logits=tensors.get("logits"),
            generator_state=tensors.get("generator_state"),
            num_prompt_tokens=facts["num_prompt_tokens"],
            pending=facts["pending"],
            decoder=facts["decoder"],
            notes=facts["notes"],
            weights=weights_mark(model).content,
        )


def is_snapshot(path: Path) -> bool:
    """Whether a file is a snapshot of any model, judging by its header."""
    try:
        with safe_open(path, framework="pt") as file:
            return str((file.metadata() or {}).get("format", "")).startswith(_FORMAT_NAME)
    except (SafetensorError, OSError):
        return False


def _refuse_others(path: Path, model: ModelParts, stored: dict[str, Any]) -> None:
    here, there = identity(model), Identity(stored["configuration"], stored["weights"])
    if difference := here.difference(there):
        of_which = f", {stored['name']!r}" if stored["name"] else ""
        raise ValueError(
            f"{path} is a snapshot of another model{of_which} (fingerprint {there.fingerprint[:12]}, this model's is "
            f"{here.fingerprint[:12]}): {difference}"
        )


def _check(path: Path, stored: str) -> None:
    """Raises ``ValueError`` unless the file matches its checksum."""
    with path.open("rb") as file:
        place = _place_of_checksum(file, stored)
        if len(stored) != len(_NO_CHECKSUM) or place < 0 or _checksum(file, place) != stored:
            raise ValueError(
                f"{path} has been altered since it was written, or the disk has damaged it: its checksum is wrong"
            )


def _place_of_checksum(file: BufferedIOBase, checksum: str) -> int:
    """Returns the offset of the checksum in the file, or -1 if the header does not contain it."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")  # the length of the header, which is JSON
    at = file.read(length).find(b'"checksum":"' + checksum.encode() + b'"')
    return at if at < 0 else 8 + at + len(b'"checksum":"')


def _checksum(file: BufferedIOBase, place: int) -> str:
    """Returns the SHA-256, in hex, of the file without the checksum itself, which is at offset ``place``."""
    file.seek(0)
    digest = hashlib.sha256(file.read(place))
    file.seek(place + len(_NO_CHECKSUM))
    return hashlib.file_digest(file, lambda: digest).hexdigest()

"""Saved states of clients: in memory, and with a folder also on the disk, where they survive a restart."""

import contextlib
import json
import logging
import os
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bdh.generate.snapshot import Snapshot
from bdh.serve.config import StateSettings
from bdh.serve.middleware import log
from bdh.storage import write_text

_PREFIXES = ("state-", "resp_")
_ID = re.compile(r"state-[\w-]{24}|resp_[0-9a-f]{32}")


@dataclass
class SavedState:
    """The description of a saved state, without its tensors."""

    id: str
    owner: str
    """The id of the caller that owns it."""
    created: float
    """The time at which it was saved, in seconds since 1970."""
    num_tokens: int
    nbytes: int
    model: str
    used: float = 0.0
    unfinished: dict[str, Any] | None = None
    """For a request that was cut off: the sampling parameters with which it is finished."""
    text: str | None = None
    """The text that such a request has generated."""
    tokenizer: str = ""
    """The hash of the tokenizer and its chat template; empty for states from versions that did not record it."""
    response: dict[str, Any] | None = None
    """For a stored response: the response, and the conversation that its state has read, as JSON."""
    response_bytes: int = 0
    """The size of ``response``."""

    @property
    def record(self) -> dict[str, Any]:
        """The ``response`` of a stored response."""
        assert self.response is not None
        return self.response


class StateStore:
    """Stores states and responses. Thread-safe. Methods that read or write files may be slow: call them in a thread.

    Args:
        model: the model whose states are stored. States of other models in the folder are refused.
        now: returns the time in seconds since 1970.
        tokenizer: the hash of the tokenizer and its chat template. States with another hash are refused.

    Raises:
        OSError: the folder cannot be created or read.
    """

    def __init__(
        self, settings: StateSettings, model: Any, now: Callable[[], float] = time.time, *, tokenizer: str = ""
    ):
        self._settings, self._model, self._now, self._tokenizer = settings, model, now, tokenizer
        self._folder = None if settings.folder is None else Path(settings.folder)
        self._capacity = settings.max_bytes if self._folder is None else settings.folder_bytes
        self._lock = threading.RLock()
        self._known: OrderedDict[str, SavedState] = OrderedDict()  # least recently used first
        self._loaded: dict[str, Snapshot] = {}
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._find(self._folder)

    @property
    def num_states(self) -> int:
        with self._lock:
            return sum(saved.nbytes > 0 for saved in self._known.values())

    @property
    def bytes_in_memory(self) -> int:
        with self._lock:
            return sum(snapshot.nbytes for snapshot in self._loaded.values())

    def put(self, snapshot: Snapshot, *, state_id: str | None = None, **facts: Any) -> SavedState:
        """Stores a snapshot without copying it.

        Args:
            state_id: the id of a state to replace; None for a new id.
            facts: ``owner`` and ``model`` of the :class:`SavedState`, and optionally ``unfinished`` and ``text``.

        Raises:
            ValueError: the snapshot is larger than the limit for all states.
            DiskFullError: the disk is full.
        """
        size = snapshot.nbytes
        if size > self._capacity:
            raise ValueError(
                f"the state has {size:,} bytes: all saved states together must have at most {self._capacity:,}"
            )
        saved = self._describe(state_id or f"state-{secrets.token_urlsafe(18)}", snapshot, **facts)
        if self._folder is not None:
            self._make_room_on_disk(size)
            # The description is written last: without it, the state's file is ignored.
            snapshot.save(self._path(saved.id, "safetensors"), self._model)
            self._write_description(saved)
        self._keep(saved, snapshot)
        return saved

    def put_response(
        self, response_id: str, response: dict[str, Any], snapshot: Snapshot | None, *, owner: str, model: str
    ) -> bool:
        """Stores a response, and its state if that fits beside the states that clients have saved.

        Returns:
            Whether the response is stored: not if its text is larger than the limit for all responses.
        """
        size = len(json.dumps(response))
        if size > self._settings.response_bytes:
            return False
        if snapshot is not None and snapshot.nbytes > self._capacity:
            snapshot = None
        saved = self._describe(response_id, snapshot, owner=owner, model=model, response=response, response_bytes=size)
        if self._folder is not None:
            try:
                if snapshot is not None and self._make_room_on_disk(saved.nbytes, for_response=True):
                    snapshot.save(self._path(response_id, "safetensors"), self._model)
                else:
                    snapshot, saved.nbytes = None, 0
                self._write_description(saved)
            except OSError as error:
                snapshot, saved.nbytes = None, 0
                log("the text of a response is kept in memory only", level=logging.ERROR, error=error)
        self._keep(saved, snapshot)
        return True

    def _describe(self, state_id: str, snapshot: Snapshot | None, **facts: Any) -> SavedState:
        self.expire()
        now = self._now()
        num_tokens, nbytes = (0, 0) if snapshot is None else (len(snapshot.tokens), snapshot.nbytes)
        facts |= {"created": now, "used": now, "tokenizer": self._tokenizer}
        return SavedState(id=state_id, num_tokens=num_tokens, nbytes=nbytes, **facts)

    def _write_description(self, saved: SavedState) -> None:
        write_text(self._path(saved.id, "json"), json.dumps(asdict(saved)), private=True)

    def _keep(self, saved: SavedState, snapshot: Snapshot | None) -> None:
        with self._lock:
            self._known[saved.id] = saved
            self._known.move_to_end(saved.id)
            if snapshot is not None:
                self._loaded[saved.id] = snapshot
            self._make_room()
            self._make_room_for_texts()

    def get(self, state_id: str, owner: str) -> SavedState:
        """Returns a saved state, and records that it is used.

        Raises:
            KeyError: this owner has no state with this id.
        """
        with self._lock:
            self.expire()
            saved = self._known.get(state_id)
            if saved is None or saved.owner != owner:
                raise KeyError(state_id)
            saved.used = self._now()
            self._known.move_to_end(state_id)
            if self._folder is not None:  # the next process reads from it when the state was used
                with contextlib.suppress(FileNotFoundError):  # someone has emptied the folder
                    os.utime(self._path(state_id, "json"), (saved.used, saved.used))
            return saved

    def snapshot(self, state_id: str, owner: str) -> Snapshot:
        """Returns the snapshot of a state, from the disk if it is not in memory. It must not be advanced.

        Raises:
            KeyError: as :meth:`get`, or only the text of a response is left.
            ValueError: the file is damaged, or the state belongs to another model or tokenizer.
        """
        if self.get(state_id, owner).tokenizer not in ("", self._tokenizer):
            raise ValueError(
                f"{state_id} was saved with another tokenizer or chat template: its token ids stand for other text"
            )
        with self._lock:
            found = self._loaded.get(state_id)
        if found is not None:
            return found
        if self._folder is None:
            raise KeyError(state_id)  # only the text of the response is left
        try:
            found = Snapshot.load(self._path(state_id, "safetensors"), self._model)
        except FileNotFoundError:
            raise KeyError(state_id) from None
        with self._lock:
            if state_id in self._known:
                self._loaded[state_id] = found
                self._make_room()
        return found

    def of_owner(self, owner: str) -> list[SavedState]:
        """Returns the states of one owner, newest first, without responses of which only the text is left."""
        with self._lock:
            self.expire()
            found = [saved for saved in self._known.values() if saved.owner == owner and saved.nbytes]
            return sorted(found, key=lambda saved: -saved.created)

    def unfinished(self) -> list[SavedState]:
        """Returns the states of requests that were cut off by a shutdown."""
        with self._lock:
            return [saved for saved in self._known.values() if saved.unfinished is not None]

    def delete(self, state_id: str, owner: str) -> None:
        """Deletes a state or a response. Raises ``KeyError`` as :meth:`get`."""
        with self._lock:
            self._remove(self.get(state_id, owner))

    def expire(self) -> None:
        """Removes what has not been used within ``ttl`` seconds."""
        with self._lock:
            limit = self._now() - self._settings.ttl
            for saved in [saved for saved in self._known.values() if saved.used < limit]:
                self._remove(saved)

    def _in_order_of_removal(self) -> list[SavedState]:
        """Returns responses first, since no client asked to save them, then saved states; least recently used first."""
        return sorted(self._known.values(), key=lambda saved: saved.response is None)

    def _make_room(self) -> None:
        """Drops states from memory until they fit. Without a folder, they are lost."""
        for saved in self._in_order_of_removal():
            if self.bytes_in_memory <= self._settings.max_bytes:
                return
            if self._folder is not None:
                self._loaded.pop(saved.id, None)
            elif saved.response is not None:
                self._remove_state(saved)
            elif len(self._loaded) > 1:
                self._remove(saved)

    def _make_room_on_disk(self, size: int, *, for_response: bool = False) -> bool:
        """Deletes states, for a response only those of responses, until ``size`` bytes fit. Returns whether they do."""
        most = self._settings.folder_bytes - size
        with self._lock:
            num_bytes = sum(saved.nbytes for saved in self._known.values())
            for saved in self._in_order_of_removal():
                if num_bytes <= most or (for_response and saved.response is None):
                    break
                num_bytes -= saved.nbytes
                (self._remove if saved.response is None else self._remove_state)(saved)
            return num_bytes <= most

    def _make_room_for_texts(self) -> None:
        responses = [saved for saved in self._known.values() if saved.response is not None]
        num_bytes = sum(saved.response_bytes for saved in responses)
        for saved in responses:
            if num_bytes <= self._settings.response_bytes:
                return
            num_bytes -= saved.response_bytes
            self._remove(saved)

    def _remove_state(self, saved: SavedState) -> None:
        """Removes the state of a response, whose text stays."""
        self._loaded.pop(saved.id, None)
        saved.nbytes = 0
        if self._folder is not None:
            self._path(saved.id, "safetensors").unlink(missing_ok=True)

    def _remove(self, saved: SavedState) -> None:
        self._known.pop(saved.id, None)
        if self._folder is not None:
            self._path(saved.id, "json").unlink(missing_ok=True)
        self._remove_state(saved)

    def _find(self, folder: Path) -> None:
        """Finds the states of earlier processes."""
        found = []
        for path in folder.glob("*.json"):
            if not path.name.startswith(_PREFIXES):
                continue
            try:
                saved = SavedState(**json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                log("a saved state's description is damaged, and left out", file=path.name, reason=str(error))
                continue
            if not _ID.fullmatch(saved.id) or path.stem != saved.id:
                continue
            if not self._path(saved.id, "safetensors").is_file():
                saved.nbytes = 0
            if saved.nbytes or saved.response is not None:
                saved.used = path.stat().st_mtime
                found.append(saved)
        self._known.update((saved.id, saved) for saved in sorted(found, key=lambda each: each.used))
        for path in folder.glob("*.safetensors"):
            if path.name.startswith(_PREFIXES) and not path.with_suffix(".json").exists():
                path.unlink()  # from a process that died before it wrote the description

    def _path(self, state_id: str, ending: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{state_id}.{ending}"

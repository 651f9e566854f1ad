"""What one run left on disk, to be compared later and on another machine: `bundle.json`, `events.jsonl`, tensors.

Events are JSON lines in the order in which they happened; the last line counts them, so that a bundle cut short is known
by its missing end. Tensors lie in safetensors files and are bounded by a budget: what does not fit is counted, not kept.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import OlmodebugError

SCHEMA = "olmodebug/bundle@1"
HEAD, EVENTS = "bundle.json", "events.jsonl"
BUDGET_BYTES = 1 << 30
SHARD_BYTES = 64 << 20  # written as soon as so much has gathered, so that little is lost when the process dies


class BundleError(OlmodebugError):
    """A bundle that cannot be read or written."""


@dataclass(slots=True)
class Writer:
    """A bundle being written. BundleError when the disk is full."""

    folder: Path
    budget_bytes: int = BUDGET_BYTES
    written_bytes: int = 0
    left_out: int = 0
    lines: int = 0
    _pending: dict[str, Tensor] = field(default_factory=dict)
    _pending_bytes: int = 0
    _shards: list[str] = field(default_factory=list)
    _stream: Any = None

    def open(self, head: Mapping[str, Any]) -> None:
        with _disk(self):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / HEAD).write_text(json.dumps({"schema": SCHEMA, **head}, indent=1, allow_nan=False) + "\n", encoding="utf-8")
            self._stream = (self.folder / EVENTS).open("w", encoding="utf-8")

    def event(self, kind: str, /, **fields: Any) -> None:
        """One line, on disk before anything else happens."""
        with _disk(self):
            self._stream.write(json.dumps({"event": kind, **fields}, allow_nan=False) + "\n")
            self._stream.flush()
        self.lines += 1

    def tensor(self, key: str, tensor: Tensor) -> bool:
        """Keep a tensor under a key while the budget lasts; whether it was kept."""
        size = tensor.numel() * tensor.element_size()
        if self.written_bytes + size > self.budget_bytes:
            self.left_out += 1
            return False
        self._pending[key] = tensor.detach().to("cpu", copy=True).contiguous()
        self._pending_bytes += size
        self.written_bytes += size
        if self._pending_bytes >= SHARD_BYTES:
            self._flush()
        return True

    def close(self) -> None:
        """Write what is pending and the line that says that nothing is missing."""
        self._flush()
        self.event("end", lines=self.lines, left_out=self.left_out)
        with _disk(self):
            self._stream.close()

    def _flush(self) -> None:
        if not self._pending:
            return
        name = f"tensors-{len(self._shards):05d}.safetensors"
        with _disk(self):
            save_file(self._pending, self.folder / name)
        self._shards.append(name)
        self.event("shard", file=name, bytes=(self.folder / name).stat().st_size, keys=sorted(self._pending))
        self._pending, self._pending_bytes = {}, 0


@dataclass(slots=True, kw_only=True)
class Bundle:
    """A bundle that was read: its head, its events without the lines that describe the files, and where its tensors are."""

    folder: Path
    head: dict[str, Any]
    events: list[dict[str, Any]]
    where: dict[str, str]
    left_out: int = 0

    def of(self, kind: str) -> Iterator[dict[str, Any]]:
        return (event for event in self.events if event["event"] == kind)

    def tensor(self, key: str) -> Tensor | None:
        """A stored tensor; None where it was left out."""
        if key not in self.where:
            return None
        try:
            with safe_open(str(self.folder / self.where[key]), framework="pt") as shard:
                found: Tensor = shard.get_tensor(key)
                return found
        except (OSError, SafetensorError) as error:
            raise BundleError(f"{self.folder}: {self.where[key]} cannot be read ({error})") from None


def read_bundle(folder: Path, *, partial: bool = False) -> Bundle:
    """The bundle in a folder; BundleError when it is none, of another version, or cut short. `partial` takes what a run
    that died has left."""
    head = _head(folder)
    events: list[dict[str, Any]] = []
    where: dict[str, str] = {}
    ended, left_out = False, 0
    try:
        lines = (folder / EVENTS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{folder}: {EVENTS} cannot be read ({error})") from None
    for number, text in enumerate(lines):
        try:
            event = json.loads(text)
        except ValueError:
            if partial and number == len(lines) - 1:
                break
            raise BundleError(f"{folder}: truncated: line {number + 1} of {EVENTS} is no JSON") from None
        if event["event"] == "shard":
            path = folder / event["file"]
            size = path.stat().st_size if path.is_file() else 0
            if size != event["bytes"]:
                raise BundleError(f"{folder}: truncated: {event['file']} has {size} of {event['bytes']} bytes")
            where |= dict.fromkeys(event["keys"], event["file"])
        elif event["event"] == "end":
            ended, left_out = event["lines"] == number, event["left_out"]
        else:
            events.append(event)
    if not ended and not partial:
        raise BundleError(f"{folder}: truncated: its last line is missing, so the run that wrote it did not finish")
    return Bundle(folder=folder, head=head, events=events, where=where, left_out=left_out)


def _head(folder: Path) -> dict[str, Any]:
    try:
        head = json.loads((folder / HEAD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{folder} is no bundle: {HEAD} cannot be read ({error})") from None
    schema = head.get("schema") if isinstance(head, dict) else None
    if schema != SCHEMA:
        raise BundleError(f"{folder}: expected schema {SCHEMA}, observed {schema}; write it again with this version")
    return dict(head)


class _disk:  # noqa: N801 - reads as a phrase
    """Turns an error of the file system into one line that names the folder, and closes what is open."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError | SafetensorError):
            if self.writer._stream is not None:
                with contextlib.suppress(OSError):
                    self.writer._stream.close()
            reason = getattr(error, "strerror", None) or str(error)
            raise BundleError(f"{self.writer.folder}: the bundle cannot be written ({reason}); free some space or lower --budget") from None


def dtype_named(name: str) -> torch.dtype:
    """`bfloat16` as torch's dtype."""
    found: torch.dtype = getattr(torch, name)
    return found

"""What one rank saw in one training step: events as JSON lines with digests, and the tensors behind them while they fit.

A digest says whether two ranks hold the same bits without moving a tensor, so the records of a thousand ranks can be
compared on one machine; the tensors say what the ranks hold together.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ReportError
from ..records import Where
from ..tracing.copies import bytes_of
from .calls import Collective, collectives_of, files_in, lines_of

VERSION = 2
MOST_TENSOR_BYTES = 512 * 2**20  # of one rank; larger runs are compared by digest only
STAGES = ("data", "start", "forward", "loss", "gradient", "norm", "step", "state")

# Prefixes that wrappers put before a module's own path.
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEvent:
    """One tensor of one rank. `placements` are DTensor's words, one a mesh dimension (`shard:0`, `strided:0`, `replicate`,
    `partial`), and `coordinate` is this rank's in the tensor's own mesh; both are empty for a plain tensor, whose layout has
    to be found. `key` names the tensor in the record's file."""

    stage: str
    name: str
    digest: str = ""
    shape: tuple[int, ...] = ()
    dtype: str = ""
    placements: tuple[str, ...] = ()
    coordinate: tuple[int, ...] = ()
    where: Where = field(default_factory=Where)
    key: str | None = None


class RankWriter:
    """Writes one rank's record; every event is on disk before the next begins. FileExistsError with `new`, where the rank
    has a record already."""

    def __init__(
        self, folder: Path, *, rank: int, world: int, coordinate: tuple[int, ...] = (), mesh: tuple[int, ...] = (), new: bool = False
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"rank-{rank:05d}"
        self.tensors: dict[str, Tensor] = {}
        self.bytes = 0
        self.lines = self.path.with_suffix(".jsonl").open("x" if new else "w", encoding="utf-8")
        self._write({"version": VERSION, "rank": rank, "world": world, "coordinate": list(coordinate), "mesh": list(mesh)})

    def tensor(self, stage: str, name: str, value: Tensor, *, where: Where | None = None) -> None:
        """Note a tensor: its local part, and how that part lies in the whole where it is a DTensor."""
        placements = tuple(_word(p) for p in getattr(value, "placements", ()))
        mesh = getattr(value, "device_mesh", None)
        local = value.to_local() if hasattr(value, "to_local") else value  # type: ignore[operator]
        local = local.detach().cpu().contiguous()
        key = None
        if self.bytes + local.nbytes <= MOST_TENSOR_BYTES:
            key = f"{stage}/{name}/{len(self.tensors)}"
            self.tensors[key] = local.clone()
            self.bytes += local.nbytes
        event = RankEvent(
            stage=stage,
            name=name,
            digest=digest(local),
            shape=tuple(local.shape),
            dtype=str(local.dtype).removeprefix("torch."),
            placements=placements,
            coordinate=tuple(mesh.get_coordinate() or ()) if mesh is not None else (),
            where=where or Where(),
            key=key,
        )
        self._write(asdict(event))

    def collective(self, call: Collective) -> None:
        """Note a collective before it starts, so that a hang shows where it waits."""
        self._write({"stage": "collective", **asdict(call)})

    def close(self, *, dtypes: Iterable[str] = (), optimizers: Iterable[str] = ()) -> None:
        """Put the tensors on disk, and say that the step came to its end: the floating dtypes that its ops wrote, and the
        classes of the optimizers that took it."""
        save_file(self.tensors, self.path.with_suffix(".safetensors"))
        self._write({"stage": "end", "dtypes": sorted(dtypes), "optimizers": sorted(set(optimizers))})
        self.lines.close()

    def discard(self) -> None:
        """Take the record away again, as if nothing had been noted."""
        self.lines.close()
        self.path.with_suffix(".jsonl").unlink()

    def _write(self, body: dict[str, Any]) -> None:
        self.lines.write(json.dumps(body) + "\n")
        self.lines.flush()


@dataclass(slots=True, kw_only=True)
class RankRecord:
    """A record that is read back: `events` stream from disk, tensors are loaded when they are asked for."""

    path: Path
    rank: int
    world: int
    coordinate: tuple[int, ...]
    mesh: tuple[int, ...]

    @property
    def file(self) -> Path:
        """The lines of the record."""
        return self.path.with_suffix(".jsonl")

    def events(self) -> Iterator[RankEvent]:
        """Its tensors in the order they were noted."""
        for body in lines_of(self.file, calls=False):
            if body["stage"] != "end":
                values = {
                    **body,
                    "shape": tuple(body["shape"]),
                    "placements": tuple(body["placements"]),
                    "coordinate": tuple(body.get("coordinate", ())),
                    "where": Where(**body["where"]),
                }
                yield RankEvent(**values)

    def collectives(self) -> Iterator[Collective]:
        """Its collectives in the order they were started."""
        return collectives_of(self.file)

    def end(self) -> dict[str, list[str]] | None:
        """`dtypes` and `optimizers` of a step that came to its end; None of one that was cut off."""
        return next(
            ({k: list(body[k]) for k in ("dtypes", "optimizers")} for body in lines_of(self.file, calls=False) if body["stage"] == "end"),
            None,
        )

    def load(self, keys: Mapping[str, str]) -> dict[str, Tensor]:
        """The tensors of some keys, under the names that they are asked by; what a process that was killed left out is not there."""
        file = self.path.with_suffix(".safetensors")
        if not keys or not file.is_file():
            return {}
        with safe_open(file, framework="pt") as tensors:
            kept = set(tensors.keys())
            return {name: tensors.get_tensor(key) for name, key in keys.items() if key in kept}


def read_records(folder: Path) -> list[RankRecord]:
    """The records of a folder by rank. ReportError when there is none, or one is of another version."""
    found = []
    for file in files_in(folder):
        with file.open(encoding="utf-8") as lines:
            first = lines.readline()
        try:
            head = json.loads(first)
        except ValueError:
            raise ReportError(f"{file.name} holds no record of a rank") from None
        if head.get("version") != VERSION:
            raise ReportError(f"{file.name}: expected version {VERSION} of the record, observed {head.get('version')}")
        found.append(
            RankRecord(
                path=file.with_suffix(""),
                rank=head["rank"],
                world=head["world"],
                coordinate=tuple(head["coordinate"]),
                mesh=tuple(head["mesh"]),
            )
        )
    if not found:
        raise ReportError(f"no record of a rank in {folder}")
    return found


def digest(tensor: Tensor) -> str:
    """A digest of the bytes in their order, the shape and the dtype: a permutation or a transpose changes it."""
    head = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    return hashlib.blake2b(head + bytes_of(tensor).tobytes(), digest_size=12).hexdigest()


def plain_name(name: str) -> str:
    """A module's or parameter's path without what wrappers put before it."""
    for wrapper in WRAPPERS:
        name = name.removeprefix(wrapper) if name.startswith(wrapper) else name.replace(f".{wrapper}", ".")
    return "" if name + "." in WRAPPERS else name


def _word(placement: Any) -> str:
    if type(placement).__name__ == "_StridedShard":  # torch's own word for a dimension that a later mesh dimension splits first
        return f"strided:{placement.dim}"
    if placement.is_shard():
        return f"shard:{placement.dim}"
    return "replicate" if placement.is_replicate() else "partial"

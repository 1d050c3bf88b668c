"""What the sweep writes: one record a model and kind of run, JSON lines, the latest of a name counts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

Kind = Literal["structure", "numbers", "text", "spans", "fresh"]
Status = Literal["ok", "failed", "does not run"]


@dataclass(frozen=True)
class Record:
    """The outcome of one model."""

    zoo: str
    name: str
    kind: Kind
    """structure: built at full size on the meta device where that works, converted, the structure checked. numbers:
    small, with real weights, all oracles. text, spans, fresh: see `static_vs_recorded`."""
    status: Status
    """does not run: not even unconverted; such models are not counted."""
    reasons: tuple[str, ...] = ()
    """Of a failure: "check: what was found". Of one that does not run: why."""
    where: str = ""
    """The innermost function of rezero_convert that raised."""
    note: str = ""
    """How it was built: the input size, how far the configuration was shrunk."""
    parameters: int = 0
    gates: int = 0
    """What `rz.alphas` yields."""
    sites: dict[str, int] = field(default_factory=dict)
    """How many adds got a verdict; refusals by their code."""
    signature: str = ""
    """Equal for models that run the same residual code, decided in the same way."""
    seconds: float = 0.0
    convert_seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)
    """What `static_vs_recorded` compares."""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.zoo, self.name, self.kind


def load(file: Path) -> dict[tuple[str, str, str], Record]:
    """The latest record of every model; a last line that was cut off is left out."""
    found: dict[tuple[str, str, str], Record] = {}
    if file.is_file():
        for line in file.read_text().splitlines():
            try:
                record = from_dict(json.loads(line))
            except json.JSONDecodeError:
                continue
            found[record.key] = record
    return found


def append(file: Path, record: Record) -> None:
    with file.open("a") as stream:
        stream.write(json.dumps(asdict(record)) + "\n")


def from_dict(values: dict[str, Any]) -> Record:
    known: dict[str, Any] = {one.name: values[one.name] for one in fields(Record) if one.name in values}
    return Record(**(known | {"reasons": tuple(values.get("reasons", ()))}))

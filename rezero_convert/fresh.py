"""Proof of a rewritten file in a process that has seen nothing else: import it, build the model, validate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConversionError
from .plan import Plan


@dataclass(frozen=True, slots=True)
class Proof:
    """What a fresh process found."""

    details: dict[str, Any]
    """`Validation.to_dict()`."""

    def to_dict(self) -> dict[str, Any]:
        return self.details

    @property
    def ok(self) -> bool:
        return bool(self.details["ok"])

    @property
    def failures(self) -> list[str]:
        return list(self.details["failures"])

    @property
    def blocks(self) -> int:
        return len(self.details["blocks"])


def prove(
    file: Path, rewritten: str, model: str, inputs: str | None, options: Mapping[str, Any] | None = None
) -> Proof:
    """Import `rewritten` in the place of `file` in a fresh process, and validate the model built from it.

    `options` are those of the conversion.

    Raises:
        ConversionError: the rewritten text cannot be imported, the model not built, or not run.
    """
    with tempfile.TemporaryDirectory(prefix="rezero_convert_") as folder:
        text_file, result_file = Path(folder, file.name), Path(folder, "result.json")
        text_file.write_bytes(rewritten.encode())
        request: dict[str, Any] = {"file": str(file), "text": str(text_file), "model": model, "inputs": inputs}
        request |= {"to": str(result_file), "options": dict(options or {})}
        run = subprocess.run(
            [sys.executable, "-m", __name__, json.dumps(request)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(_import_path())},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if not result_file.exists():
            last = run.stdout.strip().splitlines()[-1:] or [f"exit code {run.returncode}"]
            raise ConversionError(f"{file}: the rewritten file fails in a fresh process: {last[0]}")
        found = json.loads(result_file.read_text())
    if "error" in found:
        raise ConversionError(f"{file}: the rewritten file fails in a fresh process: {found['error']}")
    return Proof(found)


def unread(plan: Plan, proof: Proof, model: Any) -> list[str]:
    """The new gates of the model's instances that no block of the rewritten model has; those of loops aside."""
    seen = {name for block in proof.details["blocks"] for name in block["alphas"]}
    classes = {path: type(module).__qualname__ for path, module in model.named_modules()}
    ran = [site for site in plan.converted if site.calls and classes.get(site.path) == site.cls]
    made = (
        (f"{site.path}.{gate.alpha}" if site.path else gate.alpha)
        for site in ran
        for gate in site.gates
        if gate.at is not None and not gate.existing and not gate.loops
    )
    return [name for name in dict.fromkeys(made) if name not in seen]


def main(request: str) -> int:
    """The fresh process: answers in the file that the request names."""
    asked = json.loads(request)
    try:
        answer = _validate(asked)
    except ConversionError as error:
        answer = {"error": str(error)}
    Path(asked["to"]).write_text(json.dumps(answer).replace(_quoted(asked["text"]), _quoted(asked["file"])))
    return 0


def _quoted(path: str) -> str:
    """A path as it stands within JSON."""
    return json.dumps(path)[1:-1]


def _validate(asked: dict[str, Any]) -> dict[str, Any]:
    import torch

    from .options import options
    from .targets import evaluate, load, model_of, quiet_stdout
    from .validation import validate

    torch.manual_seed(0)
    namespace = vars(load(Path(asked["file"]), Path(asked["text"])))
    model = model_of("--model", asked["model"], namespace)
    inputs = None if asked["inputs"] is None else evaluate("--inputs", asked["inputs"], namespace)
    with quiet_stdout():
        found = validate(model, inputs, options=options(**asked["options"]))
    return found.to_dict()


def _import_path() -> list[str]:
    """This package's own folder, then what this process imports from: the fresh one must find the same modules."""
    own = str(Path(__file__).resolve().parent.parent)
    return [own, *(entry for entry in sys.path if entry and entry != own)]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

"""The example notebook: its cells run in order, and show what the file shows."""

from __future__ import annotations

import ast
import io
import json
import linecache
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parent.parent / "examples" / "first_steps.ipynb"


def test_the_notebook_shows_what_it_gives() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {"__name__": "__main__"}
    compared = 0
    for number, cell in enumerate(cells, 1):
        said, value = _run("".join(cell["source"]), f"<cell {number}>", names)
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                assert said == "".join(output["text"])
            else:
                data = {kind: "".join(text) for kind, text in output["data"].items()}
                assert _rounded(repr(value)) == _rounded(data["text/plain"])
                if "text/html" in data:
                    shown = re.sub(r"&lt;cell \d+&gt;", "&lt;cell&gt;", value._repr_html_())
                    assert shown == data["text/html"]
            compared += 1
    assert compared >= 6


def _run(text: str, file: str, names: dict[str, Any]) -> tuple[str, Any]:
    """Run a cell as IPython does; what it prints, and the value of its last line."""
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)
    tree = ast.parse(text)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with redirect_stdout(io.StringIO()) as said:
        exec(compile(tree, file, "exec"), names)
        value = eval(compile(ast.Expression(last.value), file, "eval"), names) if isinstance(last, ast.Expr) else None
    return said.getvalue(), value


def _rounded(text: str) -> str:
    """Without the layout, and the numbers to one place: they differ between processors."""
    return re.sub(r"\d+\.\d+", lambda found: f"{float(found[0]):.1f}", " ".join(text.split()))

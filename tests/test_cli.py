from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import rezero_convert
from rezero_convert import cli, targets
from rezero_convert.errors import ConversionError
from rezero_convert.options import options
from rezero_convert.plan import Plan, Site, Span
from rezero_convert.report import Report

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}  # for a checkout that is not installed
PLAIN = "import torch\nfrom torch import nn\n\n\nclass Net(nn.Module):\n    def forward(self, x):\n        return x\n"
BLOCK = """\
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x):
        return x + self.fc(x)
"""


@dataclass(frozen=True)
class Made:
    text: str
    report: Report
    notes: tuple[str, ...] = ()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """An api that gates `x + self.fc(x)` by text replacement; its calls are recorded."""
    calls: list[dict[str, Any]] = []

    def convert_source(text: str, *, file: str, **given: Any) -> Made:
        calls.append({"file": file, **given})
        if "broken" in text:
            raise ConversionError(f"{file}:1: broken")
        found = "x + self.fc(x)" in text
        site = Site("converted", "RZ101", "", "", "Net", None, Span(file, 11, 15, 11, 29), "return x + self.fc(x)")
        plan = Plan((site,) if found else (), options(), "static")
        return Made(text.replace("x + self.fc(x)", "x + self.alpha * self.fc(x)"), Report(plan, title=file))

    api = SimpleNamespace(
        convert_source=convert_source,
        audit_source=lambda text, *, file, **given: convert_source(text, file=file, **given).report,
        audit=lambda model, inputs=None, **given: Report(Plan((), route="recorded"), title=type(model).__name__),
    )
    monkeypatch.setitem(sys.modules, "rezero_convert.api", api)
    monkeypatch.setattr(rezero_convert, "api", api, raising=False)
    return calls


@pytest.fixture
def net(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "net", raising=False)
    file = tmp_path / "net.py"
    file.write_text(BLOCK)
    return file


def error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of an error: the last, below what was already reported."""
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("rezero-convert: error: ") for line in lines] == [False] * (len(lines) - 1) + [True]
    return lines[-1].removeprefix("rezero-convert: error: ")


# What is refused


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["net.py", "--wriet"], "unknown option --wriet; did you mean --write?", id="misspelt option"),
        pytest.param(["net.py", "--drop-norms=layer"], "did you mean --drop-norm?", id="misspelt with a value"),
        pytest.param(["audit", "timm:x", "--aplha-init", "0"], "did you mean --alpha-init?", id="of audit"),
        pytest.param(["net.py", "--alpha"], "unknown option --alpha", id="no abbreviations"),
        pytest.param(["--write"], "the following arguments are required: FILE", id="no file"),
        pytest.param(["net.py", "--write", "--check"], "not allowed with argument", id="write and check"),
        pytest.param(["net.py", "--drop-norm", "layr"], "did you mean 'layer'?", id="misspelt kind"),
        pytest.param(["net.py", "--alpha-init", "big"], "a finite number or 'preserve'", id="alpha"),
        pytest.param(["net.py", "--method", "fixpu"], "unknown method 'fixpu' (valid: rezero, ", id="method"),
        pytest.param(["missing.py"], "missing.py: no such file or folder", id="missing file"),
        pytest.param(["empty"], "empty: no .py files in this folder", id="empty folder"),
        pytest.param(["latin.py"], "latin.py:2: not UTF-8", id="encoding"),
        pytest.param(["syntax.py"], "syntax.py:2: syntax error", id="syntax error"),
        pytest.param(["plain_syntax.py"], "plain_syntax.py:1: syntax error", id="syntax error without a class"),
        pytest.param(["script.py"], "script.py: no torch.nn.Module class in this file", id="no module"),
        pytest.param(["empty.py"], "empty.py: no torch.nn.Module class in this file", id="empty file"),
        pytest.param(["net.py", "--inputs", "1"], "--inputs without --model", id="inputs without model"),
        pytest.param(["net.py", "script.py", "-o", "x"], "--output is for one file, not 2", id="output of several"),
        pytest.param(["net.py", "script.py", "--model", "x"], "--model is for one file", id="model of several"),
        pytest.param(["-", "--write"], "--write cannot change standard input", id="write stdin"),
        pytest.param(["net.py", "-o", "no/such/out.py"], "no/such/out.py: cannot be written", id="output nowhere"),
        pytest.param(["net.py", "-o", "empty"], "empty: cannot be written: it is a folder", id="output a folder"),
        pytest.param(["audit", "resnet50"], "has the form SOURCE:NAME", id="target without source"),
        pytest.param(["audit", "missing.py"], "missing.py: no such file", id="audit of a missing file"),
        pytest.param(["audit", "empty"], "a folder", id="audit of a folder"),
        pytest.param(["audit", "no_such_package:Net"], "ModuleNotFoundError", id="no package"),
        pytest.param(["audit", "net:Nett"], "NameError: name 'Nett' is not defined", id="no class"),
        pytest.param(["audit", "net:torch"], "not a torch.nn.Module", id="target no module"),
        pytest.param(["audit", "net:Net('a')"], "TypeError", id="target raises"),
    ],
)
def test_refused_on_one_line(
    arguments: list[str], said: str, net: Path, fake: object, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty").mkdir()
    Path("empty.py").touch()
    Path("latin.py").write_bytes(b"# one\n# \xe9t\xe9\n")
    Path("syntax.py").write_text("class A:\n    def (\n")
    Path("plain_syntax.py").write_text("x = = 1\n")
    Path("script.py").write_text("class Config:\n    pass\n\n\nprint('hello')\n")
    assert cli.main(arguments) == 2
    assert said in error(capsys)
    assert net.read_text() == BLOCK


@pytest.mark.parametrize(
    ("model", "said"),
    [
        pytest.param("Nett()", "NameError: name 'Nett' is not defined", id="unknown name"),
        pytest.param("Net(", "SyntaxError", id="syntax"),
        pytest.param("Net", "is a class; construct it: 'Net(...)'", id="class"),
        pytest.param("3", "is of type int, not a torch.nn.Module", id="no module"),
        pytest.param("Net('wide')", "TypeError", id="raises"),
        pytest.param("exit(3)", "SystemExit: 3", id="exits"),
    ],
)
def test_model_expressions(model: str, said: str, net: Path, fake: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["net.py", "--model", model]) == 2
    told = error(capsys)
    assert said in told
    assert f"--model {model!r}" in told


def test_a_model_that_raises_is_told_with_its_line(net: Path, fake: object, capsys: pytest.CaptureFixture[str]) -> None:
    net.write_text(BLOCK.replace("super().__init__()", "super().__init__(); width / 0"))
    assert cli.main(["net.py", "--model", "Net()"]) == 2
    assert error(capsys) == "--model 'Net()': ZeroDivisionError: division by zero (net.py:7)"


def test_an_import_that_raises_is_told_with_its_line(
    net: Path, fake: object, capsys: pytest.CaptureFixture[str]
) -> None:
    net.write_text(BLOCK + "\nraise RuntimeError('two\\nlines')\n")
    assert cli.main(["net.py", "--model", "Net()"]) == 2
    assert error(capsys) == "importing net.py: RuntimeError: two lines (net.py:13)"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(net: Path, fake: object, capsys: pytest.CaptureFixture[str]) -> None:
    net.chmod(0)
    assert cli.main(["net.py"]) == 2
    assert "net.py: cannot be read" in error(capsys)


def test_one_bad_file_does_not_stop_the_others(net: Path, fake: object, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.py").write_text(BLOCK + "# broken\n")
    assert cli.main([".", "--write", "--quiet"]) == 2
    assert "a.py:1: broken" in error(capsys)
    assert "self.alpha" in net.read_text()


def test_a_crash_is_one_line_and_exit_code_2(
    net: Path, fake: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash(*_: object, **__: object) -> None:
        raise KeyError("oops")

    monkeypatch.setattr(rezero_convert.api, "convert_source", crash)
    assert cli.main(["net.py", "--check"]) == 2
    assert error(capsys).startswith("net.py: internal error: KeyError: 'oops' (")


def test_a_failed_write_leaves_nothing_behind(
    net: Path, fake: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(source: str, target: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert cli.main(["net.py", "--write", "--quiet"]) == 2
    assert "No space left on device" in error(capsys)
    assert [path.name for path in net.parent.iterdir() if path.is_file()] == ["net.py"]
    assert net.read_text() == BLOCK


# What is said without torch


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], [], ["audit", "--help"], ["x.py", "--wriet"]])
def test_talk_does_not_import_torch(arguments: list[str]) -> None:
    code = f"""
import sys
from rezero_convert.cli import main
try:
    main({arguments!r})
except SystemExit:
    pass
sys.exit(3 if "torch" in sys.modules else 0)
"""
    run = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout or run.stderr


def test_module_is_the_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rezero_convert", "--version"]
    run = subprocess.run(command, env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout == f"rezero-convert {rezero_convert.__version__}\n"


def test_no_arguments_give_a_short_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    said = capsys.readouterr().out
    assert "rezero-convert model.py" in said
    assert len(said.splitlines()) < 15


# What is done


def test_default_is_a_report_and_a_diff_and_no_change(
    net: Path, fake: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["net.py"]) == 0
    said = capsys.readouterr()
    assert "RZ101" in said.err
    assert said.out.startswith("--- a/net.py\n+++ b/net.py\n@@ ")
    assert net.read_text() == BLOCK
    subprocess.run(["git", "apply", "-"], input=said.out, text=True, check=True, cwd=net.parent)
    assert net.read_text() == BLOCK.replace("x + self.fc", "x + self.alpha * self.fc")


@pytest.mark.parametrize("text", [BLOCK.rstrip("\n"), BLOCK.replace("\n", "\r\n"), "\ufeff" + BLOCK, "# é\n" + BLOCK])
def test_bytes_are_kept(text: str, net: Path, fake: object, capsys: pytest.CaptureFixture[str]) -> None:
    net.write_bytes(text.encode())
    assert cli.main(["net.py", "-o", "out.py"]) == 0
    assert Path("out.py").read_bytes() == text.replace("x + self.fc", "x + self.alpha * self.fc").encode()
    capsys.readouterr()
    assert cli.main(["net.py"]) == 0
    if not text.startswith("\ufeff"):
        subprocess.run(["git", "apply", "-"], input=capsys.readouterr().out.encode(), check=True, cwd=net.parent)
        assert net.read_bytes() == Path("out.py").read_bytes()


def test_write_keeps_mode_and_link(net: Path, fake: object) -> None:
    net.chmod(0o750)
    Path("link.py").symlink_to(net)
    assert cli.main(["link.py", "--write"]) == 0
    assert "self.alpha" in net.read_text()
    assert stat.S_IMODE(net.stat().st_mode) == 0o750
    assert Path("link.py").is_symlink()


def test_nothing_to_rewrite_touches_nothing(net: Path, fake: object, capsys: pytest.CaptureFixture[str]) -> None:
    net.write_text(PLAIN)
    os.utime(net, (1, 1))
    assert cli.main(["net.py", "--write"]) == 0
    assert net.stat().st_mtime == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "net.py: nothing to rewrite" in said.err


def test_check(net: Path, fake: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["net.py", "--check"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert "would rewrite net.py" in said.err
    assert cli.main(["net.py", "--write"]) == 0
    assert cli.main(["net.py", "--check"]) == 0


def test_output_to_stdout_from_stdin(
    net: Path, fake: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(BLOCK.encode())))
    assert cli.main(["-", "-o", "-", "--quiet"]) == 0
    said = capsys.readouterr()
    assert said.out == BLOCK.replace("x + self.fc", "x + self.alpha * self.fc")
    assert said.err == ""


def test_folders(net: Path, fake: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("pkg/a.py", "pkg/.hidden/b.py", "pkg/__pycache__/c.py", "pkg/env/d.py", "pkg/tool.py"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(BLOCK if name != "pkg/tool.py" else "print('no model')\n")
    Path("pkg/env/pyvenv.cfg").touch()
    assert cli.main(["pkg", "pkg/a.py", "net.py", "--check"]) == 1
    assert [call["file"] for call in fake] == ["pkg/a.py", "net.py"]


def test_json_of_one_and_of_several(net: Path, fake: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["net.py", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert (one["version"], one["file"], one["changes"], one["counts"]["converted"]) == (1, "net.py", True, 1)
    Path("plain.py").write_text(PLAIN)
    assert cli.main(["net.py", "plain.py", "--json"]) == 0
    several = json.loads(capsys.readouterr().out)
    assert [report["file"] for report in several["reports"]] == ["net.py", "plain.py"]
    assert several["reports"][1]["notes"] == ["nothing to rewrite"]


def test_options_arrive(net: Path, fake: list[dict[str, Any]]) -> None:
    arguments = "net.py --alpha-init -0.5 --drop-norm none --activation keep --include a --include b --exclude c"
    assert cli.main([*arguments.split(), "--share", "layer", "--long-skips", "--method", "rezero"]) == 0
    (call,) = fake
    del call["file"]
    made = options(**call)
    assert made == options(
        alpha_init=-0.5,
        drop_norm="none",
        activation="keep",
        include=("a", "b"),
        exclude="c",
        share="layer",
        long_skips=True,
    )


def test_options_not_given_are_left_to_their_defaults(net: Path, fake: list[dict[str, Any]]) -> None:
    assert cli.main(["net.py", "--alpha-init", "preserve"]) == 0
    assert {key: value for key, value in fake[0].items() if key != "file"} == {"alpha_init": "preserve"}


def test_user_code_does_not_print_into_the_diff(net: Path, fake: object, capsys: pytest.CaptureFixture[str]) -> None:
    net.write_text("print('imported')\n" + BLOCK.replace("super()", "print('made'); super()").replace("x + ", "x - "))
    arguments = ["net.py", "--model", "Net()", "--inputs", "torch.ones(1, print('evaluated') or 4)"]
    assert cli.main(arguments) == 0
    said = capsys.readouterr()
    assert said.out == ""
    assert all(word in said.err for word in ("imported", "made", "evaluated"))


# Importing


def test_files_of_packages_are_imported_under_their_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "rz_test_package" / "models"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("from .models import net\n")
    (package / "__init__.py").touch()
    (package / "layers.py").write_text("WIDTH = 3\n")
    (package / "net.py").write_text("from .layers import WIDTH\nVALUE = 'original'\n")
    other = tmp_path / "rewritten.py"
    other.write_text("from .layers import WIDTH\nVALUE = 'rewritten'\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    module = targets.load(package / "net.py", other)
    assert (module.__name__, module.VALUE, module.WIDTH) == ("rz_test_package.models.net", "rewritten", 3)


def test_a_file_named_like_a_module_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("VALUE = 1\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert targets.load(tmp_path / "json.py").VALUE == 1
    assert sys.modules["json"] is json


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("timm:resnet5", "timm has no model 'resnet5'; did you mean"),
        ("transformers:gtp2", "transformers has no model 'gtp2'; did you mean 'gpt2'?"),
        ("transformers:NoSuchModel", "no model class 'NoSuchModel'"),
    ],
)
def test_unknown_zoo_names(name: str, said: str, fake: object, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", name]) == 2
    assert said in error(capsys)


def test_zoo_models_are_made_without_memory() -> None:
    for name in ("timm:resnet18", "transformers:gpt2", "transformers:GPT2LMHeadModel"):
        found = targets.target(name)
        assert all(parameter.is_meta for parameter in found.model.parameters()), name
        assert not found.model.training


def test_a_missing_zoo_says_what_to_install(
    fake: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert cli.main(["audit", "timm:resnet18"]) == 2
    assert error(capsys) == "timm is not installed: pip install 'rezero-convert[zoo]'"


# For real


def readme_diff(name: str) -> str:
    text = (ROOT / "README.md").read_text()
    return text.split(f"<!-- diff: {name} -->\n```diff\n")[1].split("```\n<!-- end -->")[0]


@pytest.mark.parametrize("name", ["examples/gpt.py", "examples/resnet.py", "examples/encoder.py"])
def test_readme_diffs_are_what_the_tool_prints(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert cli.main([name, "--quiet"]) == 0
    assert capsys.readouterr().out == readme_diff(name)


@pytest.mark.parametrize("name", ["gpt", "resnet", "encoder"])
def test_examples_by_the_exact_route(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = tmp_path / f"rz_example_{name}.py"
    file.write_bytes((ROOT / "examples" / f"{name}.py").read_bytes())
    arguments = [file.name, "--model", "make_model()", "--inputs", "example_inputs()"]
    assert cli.main([*arguments, "--write", "--json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["validation"]["ok"]
    assert found["counts"]["converted"] == {"gpt": 8, "resnet": 6 + 1, "encoder": 8}[name]  # 1: Bottleneck, by its text
    assert "imported in a fresh process" in said.err
    assert cli.main([file.name, "--check"]) == 0


def test_inputs_of_the_wrong_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "rz_wrong_shape.py").write_text(BLOCK)
    assert cli.main(["rz_wrong_shape.py", "--model", "Net()", "--inputs", "torch.ones(2, 5)"]) == 2
    assert "RuntimeError" in error(capsys)


def test_a_rewritten_file_that_does_not_import_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from rezero_convert import fresh

    file = tmp_path / "net.py"
    file.write_text(BLOCK)
    with pytest.raises(ConversionError, match=r"fails in a fresh process: importing .*NameError: name 'nonsense'"):
        fresh.prove(file, BLOCK + "\nnonsense\n", "Net()", "torch.ones(1, 4)")


@pytest.mark.parametrize("name", ["gpt", "resnet", "encoder"])
def test_examples_run(name: str) -> None:
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py")]
    run = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in run.stdout.splitlines() if "loss " in line]
    assert losses[-1] < losses[0]

"""The page: its structure by a parser, and, where there is a Chromium, what a browser makes of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from browser import CHROMIUM, Browser, browser
from nets import Linears, W, vectors
from torch import Tensor, nn

import rezero_convert as rz
from rezero_convert import api, cli, drawing, sources
from rezero_convert.files import replace as write
from rezero_convert.listing import where_of
from rezero_convert.pages.markup import joined, tag
from rezero_convert.plan import Plan, Site, Span
from rezero_convert.report import Report
from rezero_convert.validation import BlockResult, Check, Validation

ROOT = Path(__file__).parent.parent
GPT = (ROOT / "examples" / "gpt.py").read_text()
EXACT = ("--model", "make_model()", "--inputs", "example_inputs()")
HOSTILE = "</td></span></pre></svg><script>hit()</script><img src=x onerror=hit()>\"'&\x00\udcff--><!--"
"""Names and texts that try to leave their place."""
SHOWN = HOSTILE.replace("\x00", "\ufffd").replace("\udcff", "\ufffd")
VOID = {"input", "meta"}


@dataclass
class Element:
    name: str
    attributes: dict[str, str | None]
    text: str = ""
    """Of the element and all in it."""


@dataclass
class Parsed(HTMLParser):
    """All elements of a page; fails where a tag is not closed in order."""

    elements: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.open: list[Element] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        element = Element(tag, dict(attrs))
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert any(element.name == "svg" for element in self.open), tag
        self.elements.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().name == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    def of(self, name: str, **attributes: str) -> list[Element]:
        wanted = {key.rstrip("_"): value for key, value in attributes.items()}
        return [e for e in self.elements if e.name == name and wanted.items() <= e.attributes.items()]

    def section(self, name: str) -> str:
        (found,) = self.of("section", id=name)
        return found.text


def parsed(text: str) -> Parsed:
    """The page, checked: closed in order, one script, nothing loaded, nothing but the script run."""
    page = Parsed()
    page.feed(text)
    page.close()
    assert not page.open
    assert text.startswith("<!DOCTYPE html>\n<html lang=")
    assert len(page.of("script")) <= 1
    allowed = {"a", "script", "style", "svg"}
    for element in page.elements:
        assert element.name not in {
            "img",
            "link",
            "iframe",
            "object",
            "embed",
            "base",
            "image",
            "use",
            "video",
            "audio",
        }
        assert not [
            name for name in element.attributes if name.startswith("on") or name in ("src", "srcset", "xlink:href")
        ]
        href = element.attributes.get("href")
        assert href is None or (element.name == "a" and href.startswith("#"))
        assert "://" not in " ".join(value or "" for value in element.attributes.values()) or element.name in allowed
    for style in page.of("style"):
        assert "url(" not in style.text
        assert "@import" not in style.text
    (policy,) = (one.attributes["content"] for one in page.of("meta") if one.attributes.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    return page


class Classic(Linears):
    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.tanh(self.a(x))
        return self.b(x) + self.a(x)


class Chain(nn.Module):
    """A GPT's chain of blocks, twelve layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Classic() for _ in range(12))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@dataclass(frozen=True)
class Spectrum:
    """What `isometry` returns, by its JSON."""

    zero: float = 0.25

    def to_dict(self) -> dict[str, Any]:
        bars = [
            {"low": -0.5, "high": 0.0, "share": 0.5, "error": 0.1},
            {"low": 0, "high": 0.5, "share": 0.25, "error": 0},
        ]
        return {
            "stream": ["", "layers.11"],
            "method": "lanczos",
            "zero": self.zero,
            "mean_squared": 1.23456,
            "median": 0.9,
            "largest": 3.0,
            "histogram": bars,
            "notes": [HOSTILE],
        }


def hostile(file: str = "net.py") -> Report:
    sources.register(file, f"a = 1\nx = x + f(x)  # {SHOWN}\nb = 2\n")
    site = Site(
        "refused", "RZ901", HOSTILE, HOSTILE, HOSTILE, None, Span(file, 2, 4, 2, 12), f"x = x + f(x)  # {SHOWN}"
    )
    options = rz.Options(exclude=(HOSTILE,))
    return Report(Plan((site,), options, HOSTILE, notes=(HOSTILE,)), title=HOSTILE, alphas={HOSTILE: 1.0})


def checked(detail: str, ok: bool = False) -> Validation:
    checks = (
        Check("identity", "eval", True),
        Check("identity", "train", ok, detail),
        Check("vjp", "eval", False, choice=True),
    )
    block = BlockResult(detail, (detail,), f"{detail}:1:1", checks)
    return Validation(detail, (block,), (Check("read", "eval", ok, detail),), (detail,), (detail,))


# Structure


def test_nothing_leaves_its_place() -> None:
    report = hostile(f"{HOSTILE}.py".replace("\x00", ""))
    text = report.to_html(diff=f"--- a\n+++ b\n+{HOSTILE}\n", validation=checked(HOSTILE), isometry=Spectrum())
    text.encode()
    page = parsed(text)
    assert len(page.of("script")) == 1
    assert "hit()" not in page.of("script")[0].text
    for section, least in (("summary", 4), ("adds", 4), ("diff", 1), ("validation", 8), ("isometry", 1)):
        assert page.section(section).count("<script>hit()</script>") >= least, section
    assert page.of("h1")[0].text == SHOWN


def test_only_markup_is_put_in_as_it_is() -> None:
    inner = tag("b", "a < b", class_="x", hidden=False, title='"><script>')
    assert inner == '<b class="x" title="&quot;&gt;&lt;script&gt;">a &lt; b</b>'
    assert joined("<", [inner, "&"]) == f"&lt;{inner}&amp;"
    assert tag("input", checked=True) == "<input checked>"


def test_nothing_leaves_its_place_in_a_notebook() -> None:
    for text in (hostile()._repr_html_(), checked(HOSTILE)._repr_html_(), checked(HOSTILE, ok=True)._repr_html_()):
        page = Parsed()
        page.feed(text)
        page.close()
        assert not page.open
        assert {element.name for element in page.elements} <= set("p b code table thead tbody tr th td".split())
        assert any(SHOWN in element.text for element in page.of("b"))


def named_with_ill_will() -> nn.Module:
    """A model whose class and modules have hostile names."""
    part = HOSTILE.replace("\x00", "").replace("\udcff", "")  # of which Python makes no class name

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return x + torch.tanh(getattr(self, part)(x))

    model = type(part, (nn.Module,), {"forward": forward})()
    model.add_module(part, nn.Linear(W, W))
    model.register_parameter(f"{part}2", nn.Parameter(torch.ones(1)))
    return model


def test_names_of_classes_and_modules(tmp_path: Path) -> None:
    page = parsed(rz.page(named_with_ill_will(), tmp_path / "page.html", vectors()).read_text())
    assert page.of("h1")[0].text == SHOWN.replace("\ufffd", "")
    assert "return x + torch.tanh(getattr(self, part)(x))" in page.section("adds")
    assert "<script>hit()</script>" in page.section("streams")
    assert "<script>hit()</script>" in page.section("adds")


@pytest.mark.parametrize("make", [Chain, lambda: timm.create_model("resnet18")], ids=["chain", "resnet18"])
def test_every_add_is_there(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = make()
    inputs = vectors() if isinstance(model, Chain) else torch.randn(1, 3, 64, 64)
    report = rz.audit(model, inputs)
    page = parsed(rz.page(model, tmp_path / "page.html", inputs).read_text())
    rows = [element for element in page.of("tr") if "data-count" in element.attributes]
    assert sum(int(row.attributes["data-count"] or 0) for row in rows) == len(report.plan.sites)
    table = page.section("adds")
    for site in report.plan.sites:
        mine = [row for row in rows if {site.path, where_of(site.span), site.code} <= set(row.text.split())]
        assert len(mine) == 1, site.path
        assert site.text.strip() in mine[0].text
        assert mine[0].attributes["data-verdict"] == site.verdict
        assert all(gate.alpha in mine[0].text for gate in site.gates)
    assert {site.code for site in report.plan.sites} <= set(table.split())
    assert len(page.of("svg")) == 1
    assert len(page.of("details")) >= len(rows), "the source around each add"


def test_the_source_around_an_add_is_that_of_the_report() -> None:
    page = parsed(hostile().to_html())
    assert [one.text.split()[0] for one in page.of("pre")[0:1]] == ["1"]
    assert [one.text.split()[0] for one in page.of("span", class_="hit")] == ["2"]
    report = hostile()
    sources.register("net.py", "a = 1\nedited = True\n")
    assert not parsed(report.to_html()).of("pre")
    placeless = replace(report.plan.sites[0], span=None)
    assert not parsed(Report(replace(report.plan, sites=(placeless,))).to_html()).of("pre")


def test_of_a_graph_the_source_around_is_what_was_traced() -> None:
    exported = torch.export.export(Chain(), (vectors(),)).module()
    page = parsed(rz.audit(exported, vectors()).to_html())
    hits = [one.text.split(maxsplit=1)[1] for one in page.of("span", class_="hit")]
    assert hits == ["x = x + torch.tanh(self.a(x))", "return self.b(x) + self.a(x)"]


def test_a_page_without_adds() -> None:
    page = parsed(Report(Plan(())).to_html())
    assert "There are none." in page.section("adds")
    assert not page.of("script")
    assert {one.attributes["id"] for one in page.of("section")} == {"summary", "adds"}


def test_what_was_checked_and_measured(tmp_path: Path) -> None:
    model = rz.convert(Chain(), vectors())
    given = {"validation": rz.validate(model, vectors()), "isometry": Spectrum(zero=0.0)}
    page = parsed(rz.page(model, tmp_path / "page.html", vectors(), **given).read_text())
    assert "The conversion holds: 12 blocks checked." in page.section("validation")
    assert "layers.{0..11}.alpha (x 12)" in page.section("validation")
    assert "(the model) to layers.11 (lanczos): mean square 1.235, median 0.9, largest 3." in page.section("isometry")
    assert [one.attributes["style"] for one in page.of("span", class_="bar")] == ["width:100.0%", "width:50.0%"]
    assert "zero" not in page.section("isometry").split()
    failed = parsed(Report(Plan(())).to_html(validation=checked("3 of 4 differ"), isometry=Spectrum()))
    assert "does not hold" in failed.section("validation")
    assert [one.text for one in failed.of("span", class_="failed")] == ["does not hold", "FAILED", "FAILED"]
    assert [one.text for one in failed.of("span", class_="choice")] == ["by choice"]
    assert "zero" in failed.section("isometry").split()


def test_an_isometry_is_shown_as_it_is_computed() -> None:
    model = rz.convert(Chain(), vectors())
    page = parsed(rz.audit(model).to_html(isometry=rz.isometry(model, vectors())))
    assert "from layers.0 to layers.11 (exact): mean square " in page.section("isometry")
    assert page.of("span", class_="bar")


def test_a_converted_model_by_its_record_or_by_its_code(tmp_path: Path) -> None:
    model = rz.convert(Chain(), vectors())
    for inputs, verdict in ((None, "converted"), (vectors(), "gated")):
        page = parsed(rz.page(model, tmp_path / "page.html", inputs).read_text())
        assert {one.attributes.get("data-verdict") for one in page.of("tr")} == {None, verdict, "refused"}
        assert "alpha 0: layers.{0..11}.alpha" in page.section("summary")


def test_notebooks_get_short_forms(tmp_path: Path) -> None:
    sites = tuple(replace(hostile().plan.sites[0], reason="r" * number) for number in range(20))
    text = Report(Plan(sites))._repr_html_()
    assert text.count("<tr>") == 1 + 12
    assert "<p>and 8 more</p>" in text
    model = rz.convert(Chain(), vectors())
    assert "Chain: holds" in rz.validate(model, vectors())._repr_html_()
    assert "DOES NOT HOLD" in checked("3 of 4 differ")._repr_html_()
    assert "3 of 4 differ" in checked("3 of 4 differ")._repr_html_()


# The command line


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(arguments) == 2
    return capsys.readouterr().err.strip()


def test_refusals(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.py", "b.py"):
        (here / name).write_text(GPT)
    assert "--html is for one file, not 2" in error(["a.py", "b.py", "--html", "x.html"], capsys)
    assert "--html is for one target, not 2" in error(["audit", "a.py", "b.py", "--html", "x.html"], capsys)
    assert "--html a.py: the same file" in error(["a.py", "--html", "a.py"], capsys)
    assert "--html a.py: the same file" in error(["audit", "./a.py", "--html", "a.py"], capsys)
    assert "--svg a.py: the same file" in error(["a.py", "--svg", "a.py"], capsys)
    assert "--html x: the same file" in error(["a.py", "--svg", "x", "--html", "x"], capsys)
    assert "--html x: the same file" in error(["a.py", "-o", "x", "--html", "x"], capsys)
    assert "no/x.html: cannot be written" in error(["a.py", "--html", "no/x.html"], capsys)
    assert sorted(path.name for path in here.iterdir()) == ["a.py", "b.py"]
    assert (here / "a.py").read_text() == GPT


def test_a_page_that_cannot_be_made_leaves_the_old_one(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "broken.py").write_text("class Net(nn.Module:\n")
    (here / "old.html").write_text("old")
    assert "syntax error" in error(["broken.py", "--html", "old.html"], capsys)
    assert (here / "old.html").read_text() == "old"


def test_by_its_text(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = '<script>hit()<&">.py'
    remark = HOSTILE.replace("\x00", "").replace("\udcff", "")
    (here / name).write_text(GPT.replace("class Block(nn.Module):", f"class Block(nn.Module):  # {remark}", 1))
    assert cli.main([name, "--html", "page.html"]) == 0
    said = capsys.readouterr()
    page = parsed((here / "page.html").read_text())
    assert page.of("h1")[0].text == name
    assert [line.rstrip() for line in page.of("pre")[-1].text.rstrip().splitlines()] == [
        line.rstrip() for line in said.out.rstrip().splitlines()
    ]
    assert "static" in page.section("summary")
    assert "validation" not in {one.attributes["id"] for one in page.of("section")}
    assert "wrote page.html" in said.err


def test_by_running_it(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "rz_page_gpt.py").write_text(GPT)
    captures = counted(monkeypatch)
    arguments = ["rz_page_gpt.py", *EXACT, "--json", "--check", "--svg", "drawn.svg", "--html", "page.html"]
    assert cli.main(arguments) == 1
    assert len(captures) == 2, "one for the conversion, one for drawing and page"
    found = json.loads(capsys.readouterr().out)
    assert {block["where"].rpartition("/")[2] for block in found["validation"]["blocks"]} == {
        "rz_page_gpt.py:63:13",
        "rz_page_gpt.py:64:13",
    }
    text = (here / "page.html").read_text()
    page = parsed(text)
    assert (here / "drawn.svg").read_text() in text
    assert "The conversion holds: 8 blocks checked." in page.section("validation")
    assert "rezero_convert_" not in page.section("validation"), "the place of the file, not that of its copy"
    assert "+        self.alpha_attn = nn.Parameter(torch.zeros(1))" in page.section("diff")
    assert "imported in a fresh process" in page.section("summary")


def test_of_a_target(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    captures = counted(monkeypatch)
    assert (
        cli.main(["audit", "timm:resnet18", "--svg", "drawn.svg", "--html", "page.html", "--drop-norm", "batch"]) == 0
    )
    assert len(captures) == 1
    with_views = capsys.readouterr().err
    text = (here / "page.html").read_text()
    assert parsed(text).of("h1")[0].text == "timm:resnet18"
    assert "drop_norm batch" in parsed(text).section("summary")
    assert (here / "drawn.svg").read_text() in text
    assert cli.main(["audit", "timm:resnet18", "--drop-norm", "batch"]) == 0
    assert with_views.split("\n", 2)[2] == capsys.readouterr().err


def counted(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows by one at each capture for an audit, a conversion or a drawing."""
    captures: list[object] = []
    for module in (api, drawing, api.file_plan):
        original = module.capture

        def capture(model: nn.Module, *rest: Any, original: Any = original) -> Any:
            captures.append(model)
            return original(model, *rest)

        monkeypatch.setattr(module, "capture", capture)
    return captures


# In a browser


@pytest.fixture(scope="module")
def tab() -> Iterator[Browser]:
    if CHROMIUM is None:  # pip cannot install a browser; the tests above parse the pages without one
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with browser() as opened:
        yield opened


ROWS = "[...document.querySelectorAll('.adds tbody tr')].filter(row => row.getClientRects().length)"


def visible(tab: Browser) -> list[str]:
    return list(tab.value(f"{ROWS}.map(row => row.dataset.verdict)"))


def shown(tab: Browser, page: Path, width: int = 1200, scheme: str = "light") -> None:
    tab.events.clear()
    tab.appear(width, scheme)
    tab.open(page)


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    return rz.page(Chain(), tmp_path / "page.html", vectors())


def test_the_filter(tab: Browser, chain: Path) -> None:
    shown(tab, chain)
    assert visible(tab) == ["converted", "refused"]
    assert tab.value("document.querySelector('output').textContent") == "24 of 24 adds"
    tab.value("document.querySelector('[type=checkbox]').click()")
    assert visible(tab) == ["refused"]
    assert tab.value("document.querySelector('output').textContent") == "12 of 24 adds"
    tab.value("document.querySelector('[type=checkbox]').click()")
    for words, found in (
        ("LAYERS.7 tanh", ["converted"]),
        ("rz1", ["converted"]),
        ("self.b(x)", ["refused"]),
        ("nowhere", []),
    ):
        tab.value("document.querySelector('[type=search]').select(); document.querySelector('[type=search]').focus()")
        tab.ask("Input.insertText", text=words)
        assert visible(tab) == found, words
    tab.value("document.querySelector('[type=search]').value = ''")
    tab.value("document.querySelector('form').requestSubmit()")
    assert tab.value("location.search") == ""
    assert not tab.complaints()
    assert tab.requests() == [chain.as_uri()]


def test_light_and_dark(tab: Browser, chain: Path) -> None:
    found = {}
    for scheme in ("light", "dark"):
        shown(tab, chain, scheme=scheme)
        parts = ("body", "svg .paper", ".mark", "svg .ink", "a")
        values = [
            tab.value(
                f"(s => [s.color, s.backgroundColor, s.fill])(getComputedStyle(document.querySelector('{part}')))"
            )
            for part in parts
        ]
        found[scheme] = dict(zip(parts, values, strict=True))
        assert not tab.complaints()
    light, dark = found["light"], found["dark"]
    assert light["body"][1] == "rgb(255, 255, 255)" == light["svg .paper"][2]
    assert dark["body"][1] == "rgb(13, 17, 23)" == dark["svg .paper"][2]
    assert all(light[part] != dark[part] for part in light)


@pytest.mark.parametrize("width", [1600, 1000, 700, 360])
def test_it_fits_the_window(tab: Browser, chain: Path, width: int) -> None:
    shown(tab, chain, width)
    tab.value("for (const one of document.querySelectorAll('details')) one.open = true")
    assert tab.value("document.documentElement.scrollWidth") == width
    assert visible(tab) == ["converted", "refused"]


def test_all_is_there_without_scripts(tab: Browser, chain: Path) -> None:
    tab.ask("Emulation.setScriptExecutionDisabled", value=True)
    try:
        shown(tab, chain)
        assert visible(tab) == ["converted", "refused"]
        assert not tab.value("document.querySelector('form').getClientRects().length")
    finally:
        tab.ask("Emulation.setScriptExecutionDisabled", value=False)


def test_a_browser_runs_nothing_of_a_hostile_page(tab: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    write(page, hostile().to_html(diff=f"+{HOSTILE}", validation=checked(HOSTILE), isometry=Spectrum()).encode())
    shown(tab, page)
    assert tab.value("document.scripts.length") == 1
    assert tab.value("document.images.length") == 0
    assert tab.value("document.querySelector('h1').textContent") == SHOWN
    assert not tab.complaints()
    assert tab.requests() == [page.as_uri()]


def test_the_policy_stops_what_would_get_in(tab: Browser, chain: Path) -> None:
    """The check of the complaints can fail, and the page's second line of defence holds."""
    let_in = chain.read_text().replace("<h2>Adds", "<script>document.title = 'hit'</script><img src=x.png><h2>Adds", 1)
    chain.write_text(let_in)
    shown(tab, chain)
    assert tab.value("document.title") == "Chain: residual blocks"
    assert len([said for said in tab.complaints() if "Content Security Policy" in said]) == 2

"""The comparison of the source route with the recorded one: that it can fail, and one file of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sweep import static_vs_recorded as compare
from sweep.record import Record

from rezero_convert.plan import Gate, Place, Plan, Site, Span

FILE = "timm/models/levit.py"


def text(**sites: list[str]) -> Record:
    return Record("timm", "a.py", "text", "ok", found={"sites": sites})


def spans(name: str, **sites: list[str]) -> Record:
    return Record("timm", name, "spans", "ok", found={"sites": {"a.py": sites}})


def said(verdict: str, code: str = "", function: str = "A.forward") -> list[str]:
    return [verdict, code, "why", function]


def test_spans_are_told_apart() -> None:
    static = text(
        both=said("rewritten"), wrong=said("rewritten"), unlisted=said("rewritten"), other=said("rewritten", "", "B.f"),
        arm=said("rewritten"), left=said("refused", "RZ915"), agreed=said("refused", "RZ901"),
    )  # fmt: skip
    runs = [
        spans("one", both=said("not-executed"), wrong=said("refused", "RZ902"), left=said("rewritten")),
        spans("two", both=said("rewritten"), arm=said("not-executed"), gone=said("rewritten"), agreed=said("refused")),
    ]
    found = compare.compared([static, *runs], "timm")
    assert found.right == 1
    assert [one.split()[0] for one in found.wrong] == ["a.py:unlisted", "a.py:wrong"]
    assert found.unseen == 2
    assert [(code, place.split()[0]) for code, place in found.missed] == [
        ("not found", "a.py:gone"), ("RZ915", "a.py:left"),
    ]  # fmt: skip
    assert (found.precision, found.recall) == (1 / 3, 1 / 3)


def test_an_arm_that_no_run_took_is_not_wrong() -> None:
    static = text(taken=said("rewritten"), other=said("rewritten"))
    runs = [spans("one", taken=said("rewritten"))]
    assert len(compare.compared([static, *runs], "timm").wrong) == 1
    static.found["apart"] = {"other": ["taken"]}
    found = compare.compared([static, *runs], "timm")
    assert (found.wrong, found.unseen) == ((), 1)


def test_an_add_that_is_gated_for_some_instances_only_is_left_by_a_run() -> None:
    place = Place("0", "A.forward", compare._installed(FILE).as_posix(), 1)
    gates = (Gate(None, "alpha", "", ""),)
    one = Site("converted", "RZ101", "", "0", "A", place, Span(place.file, 2, 3, 4, 5), gates=gates)
    other = replace(one, path="1", verdict="interior", code="RZ131")
    found = compare._by_file(Plan((one, other)))
    assert [sites["2:3:4:5"][:2] for sites in found.values()] == [["refused", "RZ917"]]
    assert compare._by_file(Plan((one,)))[FILE]["2:3:4:5"][0] == "rewritten"


def test_no_more_models_run_once_every_add_was_come_to(monkeypatch: Any) -> None:
    one = text(a=said("rewritten"), b=said("refused"))
    assert not compare.covered([one, spans("one", a=said("rewritten"), b=said("not-executed"))], "timm", "a.py")
    runs = [spans("one", a=said("rewritten")), spans("two", b=said("refused"))]
    assert compare.covered([one, *runs], "timm", "a.py")
    assert not compare.covered(runs, "timm", "a.py")  # its text was not read
    monkeypatch.setattr(compare, "files", lambda zoo: ["a.py"])
    monkeypatch.setattr(compare, "models", lambda zoo, each: {"a.py": ["one", "two", "three"]})
    options = compare._parser().parse_args(["--zoo", "timm", "--kind", "text", "--kind", "spans"])
    done: dict[tuple[str, str, str], Record] = {}
    asked = []
    for task in compare._tasks(options, done):
        asked.append(task[1])
        done[task] = {"a.py": one, "one": runs[0], "two": runs[1]}[task[1]]
    assert asked == ["a.py", "one", "two"]


def test_what_no_text_was_read_of_is_not_compared() -> None:
    assert compare.compared([spans("one", both=said("rewritten"))], "timm") == compare.Tally()


def test_a_file_and_a_model_of_it_agree() -> None:
    records = [compare.work("timm", FILE, "text"), compare.work("timm", "levit_128s", "spans")]
    assert [one.status for one in records] == ["ok", "ok"]
    found = compare.compared(records, "timm")
    assert (found.right, found.wrong, found.missed) == (3, (), ())


def test_a_rewriting_that_does_not_hold_is_told(monkeypatch: Any) -> None:
    convert = compare.rz.convert_source

    def unstable(source: str, **options: Any) -> Any:
        result = convert(source, **options)
        return compare.rz.api.SourceResult(result.text + "\n", result.report)

    monkeypatch.setattr(compare.rz, "convert_source", unstable)
    assert compare.work("timm", FILE, "text").reasons == ("second run: it changes the text again",)
    untouched = "timm/models/_features.py"
    assert compare.work("timm", untouched, "text").reasons == (
        "unchanged: there are no findings, and the bytes differ",
    )


@pytest.mark.slow
def test_the_rewritten_file_in_a_fresh_process(monkeypatch: Any, tmp_path: Path) -> None:
    assert compare.work("timm", "levit_128s", "fresh").status == "ok"
    convert = compare.rz.convert_source

    def wrong(source: str, **options: Any) -> Any:
        result = convert(source, **options)
        changed = result.text.replace("self.alpha * ", "2 * self.alpha * ")
        return compare.rz.api.SourceResult(changed, result.report)

    monkeypatch.setattr(compare.rz, "convert_source", wrong)
    told = compare.work("timm", "levit_128s", "fresh")
    assert told.status == "failed"
    assert told.reasons[0].startswith("output 0 differs")

"""The source route against the recorded one, over the files of timm/models and transformers' `modeling_*.py`.

`python -m tests.sweep.static_vs_recorded --zoo timm --out DIR` from the root of the repository; see `--help`.

Three kinds of records, JSON lines: text (a file: what its text says by itself, and the checks of the rewritten text),
spans (a model: what a run of it says, by file), fresh (a model: the rewritten files imported in a fresh process in
place of the originals, with the weights and the random alphas of the live route's model). The table joins them.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import rezero_convert as rz
from rezero_convert import sources, targets
from rezero_convert.capture.static import exclusive
from rezero_convert.plan import Plan, Span
from rezero_convert.rewrite import modules

from . import hf, pool, record, zoos
from .checks import VERSIONS, _one_line, _where
from .made import Made, NotRunnable, first_that_runs
from .record import Kind, Record

ROOT = Path(__file__).parent.parent.parent
RUN = ("converted", "gated", "refused", "long-skip", "interior", "hidden")
"""Verdicts on adds that a run came to."""


# What is compared


def work(zoo: str, name: str, kind: Kind) -> Record:
    """One record; whatever is raised is in it."""
    start = time.monotonic()
    one = Record(zoo, name, kind, "ok", versions=VERSIONS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            one = {"text": _text, "spans": _spans, "fresh": _fresh}[kind](one)
    except NotRunnable as error:
        one = replace(one, status="does not run", reasons=(str(error)[:300],))
    except Exception as error:  # is what the record is to tell
        one = replace(one, status="failed", reasons=(_one_line(error),), where=_where(error))
    return replace(one, seconds=round(time.monotonic() - start, 2))


def _text(one: Record) -> Record:
    """The static findings of a file; the rewritten text compiles, a second run is empty, what stays is identical."""
    file = _installed(one.name)
    text = file.read_bytes().decode()
    result = rz.convert_source(text, file=str(file))
    reasons = []
    try:
        compile(result.text, str(file), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        reasons.append(f"compile: {_one_line(error)}")
    if result.report.plan.edited:
        if result.text == text:
            reasons.append("unchanged: there are findings, and the text is the same")
        if rz.convert_source(result.text, file=str(file)).text != result.text:
            reasons.append("second run: it changes the text again")
        sources.register(str(file), text)
    elif result.text.encode() != file.read_bytes():
        reasons.append("unchanged: there are no findings, and the bytes differ")
    sites = _by_file(result.report.plan).get(one.name, {})
    apart = {span: [other for other in sites if exclusive(_span(file, span), _span(file, other))] for span in sites}
    found = {"sites": sites, "apart": {span: others for span, others in apart.items() if others}}
    return replace(one, status="failed" if reasons else "ok", reasons=tuple(reasons), found=found)


def _span(file: Path, place: str) -> Span:
    return Span(str(file), *map(int, place.split(":")))


def _spans(one: Record) -> Record:
    """What a run of a model says of the adds of the libraries' files."""
    made = _cheap(one.name) if one.zoo == "transformers" else zoos.ZOOS[one.zoo].make(one.name, "structure")
    plan = rz.audit(made.model, made.inputs).plan
    return replace(one, note=made.note, found={"sites": _by_file(plan)})


def _cheap(name: str) -> Made:
    """A class of transformers: with numbers only where its configuration is shrunk, the larger ones without."""
    zoos._declare_torchvision()
    attempts = list(hf.attempts(name))
    try:
        return first_that_runs((one for one in attempts if one.note.startswith("small")), "cpu")
    except NotRunnable as error:
        try:
            return first_that_runs(attempts, "meta")
        except NotRunnable as other:
            raise NotRunnable(f"{error} | on meta: {other}") from other


def _by_file(plan: Plan) -> dict[str, dict[str, list[str]]]:
    """By file and span: verdict (rewritten if all instances are that ran), code, reason, function."""
    found: dict[str, dict[str, list[str]]] = {}
    left = {site.span for site in plan.of("refused", "long-skip", "interior")}
    for site in sorted(plan.sites, key=lambda site: (site.edited, site.verdict in RUN)):
        if site.span is not None and site.place is not None and (name := _shown(site.span.file)):
            verdict = "rewritten" if site.edited else site.verdict if site.verdict in RUN else "not-executed"
            span = site.span
            place = f"{span.line}:{span.col}:{span.end_line}:{span.end_col}"
            said = [verdict, site.code, site.reason]
            if site.edited and span in left:  # one text serves all: the exact route leaves it, too
                said = ["refused", "RZ917", "it is gated for some of its instances only"]
            found.setdefault(name, {})[place] = [*said, site.place.qualname]
    return found


def _fresh(one: Record) -> Record:
    """The model of the rewritten files computes what the live route's model computes."""
    made = zoos.ZOOS[one.zoo].make(one.name, "numbers")
    converted = rz.convert(made.model, made.inputs, verify=False)
    plan = modules.record(converted)
    if plan is None or not plan.converted:
        return replace(one, status="does not run", reasons=("the live route rewrites nothing",))
    gates = dict(rz.alphas(converted))
    for gate in gates.values():
        torch.nn.init.uniform_(gate, 0.5, 1.5)
    with tempfile.TemporaryDirectory(prefix="rezero_convert_") as folder:
        texts = {}
        for number, file in enumerate(sorted({site.span.file for site in plan.edited if site.span is not None})):
            name = _shown(file)
            if name is None:
                raise NotRunnable(f"{file} is in no library")
            text = Path(file).read_bytes().decode()
            new = rz.convert_source(text, file=file).text
            if new != text:
                own = Path(folder, f"{number}_{Path(file).name}")
                own.write_bytes(new.encode())
                texts[name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")] = str(own)
        request, answer = Path(folder, "live.pt"), Path(folder, "answer.json")
        torch.save({
            "zoo": one.zoo, "name": one.name, "texts": texts, "to": str(answer), "gates": list(gates),
            "state": dict(converted.state_dict()), "inputs": made.inputs, "note": made.note,
            "outputs": Made(converted, made.inputs).run(converted),
        }, request)  # fmt: skip
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(f"{request}\n")
        server.stdin.flush()
        if not server.stdout.readline() or not answer.exists():
            raise RuntimeError("fresh process: it ended without an answer")
        told = json.loads(answer.read_text())
    reasons = tuple(told["reasons"])
    return replace(one, status="failed" if reasons else "ok", reasons=reasons, gates=len(gates), found=told["found"])


@cache
def _server() -> subprocess.Popen[str]:
    """A process that has imported what all models need and no file of models; a fork of it is fresh, and cheap."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-m", f"{__package__}.{Path(__file__).stem}", "--answer"]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, stdin=pipe, stdout=pipe, text=True
    )


def serve() -> None:
    """Answer requests, files named on standard input, each in a process of its own."""
    said = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    zoos._declare_torchvision()
    import transformers.generation
    import transformers.modeling_utils  # noqa: F401

    for line in sys.stdin:
        request = Path(line.rstrip("\n"))
        process = os.fork()
        if not process:
            try:
                answer(request)
            except BaseException as error:  # is what the record is to tell
                told = {"reasons": [f"fresh process: {_one_line(error)}"], "found": {}}
                request.with_name("answer.json").write_text(json.dumps(told))
            os._exit(0)
        os.waitpid(process, 0)
        print("done", file=said, flush=True)


def answer(request: Path) -> None:
    """In the fresh process: build the model from the rewritten texts, with the live model's weights; compare."""
    asked = torch.load(request, weights_only=False)
    for name, file in asked["texts"].items():
        sys.meta_path.insert(0, targets._Replaced(name, file))
    made = zoos.ZOOS[asked["zoo"]].make(asked["name"], "numbers")
    model, reasons = made.model, []
    for name, file in asked["texts"].items():
        if getattr(sys.modules.get(name), "__file__", None) != file:
            reasons.append(f"{name} was not imported from the rewritten text")
    if made.note != asked["note"]:
        reasons.append(f"built {made.note}, the live model {asked['note']}")
    named = dict(model.named_parameters())
    missing, unexpected = model.load_state_dict(asked["state"], strict=False)
    # the file's own gate beside one that only some instances have: neutral here
    beside = [name for name in missing if named[name].numel() == 1 and not named[name].any()]
    for name in beside:
        torch.nn.init.ones_(named[name])
    reasons += [f"only in the file's model: {name}" for name in missing if name not in beside][:3]
    reasons += [f"only in the live model: {name}" for name in unexpected][:3]
    if not reasons:
        outputs = Made(model, asked["inputs"]).run(model)
        if len(outputs) != len(asked["outputs"]):
            reasons.append("another number of outputs")
        for number, (one, other) in enumerate(zip(outputs, asked["outputs"], strict=False)):
            if not torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(other.float().abs().max() + 1)):
                reasons.append(f"output {number} differs by {float((one.float() - other.float()).abs().max()):.1e}")
    Path(asked["to"]).write_text(json.dumps({"reasons": reasons, "found": {"beside": beside}}))


# Files and models


@cache
def _library(zoo: str) -> Path:
    found = importlib.util.find_spec(zoo)
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def _installed(name: str) -> Path:
    return _library(name.partition("/")[0]).parent / name


def _shown(file: str) -> str | None:
    """A file's name below site-packages, if it is one of the libraries'."""
    for zoo in ("timm", "transformers"):
        if Path(file).is_relative_to(_library(zoo)):
            return Path(file).relative_to(_library(zoo).parent).as_posix()
    return None


def files(zoo: str) -> list[str]:
    pattern = {"timm": "models/*.py", "transformers": "models/*/modeling_*.py"}[zoo]
    return sorted(str(_shown(str(file))) for file in _library(zoo).glob(pattern) if file.name != "__init__.py")


def models(zoo: str, each: int) -> dict[str, list[str]]:
    """Up to `each` models of every file that has some: spread over its list, for transformers its first."""
    zoos._declare_torchvision()
    found: dict[str, list[str]] = {}
    if zoo == "timm":
        import timm

        for name in timm.list_models():
            found.setdefault(timm.model_entrypoint(name).__module__.replace(".", "/") + ".py", []).append(name)
    else:
        import transformers
        from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

        homes = transformers._class_to_module
        base = [
            name for entry in MODEL_MAPPING_NAMES.values() for name in ([entry] if isinstance(entry, str) else entry)
        ]
        others = [name for name in sorted(homes) if ".modeling_" in homes[name] and _concrete(name)]
        parts = [name for name in others if name.endswith(("Model", "Backbone"))] + [
            name for name in others if "For" in name
        ]
        for name in dict.fromkeys([*hf.names(), *base, *parts]):
            if name in homes:
                found.setdefault(f"transformers/{homes[name].replace('.', '/')}.py", []).append(name)
        return {file: names[:each] for file, names in sorted(found.items())}
    return {file: names[:: -(-len(names) // each)] for file, names in sorted(found.items())}


def _concrete(name: str) -> bool:
    return not name.startswith(("Auto", "MODEL_")) and not name.endswith("PreTrainedModel")


def covered(records: Iterable[Record], zoo: str, file: str) -> bool:
    """Whether runs came to every add of a file whose text was read."""
    text: set[str] | None = None
    seen: set[str] = set()
    for one in records:
        if (one.zoo, one.name, one.kind) == (zoo, file, "text") and one.found:
            text = set(one.found["sites"])
        elif one.zoo == zoo and one.kind == "spans" and one.found:
            seen |= {span for span, said in one.found["sites"].get(file, {}).items() if said[0] != "not-executed"}
    return text is not None and text <= seen


# The table


@dataclass(frozen=True)
class Tally:
    """The spans of one library, by what the two routes say of them."""

    right: int = 0
    wrong: tuple[str, ...] = ()
    """Rewritten by the text alone; no run that came there did."""
    unseen: int = 0
    """Rewritten by the text alone; no run came there."""
    missed: tuple[tuple[str, str], ...] = ()
    """Rewritten by a run and not by the text: the static code, and the place with the reason."""

    @property
    def precision(self) -> float:
        return self.right / max(1, self.right + len(self.wrong))

    @property
    def recall(self) -> float:
        return self.right / max(1, self.right + len(self.missed))


def compared(records: Iterable[Record], zoo: str) -> Tally:
    """Span by span, over the files of which at least one model ran."""
    listed = [one for one in records if one.zoo == zoo]
    texts = {one.name: one.found["sites"] for one in listed if one.kind == "text" and one.found}
    apart = {one.name: one.found.get("apart", {}) for one in listed if one.kind == "text" and one.found}
    recorded: dict[str, dict[str, list[str]]] = {}
    for one in listed:
        if one.kind == "spans" and one.status == "ok":
            for file, sites in one.found["sites"].items():
                for span, said in sites.items():
                    known = recorded.setdefault(file, {}).get(span)
                    if known is None or _weight(said[0]) > _weight(known[0]):
                        recorded[file][span] = said
    right, unseen, wrong, missed = 0, 0, [], []
    for file, sites in sorted(texts.items()):
        ran = recorded.get(file, {})
        functions = {said[3] for said in ran.values()}
        static = {span for span, said in sites.items() if said[0] == "rewritten"}
        dynamic = {span for span, said in ran.items() if said[0] == "rewritten"}
        right += len(static & dynamic)
        for span in sorted(static - dynamic):
            said = ran.get(span)
            other_arm = any(other in ran for other in apart[file].get(span, ()))
            if said is None and sites[span][3] in functions and not other_arm:
                wrong.append(f"{file}:{span} not an add of tensors in the run")
            elif said is None or said[0] == "not-executed":
                unseen += 1
            else:
                wrong.append(f"{file}:{span} {said[1]} {said[2]}")
        for span in sorted(dynamic - static):
            code, reason = sites[span][1:3] if span in sites else ("not found", "")
            missed.append((code, f"{file}:{span} {reason or ran[span][3]}"))
    return Tally(right, tuple(wrong), unseen, tuple(missed))


def _weight(verdict: str) -> int:
    return 2 if verdict == "rewritten" else int(verdict in RUN)


def table(records: Iterable[Record]) -> str:
    listed = list(records)
    heads = "library, files, models run, spans both rewrite, precision, recall, not run, texts hold, fresh equal".split(
        ", "
    )
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    details: list[str] = []
    for zoo in dict.fromkeys(one.zoo for one in listed):
        tally = compared(listed, zoo)
        kinds = {
            kind: [one for one in listed if (one.zoo, one.kind) == (zoo, kind)] for kind in ("text", "spans", "fresh")
        }
        ok = {kind: sum(one.status == "ok" for one in some) for kind, some in kinds.items()}
        asked = sum(one.status != "does not run" for one in kinds["fresh"])
        cells = [zoo, len(kinds["text"]), ok["spans"], tally.right, f"{tally.precision:.2%}", f"{tally.recall:.2%}"]
        cells += [tally.unseen, f"{ok['text']}/{len(kinds['text'])}", f"{ok['fresh']}/{asked}"]
        rows.append(f"| {' | '.join(map(str, cells))} |")
        codes = Counter(code for code, _ in tally.missed)
        details += [f"\n## {zoo}: {len(tally.missed)} missed by the text, by its code\n"]
        details += [f"- {code}: {number}" for code, number in codes.most_common()]
        details += [f"    - {code} {place}" for code, place in sorted(tally.missed)]
        details += [
            f"\n## {zoo}: {len(tally.wrong)} rewritten by the text only\n",
            *(f"- {one}" for one in tally.wrong),
        ]
        failed = [one for some in kinds.values() for one in some if one.status == "failed"]
        details += [f"\n## {zoo}: {len(failed)} failures\n"]
        details += [f"- {one.name} ({one.kind}): {'; '.join(one.reasons)[:300]}" for one in failed]
    return "\n".join([*rows, *details]) + "\n"


# The command


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.answer:
        serve()
        return 0
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "static_vs_recorded.jsonl"
    done = {} if options.again else record.load(file)
    left = _tasks(options, done)
    columns = (TextColumn("{task.description:40.40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=Console(file=sys.stderr)) as progress:
        bar = progress.add_task("", total=None)
        prepare = partial(_prepare, tuple(options.zoo))
        for one in pool.run(left, work, options.jobs, options.timeout, options.memory, out / "workers.log", prepare):
            record.append(file, one)
            done[one.key] = one
            progress.update(bar, advance=1, description=f"{one.name} ({one.kind})")
    text = table(record.load(file).values())
    (out / "static_vs_recorded.md").write_text(text)
    print(text)
    return int(any(one.status == "failed" for one in record.load(file).values()))


def _tasks(options: argparse.Namespace, done: Mapping[tuple[str, str, str], Record]) -> Iterator[pool.Task]:
    """What has no record in `done`, which grows meanwhile: no further model of a file that is covered."""
    kinds = options.kind or ("text", "spans", "fresh")
    for zoo in options.zoo:
        chosen = {file: names for file, names in models(zoo, options.each).items() if _wanted(file, options.only)}
        for file in dict.fromkeys([*(one for one in files(zoo) if _wanted(one, options.only)), *chosen]):
            if "text" in kinds and (zoo, file, "text") not in done:
                yield zoo, file, "text"
            for name in chosen.get(file, ()) if "spans" in kinds else ():
                if (zoo, name, "spans") not in done and not covered(done.values(), zoo, file):
                    yield zoo, name, "spans"
        if "fresh" in kinds:
            yield from ((zoo, names[0], "fresh") for names in chosen.values() if (zoo, names[0], "fresh") not in done)


def _prepare(chosen: tuple[str, ...]) -> None:
    """What a process imports once, for all of its records."""
    for zoo in chosen:
        work(zoo, _SMALL[zoo], "spans")


_SMALL = {"timm": "resnet18", "transformers": "GPT2LMHeadModel"}
"""Models that import what the others also need."""


def _wanted(name: str, patterns: list[str]) -> bool:
    return not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.sweep.static_vs_recorded", description=__doc__)
    parser.add_argument("--zoo", action="append", default=[], choices=("timm", "transformers"),
                        help="repeatable; without it the table is written anew from the results there are")  # fmt: skip
    parser.add_argument("--out", default=".", metavar="DIR", help="for static_vs_recorded.jsonl and .md, workers.log")
    parser.add_argument("--kind", action="append", choices=("text", "spans", "fresh"), help="repeatable; default all")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="files that match (repeatable)")
    parser.add_argument("--each", type=int, default=4, metavar="N", help="models run a file, at most (default 4): "
                        "no more once runs came to all of its adds")  # fmt: skip
    parser.add_argument("--again", action="store_true", help="also what has a result")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (default 1)")
    parser.add_argument("--timeout", type=float, default=180, metavar="S", help="seconds a task may take (default 180)")
    parser.add_argument(
        "--memory", type=float, default=16, metavar="GB", help="address space of a process (default 16)"
    )
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())

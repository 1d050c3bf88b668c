"""Whole models: blocks and decoys in chains, stacks, nests and loops."""

from __future__ import annotations

from random import Random

from .blocks import BLOCKS, plain
from .decoys import DECOYS
from .writing import Case, Class, Part, Writer


def model(random: Random) -> Case:
    """A model drawn at random: every choice comes from `random`."""
    w = Writer(random, image=random.randrange(3) == 0)
    _stages(w, "Net", 4, random.choice((1, 1, 2, 2, 3, 4)), depth=0)
    return w.case()


def of_forms(random: Random, forms: tuple[str, ...], *, image: bool) -> Case:
    """A model of blocks and decoys that are given by name."""
    named = {form.__name__: form for form in (*DECOYS, *BLOCKS)}
    w = Writer(random, image)
    parts, width = [], 4
    for name in forms:
        parts.append(named[name](w, width))
        width = parts[-1].width
    _chain(w, "Net", parts, 4)
    return w.case()


def _stages(w: Writer, stem: str, width: int, count: int, depth: int) -> Part:
    parts: list[Part] = []
    here = width
    for _ in range(count):
        part = _part(w, here, depth)
        parts.append(part)
        here = part.width
    return _chain(w, stem, parts, width)


def _part(w: Writer, width: int, depth: int) -> Part:
    kind = w.random.randrange(10)
    if kind < 6:
        return w.random.choice(BLOCKS)(w, width)
    if kind < 8 or depth >= 2:
        return w.random.choice(DECOYS)(w, width)
    if kind == 8:
        return _stages(w, "Stage", width, w.random.choice((1, 2)), depth + 1)
    return _long(w, width)


def _chain(w: Writer, stem: str, parts: list[Part], width: int) -> Part:
    """One after the other: attributes, an `nn.Sequential`, or a list that is walked."""
    c = w.begin(stem, arguments="" if stem == "Net" else "width")
    out = parts[-1].width if parts else width
    if stem == "Net" and w.chance(50):
        c.body.append(f"x = {c.module(w.linear(str(width), str(width)))}(x)")
    form = w.random.choice(("attributes", "attributes", "sequential", "list", "shared"))
    if form in ("sequential", "list") and all(part.plain for part in parts):
        made = ", ".join(part.make for part in parts)
        if form == "sequential":
            c.body.append(f"x = {c.module(f'nn.Sequential({made})')}(x)")
        else:
            layers, v = c.module(f"nn.ModuleList([{made}])"), c.local()
            c.body += [f"for {v} in {layers}:", f"    x = {v}(x)"]
    else:
        for part in parts:
            m = c.module(part.make)
            c.body.append(f"x = {part.call.format(m=m, x='x')}")
            if form == "shared" and part.width == _width_before(parts, part, width) and w.chance(50):
                c.body.append(f"x = {part.call.format(m=m, x='x')}")
    _end(w, c, stem, out)
    name = w.end(c)
    return Part(name, f"{name}()" if stem == "Net" else f"{name}({width})", out, opens=bool(parts) and parts[0].opens)


def _width_before(parts: list[Part], part: Part, width: int) -> int:
    index = parts.index(part)
    return parts[index - 1].width if index else width


def _end(w: Writer, c: Class, stem: str, width: int) -> None:
    kind = w.random.choice(("plain", "head", "norm and head")) if stem == "Net" else "plain"
    if kind == "norm and head":
        c.body.append(f"x = {c.module(w.linear(str(width), str(width)))}(x)")  # else it is the last block's post-norm
        make, _ = w.norm(inside=False)
        c.body.append(f"x = {c.module(make.replace('width', str(width)))}(x)")
    if kind != "plain":
        c.body.append(f"x = {c.module(w.linear(str(width), '3'))}(x)")
    c.body.append("return x")


def _long(w: Writer, width: int) -> Part:
    """A skip around a chain of blocks."""
    parts = [plain(w, width), plain(w, width)][: w.random.choice((1, 2))]
    c = w.begin("Long")
    body = c.module(f"nn.Sequential({', '.join(part.make for part in parts)})")
    c.body.append(f"return x + {body}(x)" + w.mark(c, "long-skip", why="around blocks"))
    name = w.end(c)
    return Part(name, f"{name}({width})", width, opens=True)

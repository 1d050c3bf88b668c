"""Residual blocks, each a class of its own, in the spellings that people use."""

from __future__ import annotations

from collections.abc import Callable

from .branches import branch, chain, dropped, sequential
from .writing import Class, Part, Writer

Form = Callable[[Writer, int], Part]


def _joined(w: Writer, c: Class, skip: str, value: str) -> str:
    """An add of a branch as an expression."""
    forms = ["{x} + {f}", "{f} + {x}", "torch.add({x}, {f})", "{x}.add({f})", "operator.add({f}, {x})", "{x} - {f}",
             "torch.add({x}, {f}, alpha=2)", "{x} + 0.5 * {f}", "{x} + {f} * 0.5", "({x} + {f})", "{x} + ({f}) / 2",
             "torch.add(input={x}, other={f})", "{x}.clone() + {f}", "{x} + {f}.to({x}.dtype)"]  # fmt: skip
    return w.random.choice(forms).format(x=skip, f=value)


def _finish(w: Writer, c: Class, width: int, **options: object) -> Part:
    return Part(w.end(c), f"{c.name}({width})", width, **options)  # type: ignore[arg-type]  # of Part


def plain(w: Writer, width: int) -> Part:
    c = w.begin("Block")
    value = _joined(w, c, "x", branch(w, c, "x"))
    mark = w.mark(c, "converted", 1, why="the plain block")
    if w.chance(50):
        c.body.append(f"return {value}{mark}")
    else:
        c.body += [f"x = {value}{mark}", "return x"]
    return _finish(w, c, width, opens=True)


def normed(w: Writer, width: int) -> Part:
    """Pre-norm, branch-end norm or both; twice in one class now and then."""
    c = w.begin("Normed")
    for _ in range(w.random.choice((1, 2))):
        where = w.random.choice(("pre", "end", "sandwich"))
        h = "x"
        if where != "end":
            make, goes = w.norm()
            h = _norm(w, c, make, goes, "x")
        inline = "(" in h and w.chance(50)  # a branch that reads it once
        if "(" in h and not inline:
            name = c.local()
            c.body.append(f"{name} = {h}")
            h = name
        value = branch(w, c, h, linear=inline)
        if where != "pre":
            make, goes = w.norm()
            value = _norm(w, c, make, goes, value)
        c.body.append(f"x = {_joined(w, c, 'x', value)}" + w.mark(c, "converted", 1, why=f"{where}-norm"))
    c.body.append("return x")
    return _finish(w, c, width, opens=True)


def _norm(w: Writer, c: Class, make: str, goes: bool, value: str) -> str:
    name = c.module(make)
    inner = ".norm" if make.startswith("ChannelNorm") else ""
    (w.dropped if goes else w.kept).append((c.name, name.removeprefix("self.") + inner))
    return f"{name}({value})"


def post_norm(w: Writer, width: int) -> Part:
    c = w.begin("Post")
    out, (make, goes) = c.local(), w.norm(inside=False)
    value = branch(w, c, "x")
    mark = w.mark(c, "converted", 1, why="post-norm")
    norm = _norm(w, c, make, goes, "{}")
    if w.chance(50):
        c.body.append(f"return {norm.format(f'x + {value}')}{mark}")
    else:
        c.body += [f"{out} = x + {value}{mark}", f"return {norm.format(out)}"]
    return _finish(w, c, width, opens=True)


def activation_after(w: Writer, width: int) -> Part:
    c = w.begin("Basic")
    out, value = c.local(), branch(w, c, "x", linear=True)
    kind = w.random.choice(("functional", "module", "in place", "nested", "sigmoid", "method"))
    mark = w.mark(c, "converted", 1, why=f"activation after the add: {kind}")
    if kind in ("module", "in place"):
        act = c.module("nn.ReLU(inplace=True)" if kind == "in place" else "nn.SiLU()")
        c.body += [f"{out} = {value}", f"{out} += x{mark}", f"{out} = {act}({out})", f"return {out}"]
    elif kind == "functional":
        c.body += [f"{out} = {value} + x{mark}", f"return F.gelu({out})"]
    elif kind == "nested":
        c.body.append(f"return {c.module('nn.LeakyReLU(0.1)')}(x + {value}){mark}")
    elif kind == "method":
        c.body.append(f"return (x + {value}).relu(){mark}")
    else:
        c.body.append(f"return torch.sigmoid(x + {value}){mark}")
    return _finish(w, c, width, opens=kind != "sigmoid")


def in_place(w: Writer, width: int) -> Part:
    c = w.begin("InPlace")
    skip, out = c.local(), c.local()
    c.body.append(f"{skip} = x")
    if w.chance(40):
        make, goes = w.norm()
        c.body.append(f"x = {_norm(w, c, make, goes, 'x')}")
    c.body.append(f"{out} = {branch(w, c, 'x', linear=True)}")
    mark = w.mark(c, "converted", 1, why="in place")
    spelled = w.random.choice((f"{out} += {skip}", f"{out}.add_({skip})", f"{out} = {out}.add_({skip})",
                               f"{skip} = {skip} + {out}; {out} = {skip}"))  # fmt: skip
    c.body += [f"{spelled}{mark}", f"return {out}"]
    return _finish(w, c, width, opens=True)


def n_ary(w: Writer, width: int) -> Part:
    c = w.begin("Parallel")
    h = "x"
    if w.chance(60):
        make, goes = w.norm()
        h = c.local()
        c.body.append(f"{h} = {_norm(w, c, make, goes, 'x')}")
    one, other = branch(w, c, h), branch(w, c, h)
    form = w.random.choice(("x + {a} + {b}", "{a} + x + {b}", "{a} + {b} + x", "x + ({a} + {b})", "two"))
    mark = w.mark(c, "converted", 2, why="parallel branches")
    if form == "two":
        out = c.local()
        c.body += [f"{out} = {one} + {other}", f"return {out} + x{mark}"]
    else:
        c.body.append(f"return {form.format(a=one, b=other)}{mark}")
    return _finish(w, c, width, opens=True)


def projection(w: Writer, width: int) -> Part:
    """The width changes."""
    to = w.random.choice([other for other in (4, 6, 8) if other != width])
    c = w.begin("Widen", arguments="width, to")
    first, last = c.module(w.linear("width", "to")), c.module(w.linear("to", "to"))
    value = f"{last}(F.relu({first}(x)))"
    simple = "nn.Conv2d(width, to, 1)" if w.image else "nn.Linear(width, to)"
    kind = w.random.choice(("direct", "optional", "sequential" if w.image else "direct"))
    if kind == "sequential":
        simple = f"nn.Sequential({simple}, nn.BatchNorm2d(to))"
    shortcut = c.module(simple)
    if kind == "optional":
        skip = c.local()
        c.body += [f"{skip} = x", f"if {shortcut} is not None:", f"    {skip} = {shortcut}(x)"]
        value = f"{value} + {skip}"
    else:
        value = f"{shortcut}(x) + {value}"
    if w.chance(50):
        value = f"F.relu({value})"
    c.body.append(f"return {value}" + w.mark(c, "converted", 1, why="projection shortcut"))
    return Part(w.end(c), f"{c.name}({width}, {to})", to)


def layer_scale(w: Writer, width: int) -> Part:
    """A gate per channel, which becomes the ReZero gate."""
    c = w.begin("LayerScale")
    value, view = branch(w, c, "x"), "width, 1, 1" if w.image else "width"
    if w.chance(50):
        w.once(_SCALE_MODULE)
        value = f"{c.module(f'ChannelScale(({view},))')}({value})"
    else:
        name = c.attribute()
        c.init.append(f"self.{name} = nn.Parameter(0.1 * torch.ones({view}))")
        value = f"self.{name} * {value}" if w.chance(50) else f"{value} * self.{name}"
    if w.chance(30):
        value = f"F.dropout({value}, 0.1, self.training)"
    c.body.append(f"return x + {value}" + w.mark(c, "converted", 1, why="LayerScale"))
    return _finish(w, c, width, opens=True)


_SCALE_MODULE = """
class ChannelScale(nn.Module):
    def __init__(self, shape, init=0.1):
        super().__init__()
        self.weight = nn.Parameter(torch.full(shape, init))

    def forward(self, x):
        return x * self.weight
"""


def scalar_gate(w: Writer, width: int) -> Part:
    """A ReZero block by hand: left alone."""
    c = w.begin("Gated")
    name, start = c.attribute(), w.random.choice(("torch.zeros(1)", "torch.ones(1)", "torch.full((1,), 0.3)"))
    value = branch(w, c, "x")
    c.init.append(f"self.{name} = nn.Parameter({start})")
    c.body.append(f"return x + self.{name} * {value}" + w.mark(c, "gated", 1, why="a scalar gate"))
    return _finish(w, c, width)


def helper(w: Writer, width: int) -> Part:
    """The add is in a function, a method or a module that is given skip and branch."""
    c = w.begin("Helped")
    kind = w.random.choice(("function", "dropout", "method", "module", "static"))
    value = branch(w, c, "x")
    if kind == "function":
        w.once("def joined(skip, value):\n    return skip + value")
        c.body.append(f"return joined(x, {value})" + w.mark(c, "converted", 1, why=kind))
    elif kind == "dropout":
        w.once(
            "def dropout_add(value, skip, prob, training):\n    out = F.dropout(value, p=prob, training=training)\n"
            "    out = skip + out\n    return out"
        )
        c.body.append(f"return dropout_add({value}, x, 0.1, self.training)" + w.mark(c, "converted", 1, why=kind))
    elif kind == "method":
        name = c.attribute()
        mark = w.mark(c, "converted", 1, why=kind)
        c.methods.append([f"def {name}(self, a, b):", f"    return a + b{mark}", ""])
        c.body.append(f"return self.{name}(x, {value})")
    elif kind == "static":
        name = c.attribute()
        mark = w.mark(c, "converted", 1, why=kind)
        c.methods.append(["@staticmethod", f"def {name}(a, b):", "    return a + b", ""])
        c.body.append(f"return self.{name}(x, {value}){mark}")
    else:
        inner = w.begin("Output", signature="value, skip")
        dense = inner.module(w.linear())
        mark = w.mark(inner, "converted", 1, why="skip and branch meet in another module")
        inner.body.append(f"return {dense}(torch.relu(value)) + skip{mark}")
        c.body.append(f"return {c.module(f'{w.end(inner)}(width)')}({value}, x)")
    return _finish(w, c, width, opens=True)


def wrapper(w: Writer, width: int) -> Part:
    """`Residual(fn)`."""
    w.count += 1
    name = f"Residual{w.count}"
    c = Class(name, w.random, arguments="fn")
    fn = c.module("fn")
    pre = w.chance(50)
    c.used.add("fn")
    mark = w.mark(c, "converted", 1, why="a wrapper", text="any")
    if pre:
        c.signature = "x, **options"
        w.traceable = False
        c.body.append(f"return x + {fn}(x, **options){mark}")
    else:
        c.body.append(f"return {fn}(x) + x{mark}")
    w.end(c)
    inner = w.begin("Inner")
    inner.body.append(f"return {chain(w, inner, 'x')}")
    return Part(name, f"{name}({w.end(inner)}({width}))", width, opens=True)


def argued(w: Writer, width: int) -> Part:
    """Control flow on arguments; the call leaves them at their defaults or sets them."""
    c = w.begin("Argued", signature="x, scale=None, other=False")
    h = c.local()
    c.body += [f"{h} = {branch(w, c, 'x')}", "if scale is not None:", f"    {h} = {h} * scale"]
    if w.chance(50):
        second = c.module(w.linear())
        c.body += ["if other:", f"    {h} = {h} + torch.relu({second}({h}))" + w.mark(
            c, "not-executed", text="interior", why="an interior add in an arm that does not run")]  # fmt: skip
    c.body.append(f"return x + {h}" + w.mark(c, "converted", 1, why="control flow on arguments"))
    call = w.random.choice(("{m}({x})", "{m}({x}, 0.5)", "{m}({x}, scale=2.0)"))
    return _finish(w, c, width, opens=True, call=call)


def arms(w: Writer, width: int) -> Part:
    """Both arms of a condition add."""
    c = w.begin("Arms")
    flag, on = c.attribute(), w.chance(50)
    c.init.append(f"self.{flag} = {on}")
    make, goes = w.norm()
    norm = c.module(make)
    value = c.module(f"nn.Sequential({w.linear()}, nn.GELU(), {w.linear()})")
    c.body += [
        f"if self.{flag}:",
        f"    x = x + {value}({norm}(x))"
        + w.mark(c, "converted" if on else "not-executed", int(on), text="converted", why="the pre-norm arm"),
        "else:",
        f"    x = {norm}(x + {value}(x))"
        + w.mark(c, "not-executed" if on else "converted", int(not on), text="converted", why="the post-norm arm"),
        "return x",
    ]
    if not goes:
        w.kept.append((c.name, norm.removeprefix("self.")))
    return _finish(w, c, width, opens=True)


def tuple_out(w: Writer, width: int) -> Part:
    c = w.begin("Tuple")
    value = branch(w, c, "x")
    c.body += [f"x = x + {value}" + w.mark(c, "converted", 1, why="in a tuple"), "return x, None"]
    return _finish(w, c, width, opens=True, call="{m}({x})[0]")


def bookkept(w: Writer, width: int) -> Part:
    """The skip goes through tuples, lists, dictionaries or another name."""
    c = w.begin("Kept")
    a, b = c.local(), c.local()
    kind = w.random.choice(("swap", "dict", "list", "walrus", "early", "conditional"))
    if kind == "swap":
        c.body.append(f"{a}, {b} = x, x")
        c.body.append(f"{b} = {branch(w, c, b)}")
        c.body.append(f"return {a} + {b}" + w.mark(c, "converted", 1, why=kind))
    elif kind == "dict":
        c.body.append(f"{a} = {{'x': x}}")
        c.body.append(f"{a}['f'] = {branch(w, c, 'x')}")
        c.body.append(f"return {a}['x'] + {a}['f']" + w.mark(c, "converted", 1, why=kind))
    elif kind == "list":
        c.body.append(f"{a} = [x]")
        c.body.append(f"{a}.append({branch(w, c, f'{a}[-1]')})")
        c.body.append(f"return {a}[0] + {a}[1]" + w.mark(c, "converted", 1, why=kind))
    elif kind == "walrus":
        c.body.append(f"return ({a} := x) + {chain(w, c, a)}" + w.mark(c, "converted", 1, why=kind))
    elif kind == "early":
        value = branch(w, c, "x")
        c.body += [f"{a} = x + {value}" + w.mark(c, "converted", 1, why=kind), "if self.training:", f"    return {a}"]
        c.body.append(f"return {a}")
    else:
        flag = c.attribute()
        c.init.append(f"self.{flag} = True")
        value = chain(w, c, "x")
        c.body.append(f"return x + {value} if self.{flag} else x" + w.mark(c, "converted", 1, why=kind))
    return _finish(w, c, width, opens=True)


def fused(w: Writer, width: int) -> Part:
    c = w.begin("Fused")
    value, other = sequential(w, c, "x"), c.module(w.linear())
    form = w.random.choice(
        ("torch.addcmul(x, {f}, torch.sigmoid({g}(x)))", "x + torch.sigmoid({g}(x)) * ({f} - x)",
         "torch.lerp(x, {f}, 0.5)")
    )  # fmt: skip
    c.body.append(f"return {form.format(f=value, g=other)}" + w.mark(c, "converted", 1, why=form))
    return _finish(w, c, width, opens=True)


def loop(w: Writer, width: int) -> Part:
    """Adds in loops over lists of modules."""
    c = w.begin("Loop")
    depth = w.random.choice((1, 2, 3))
    inner = w.begin("Step")
    kind = w.random.choice(("for", "enumerate", "range", "zip", "reversed", "slice", "norms", "tied", "append", "dict"))
    inner.body.append(f"return {(chain if kind == 'slice' else branch)(w, inner, 'x')}")
    layers = c.module(f"nn.ModuleList([{w.end(inner)}(width) for _ in range({depth})])")
    gates = depth
    mark = lambda n: w.mark(c, "converted", n, why=f"a loop: {kind}")  # noqa: E731
    v, i = c.local(), c.local()
    if kind == "enumerate":
        c.body += [f"for {i}, {v} in enumerate({layers}):", f"    x = x + {v}(x) * ({i} + 1){mark(gates)}"]
    elif kind == "range":
        c.body += [f"for {i} in range(len({layers})):", f"    x = x + {layers}[{i}](x){mark(gates)}"]
    elif kind in ("zip", "norms"):
        other = c.module(f"nn.ModuleList([nn.{'GroupNorm(2, ' if w.image else 'LayerNorm('}width) "
                         f"for _ in range({depth})])")  # fmt: skip
        c.body += [f"for {i}, {v} in zip({other}, {layers}):", f"    x = x + {v}({i}(x)){mark(gates)}"]
    elif kind == "reversed":
        c.body += [f"for {v} in reversed({layers}):", f"    x = {v}(x) + x{mark(gates)}"]
    elif kind == "slice":
        c.init[-1] = c.init[-1].replace(f"range({depth})", f"range({depth + 1})")
        c.body += [f"x = {layers}[0](x)", f"for {v} in {layers}[1:]:", f"    x = x + {v}(x){mark(gates)}"]
    elif kind == "tied":
        w.traceable = False  # in a graph, each pass is an add of its own
        c.body += [f"for {i} in range(2):", f"    x = x + {layers}[0](x){mark(1)}"]
    elif kind == "append":
        name = layers.removeprefix("self.")
        c.init[-1] = f"self.{name} = nn.ModuleList()"
        c.init += [f"for _ in range({depth}):", f"    self.{name}.append({inner.name}(width))"]
        c.body += [f"for {v} in {layers}:", f"    x = x + {v}(x){mark(gates)}"]
    elif kind == "dict":
        name = layers.removeprefix("self.")
        c.init[-1] = f"self.{name} = nn.ModuleDict({{str(i): {inner.name}(width) for i in range({depth})}})"
        c.body += [f"for {v} in {layers}.values():", f"    x = x + {v}(x){mark(gates)}"]
    else:
        c.body += [f"for {v} in {layers}:", f"    {i} = x", f"    x = {v}(x)", f"    x = {i} + x{mark(gates)}"]
    c.body.append("return x")
    return _finish(w, c, width, opens=kind != "slice")


def inherited(w: Writer, width: int) -> Part:
    """The add is in the base class, the branch in its child."""
    base = w.begin("Base", arguments="")
    child = w.begin("Child", base=base.name)
    hook = base.attribute()
    base.init.append(f"self.{hook} = None")
    base.body.append(f"return x + self.{hook}(x)" + w.mark(child, "converted", 1, why="inherited", text="any"))
    w.end(base)
    inner = w.begin("Inner")
    inner.body.append(f"return {chain(w, inner, 'x')}")
    child.init.append(f"self.{hook} = {w.end(inner)}(width)")
    return _finish(w, child, width, opens=True)


def dropped_branch(w: Writer, width: int) -> Part:
    """Stochastic depth, as a module around the branch or around the whole."""
    w.once(_DROP_PATH)
    c = w.begin("Depth")
    drop = c.module("DropPath(0.2)")
    value = branch(w, c, "x")
    c.body.append(f"return x + {drop}({value})" + w.mark(c, "converted", 1, why="stochastic depth"))
    w.traceable = False
    return _finish(w, c, width, opens=True)


_DROP_PATH = """
class DropPath(nn.Module):
    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, x):
        if self.rate == 0.0 or not self.training:
            return x
        keep = 1 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask / keep
"""


def zero_initialised(w: Writer, width: int) -> Part:
    c = w.begin("Zeroed")
    first, last = c.module(w.linear()), c.module(w.linear())
    c.init += [f"nn.init.zeros_({last}.weight)", f"nn.init.zeros_({last}.bias)"]
    c.body.append(
        f"return x + {last}(F.relu({first}(x)))" + w.mark(c, "converted", 1, why="zero-initialised last layer")
    )
    return _finish(w, c, width, opens=True)


def sliced(w: Writer, width: int) -> Part:
    """A skip through a slice that is carried on: `x[:, :1] + f(x)` beside the rest."""
    if w.image:
        return plain(w, width)
    c = w.begin("Token")
    out, value = c.local(), dropped(w, c, "x")
    c.body += [
        f"{out} = x[:, :1] + ({value}).mean(1, keepdim=True)"
        + w.mark(c, "converted", 1, why="skip through a slice"),
        f"return {out}",
    ]  # fmt: skip
    return _finish(w, c, width, call="{m}({x}).expand(-1, 3, -1)")


BLOCKS: tuple[Form, ...] = (
    plain, normed, post_norm, activation_after, in_place, n_ary, layer_scale, scalar_gate, helper, wrapper, argued,
    arms, tuple_out, bookkept, fused, loop, inherited, dropped_branch, zero_initialised, projection, sliced,
)  # fmt: skip

"""Branches: a nonlinear function with weights, written into a class as statements and an expression.

Each keeps shape and width. None holds a residual add of its own, but some hold decoys.
"""

from __future__ import annotations

from collections.abc import Callable

from .writing import Class, Writer

Branch = Callable[[Writer, Class, str], str]


def chain(w: Writer, c: Class, h: str) -> str:
    first, last = c.module(w.linear()), c.module(w.linear())
    function = w.random.choice(("F.relu", "F.gelu", "torch.tanh", "F.silu", "torch.sigmoid"))
    return f"{last}({function}({first}({h})))"


def sequential(w: Writer, c: Class, h: str) -> str:
    activation = w.random.choice(("nn.GELU()", "nn.ReLU()", "nn.ReLU(inplace=True)", "nn.SiLU()"))
    return f"{c.module(f'nn.Sequential({w.linear()}, {activation}, {w.linear()})')}({h})"


def activated(w: Writer, c: Class, h: str) -> str:
    layer, activation = c.module(w.linear()), c.module(w.random.choice(("nn.ReLU(inplace=True)", "nn.Tanh()")))
    return f"{activation}({layer}({h}))"


def stepwise(w: Writer, c: Class, h: str) -> str:
    first, last, out = c.module(w.linear()), c.module(w.linear()), c.local()
    c.body += [f"{out} = {first}({h})", f"{out} = {out}.relu()", f"{out} = {last}({out})"]
    return out


def of_a_class(w: Writer, c: Class, h: str) -> str:
    inner = w.begin("Mlp")
    inner.body.append(f"return {chain(w, inner, 'x')}")
    return f"{c.module(f'{w.end(inner)}(width)')}({h})"


def of_a_method(w: Writer, c: Class, h: str) -> str:
    first, last, name = c.module(w.linear()), c.module(w.linear()), c.attribute()
    c.methods.append([f"def {name}(self, z):", f"    z = F.gelu({first}(z))", f"    return {last}(z)", ""])
    return f"self.{name}({h})"


def of_a_function(w: Writer, c: Class, h: str) -> str:
    w.once("def feed(first, last, x):\n    return last(F.gelu(first(x)))")
    first, last = c.module(w.linear()), c.module(w.linear())
    return f"feed({first}, {last}, {h})"


def first_of_a_tuple(w: Writer, c: Class, h: str) -> str:
    inner = w.begin("Pair")
    inner.body.append(f"return {chain(w, inner, 'x')}, x.shape[-1]")
    module, out = c.module(f"{w.end(inner)}(width)"), c.local()
    if w.chance(50):
        return f"{module}({h})[0]"
    c.body.append(f"{out}, _ = {module}({h})")
    return out


def dropped(w: Writer, c: Class, h: str) -> str:
    if w.chance(50):
        return f"{c.module('nn.Dropout(0.1)')}({chain(w, c, h)})"
    return f"F.dropout({chain(w, c, h)}, 0.1, self.training)"


def gated_linear(w: Writer, c: Class, h: str) -> str:
    wide, last, a, b = c.module(w.linear("width", "2 * width")), c.module(w.linear()), c.local(), c.local()
    dim = 1 if w.image else -1
    c.body.append(f"{a}, {b} = {wide}({h}).chunk(2, dim={dim})")
    return f"{last}({a} * F.silu({b}))"


def parameters(w: Writer, c: Class, h: str) -> str:
    weight = c.attribute()
    if w.image:
        c.init.append(f"self.{weight} = nn.Parameter(0.1 * torch.randn(width, width, 1, 1))")
        return f"torch.tanh(F.conv2d({h}, self.{weight}))"
    c.init.append(f"self.{weight} = nn.Parameter(0.1 * torch.randn(width, width))")
    return f"torch.tanh({h} @ self.{weight})" if w.chance(50) else f"torch.tanh(F.linear({h}, self.{weight}))"


def chosen(w: Writer, c: Class, h: str) -> str:
    flag, one, other = c.attribute(), chain(w, c, h), chain(w, c, h)
    c.init.append(f"self.{flag} = {w.chance(50)}")
    w.traceable = False  # a graph has the one arm, and names the gate after it
    return f"({one} if self.{flag} else {other})"


def polynomial(w: Writer, c: Class, h: str) -> str:
    """With the tanh form of GELU written out."""
    inner, z = w.begin("Gelu"), "x"
    inner.body.append(
        f"{z} = 0.5 * {z} * (1.0 + torch.tanh(0.8 * ({z} + 0.04 * torch.pow({z}, 3.0))))"
        + w.mark(inner, "refused", why="a polynomial activation")
    )
    inner.body.append(f"return {z}")
    first, last = c.module(w.linear()), c.module(w.linear())
    return f"{last}({c.module(f'{_without_width(w, inner)}()')}({first}({h})))"


def _without_width(w: Writer, inner: Class) -> str:
    inner.arguments = ""
    return w.end(inner)


def attention(w: Writer, c: Class, h: str) -> str:
    """Scores plus a mask, rotated queries: both are adds, neither is a block."""
    if w.image:
        return chain(w, c, h)
    inner = w.begin("Attention")
    qkv, out = inner.module("nn.Linear(width, 3 * width)"), inner.module("nn.Linear(width, width)")
    q, k, v, s = (inner.local() for _ in range(4))
    inner.body.append(f"{q}, {k}, {v} = {qkv}(x).chunk(3, dim=-1)")
    if w.chance(50):
        w.once("def turned(x):\n    a, b = x.chunk(2, dim=-1)\n    return torch.cat((-b, a), dim=-1)")
        table = inner.attribute()
        inner.init.append(f"self.register_buffer('{table}', torch.linspace(0, 1, 3 * width).view(3, width))")
        inner.body.append(
            f"{q} = {q} * self.{table}.cos() + turned({q}) * self.{table}.sin()"
            + w.mark(inner, "refused", why="a rotary embedding")
        )
    inner.body.append(f"{s} = {q} @ {k}.transpose(-2, -1) / width_of({q})")
    w.once("def width_of(x):\n    return math.sqrt(x.shape[-1])")
    kind = w.random.choice(("mask", "bias", "none"))
    name = inner.attribute()
    if kind == "mask":
        inner.init.append(f"self.register_buffer('{name}', torch.ones(3, 3).triu(1) * -1e4)")
        inner.body.append(f"{s} = {s} + self.{name}" + w.mark(inner, "refused", why="scores and a mask"))
    elif kind == "bias":
        inner.init.append(f"self.{name} = nn.Parameter(torch.zeros(3, 3))")
        inner.body.append(f"{s} += self.{name}" + w.mark(inner, "refused", why="scores and a bias"))
    inner.body.append(f"return {out}({s}.softmax(dim=-1) @ {v})")
    return f"{c.module(f'{w.end(inner)}(width)')}({h})"


def of_torch(w: Writer, c: Class, h: str) -> str:
    if w.image:
        return sequential(w, c, h)
    module = c.module("nn.MultiheadAttention(width, 2, batch_first=True)")
    if w.chance(50):
        return f"{module}({h}, {h}, {h}, need_weights=False)[0]"
    out = c.local()
    c.body.append(f"{out}, _ = {module}({h}, {h}, {h}, need_weights=False)")
    return out


def parallel_inside(w: Writer, c: Class, h: str) -> str:
    """A sum of two linear paths within the branch."""
    a, b, last, out = c.module(w.linear()), c.module(w.linear()), c.module(w.linear()), c.local()
    c.body.append(f"{out} = {a}({h}) + {b}({h})" + w.mark(c, "refused", why="parallel linear paths"))
    return f"{last}(torch.relu({out}))"


def interior(w: Writer, c: Class, h: str) -> str:
    """A residual add of another stream, within the branch."""
    first, second, last, out = *(c.module(w.linear()) for _ in range(3)), c.local()
    c.body.append(f"{out} = F.gelu({first}({h}))")
    c.body.append(f"{out} = {out} + torch.tanh({second}({out}))" + w.mark(c, "interior", why="inside a branch"))
    return f"{last}({out})"


def nested(w: Writer, c: Class, h: str) -> str:
    """A function within the method."""
    first, last, name = c.module(w.linear()), c.module(w.linear()), c.local()
    c.body += [f"def {name}(z):", f"    return {last}(F.relu({first}(z)))", ""]
    return f"{name}({h})"


BRANCHES: tuple[Branch, ...] = (
    chain, sequential, activated, stepwise, of_a_class, of_a_method, of_a_function, first_of_a_tuple, dropped,
    gated_linear, parameters, chosen, polynomial, attention, of_torch, parallel_inside, interior, nested,
)  # fmt: skip
ENDS_LINEAR: tuple[Branch, ...] = (chain, sequential, stepwise, of_a_class, of_a_method, of_a_function)
"""Those whose result can be changed in place: autograd does not keep it."""


def branch(w: Writer, c: Class, h: str, *, linear: bool = False) -> str:
    """Write one."""
    return w.random.choice(ENDS_LINEAR if linear else BRANCHES)(w, c, h)

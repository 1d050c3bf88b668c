"""Adds that are no residual blocks, one class for each kind; the shape stays."""

from __future__ import annotations

from .blocks import Form
from .branches import chain
from .writing import Part, Writer


def position(w: Writer, width: int) -> Part:
    c = w.begin("Position")
    name, size = c.attribute(), "1, width, 5, 5" if w.image else "1, 3, width"
    made = w.random.choice(("nn.Parameter(torch.randn({}))", "nn.Parameter(torch.zeros({}), requires_grad=False)"))
    c.init.append(f"self.{name} = {made.format(size)}")
    c.body.append(f"return x + self.{name}" + w.mark(c, "refused", 0, "RZ907", why="a position embedding"))
    return _part(w, c, width)


def tables(w: Writer, width: int) -> Part:
    """Token and position embeddings."""
    if w.image:
        return position(w, width)
    c = w.begin("Tables")
    one, other, linear = c.module("nn.Embedding(7, width)"), c.module("nn.Embedding(3, width)"), c.module(w.linear())
    ids, places, out = c.local(), c.local(), c.local()
    c.body += [
        f"{ids} = (x[..., 0] > 0).long()",
        f"{places} = torch.arange(3, device=x.device)",
        f"{out} = {one}({ids}) + {other}({places})" + w.mark(c, "refused", why="a sum of embeddings"),
        f"return {linear}({out}) * torch.tanh(x)",
    ]
    return _part(w, c, width)


def polynomial(w: Writer, width: int) -> Part:
    c = w.begin("Snake", arguments="")
    form = w.random.choice(("x + 0.04 * x ** 3", "x + torch.sin(x) ** 2", "x + torch.relu(x)", "x - x.mean(1, True)"))
    c.body.append(f"return {form}" + w.mark(c, "refused", 0, "RZ902", why="a polynomial activation"))
    return Part(w.end(c), f"{c.name}()", width)


def doubled(w: Writer, width: int) -> Part:
    c = w.begin("Twice", arguments="")
    c.body.append("return 0.5 * (x + x)" + w.mark(c, "refused", 0, "RZ910", why="x + x"))
    return Part(w.end(c), f"{c.name}()", width)


def constant(w: Writer, width: int) -> Part:
    c = w.begin("Shift")
    name, view = c.attribute(), "width, 1, 1" if w.image else "width"
    c.init.append(f"self.register_buffer('{name}', torch.full(({view},), 0.1))")
    c.body.append(f"x = x + self.{name}" + w.mark(c, "refused", 0, "RZ907", why="a constant"))
    c.body.append("return x + 1.5")
    return _part(w, c, width)


def noise(w: Writer, width: int) -> Part:
    c = w.begin("Noise", arguments="")
    form = w.random.choice(("0.1 * torch.randn_like(x)", "torch.zeros_like(x)", "0.1 * torch.rand(x.shape)"))
    c.body.append(f"return x + {form}" + w.mark(c, "refused", 0, why="noise"))
    return Part(w.end(c), f"{c.name}()", width)


def straight_through(w: Writer, width: int) -> Part:
    c = w.begin("Quantized")
    q = c.local()
    c.body += [f"{q} = {chain(w, c, 'x')}", f"{q} = torch.round({q} * 4) / 4"]
    c.body.append(f"return x + ({q} - x).detach()" + w.mark(c, "refused", 0, "RZ914", why="straight-through"))
    return _part(w, c, width)


def parallel(w: Writer, width: int) -> Part:
    c = w.begin("Paths")
    a, b = c.module(w.linear()), c.module(w.linear())
    form = w.random.choice(
        ("{a}(x) + {b}(x)", "torch.relu({a}(x)) + {b}(x)", "torch.relu({a}(x)) + torch.tanh({b}(x))")
    )
    c.body.append(f"return {form.format(a=a, b=b)}" + w.mark(c, "refused", why="parallel paths"))
    return _part(w, c, width)


def merged_convolutions(w: Writer, width: int) -> Part:
    """RepVGG."""
    if not w.image:
        return parallel(w, width)
    c = w.begin("Rep")
    a, b, n = c.module("nn.Conv2d(width, width, 3, padding=1)"), c.module("nn.Conv2d(width, width, 1)"), c.module(
        "nn.BatchNorm2d(width)")  # fmt: skip
    c.body.append(f"return {a}(x) + {b}(x) + {n}(x)" + w.mark(c, "refused", 0, why="RepVGG"))
    return _part(w, c, width)


def highway(w: Writer, width: int) -> Part:
    c = w.begin("Highway")
    h, g = c.local(), c.local()
    c.body += [f"{h} = {chain(w, c, 'x')}", f"{g} = torch.sigmoid({c.module(w.linear())}(x))"]
    c.body.append(f"return {g} * {h} + (1 - {g}) * x" + w.mark(c, "refused", 0, "RZ901", why="highway"))
    return _part(w, c, width)


def experts(w: Writer, width: int) -> Part:
    if w.image:
        return parallel(w, width)
    c = w.begin("Experts")
    router, shared, p, out = c.module("nn.Linear(width, 2)"), c.module(w.linear()), c.local(), c.local()
    one, other = chain(w, c, "x"), chain(w, c, "x")
    c.body += [
        f"{p} = torch.softmax({router}(x), -1)",
        f"{out} = {p}[..., :1] * {one} + {p}[..., 1:] * {other}" + w.mark(c, "refused", why="a mixture of experts"),
        f"return {out} * {shared}(x)",
    ]
    return _part(w, c, width)


def rotary(w: Writer, width: int) -> Part:
    w.once("def halves(x):\n    a, b = x.chunk(2, dim=1)\n    return torch.cat((-b, a), dim=1)")
    if not w.image:
        return polynomial(w, width)
    c = w.begin("Turn", arguments="")
    name = c.attribute()
    c.init.append(f"self.register_buffer('{name}', torch.linspace(0, 1, 25).view(5, 5))")
    c.body.append(f"return x * self.{name}.cos() + halves(x) * self.{name}.sin()" + w.mark(c, "refused", why="rotary"))
    return Part(w.end(c), f"{c.name}()", width)


def squeezed(w: Writer, width: int) -> Part:
    """Squeeze-and-excitation: scales, does not add."""
    c = w.begin("Squeeze")
    dims = "(2, 3)" if w.image else "1"
    c.body.append(f"return x * torch.sigmoid({c.module(w.linear())}(x.mean({dims}, keepdim=True)))")
    return _part(w, c, width)


def merged_scales(w: Writer, width: int) -> Part:
    """A U-Net's merge."""
    if not w.image:
        return parallel(w, width)
    c = w.begin("Merge")
    down, side, out = c.module("nn.Conv2d(width, width, 3, 2, 1)"), c.module("nn.Conv2d(width, width, 1)"), c.local()
    c.body.append(f"{out} = F.interpolate(F.relu({down}(x)), size=x.shape[-2:])")
    if w.chance(50):
        mark = w.mark(c, "converted", 1, why="a block that works at a lower resolution inside")
        c.body.append(f"return {out} + x{mark}")
    else:
        mark = w.mark(c, "refused", 0, "RZ905", "RZ901", "RZ903", why="an upsampling merge")
        c.body.append(f"return {out} + {side}(x){mark}")
    return _part(w, c, width)


def broadcast(w: Writer, width: int) -> Part:
    """The pooled stream comes back to each place."""
    c = w.begin("Pooled")
    linear, g = c.module(w.linear()), c.local()
    dims = "(2, 3)" if w.image else "1"
    c.body += [f"{g} = x.mean({dims}, keepdim=True)"]
    c.body.append(f"return {g} + torch.tanh({linear}(x))" + w.mark(c, "refused", 0, why="a pooled value is broadcast"))
    return _part(w, c, width)


def split(w: Writer, width: int) -> Part:
    """Res2Net: each half is added to the next."""
    c = w.begin("Halves")
    layer = "nn.Conv2d(width // 2, width // 2, 1)" if w.image else "nn.Linear(width // 2, width // 2)"
    one, other, a, b = c.module(layer), c.module(layer), c.local(), c.local()
    c.body += [f"{a}, {b} = x.chunk(2, dim={1 if w.image else -1})", f"{a} = torch.relu({one}({a}))"]
    c.body.append(f"{b} = torch.relu({other}({a} + {b}))" + w.mark(c, "refused", 0, why="a sum of halves"))
    c.body.append(f"return torch.cat(({a}, {b}), dim={1 if w.image else -1})")
    return _part(w, c, width)


def reversible(w: Writer, width: int) -> Part:
    c = w.begin("Reversible")
    layer = "nn.Conv2d(width // 2, width // 2, 1)" if w.image else "nn.Linear(width // 2, width // 2)"
    one, other, a, b = c.module(layer), c.module(layer), c.local(), c.local()
    dim = 1 if w.image else -1
    c.body += [f"{a}, {b} = x.chunk(2, dim={dim})"]
    c.body.append(f"{a} = {a} + torch.tanh({one}({b}))" + w.mark(c, "refused", 0, why="half of a reversible pair"))
    c.body.append(f"{b} = {b} + torch.tanh({other}({a}))" + w.mark(c, "refused", 0, why="half of a reversible pair"))
    c.body.append(f"return torch.cat(({a}, {b}), dim={dim})")
    return _part(w, c, width)


def itself(w: Writer, width: int) -> Part:
    """A list summed up, a loop that is no loop over modules: an accumulation from zero of scaled inputs."""
    c = w.begin("Sums")
    out, linear = c.local(), c.module(w.linear())
    c.body += [f"{out} = {linear}(x)", f"{out} = {out} + x.mean()" + w.mark(c, "refused", 0, why="the mean of all")]
    c.body.append(f"return torch.tanh({out})")
    return _part(w, c, width)


def _part(w: Writer, c: object, width: int) -> Part:
    name = w.end(c)  # type: ignore[arg-type]  # a Class
    return Part(name, f"{name}({width})", width)


DECOYS: tuple[Form, ...] = (
    position, tables, polynomial, doubled, constant, noise, straight_through, parallel, merged_convolutions, highway,
    experts, rotary, squeezed, merged_scales, broadcast, split, reversible, itself,
)  # fmt: skip

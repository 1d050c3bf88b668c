"""ReZero and its relatives as data: what a block `S(x) + F(x)` becomes, `s * S(x) + c * g(alpha) * F(x)`.

The placements have no gate: they move the norm that a block has.

One record a method. `options` takes its defaults from here, detection asks what the form needs of a block, `applied`
enters start values and factors into the sites; the rewriters know the form only (`plan.Scale`). Sources are named at
each; k counts the gated sums from 1 in the order in which they run, L is the number of gated branches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from .plan import NORM_KINDS, Gate, NormKind, Options, Position, Scale, Site

Granularity = Literal["scalar", "channel"]


@dataclass(frozen=True, slots=True)
class Method:
    """One way to start a residual branch."""

    form: str
    """As a reader writes it; N are the block's norms, a is the gate."""
    source: str
    init: float | Callable[[int], float] = 0.0
    """Start value of the gate; by L where it depends on the depth."""
    trainable: bool = True
    granularity: Granularity = "scalar"
    map: Literal["", "relu", "carry"] = ""
    """g: what is made of the gate before it scales the branch. carry: see `plan.Scale`; `init` is the layer's bias."""
    factor: Callable[[int, int], float] | None = None
    """c by (k, L); None is 1."""
    skip: Literal["one", "complement"] | Callable[[int, int], float] = "one"
    """s: 1, 1 - a, or by (k, L)."""
    biases: bool = False
    """Scalar biases before the layers of the branch, whose weights are scaled down, the last one's to 0 (FixUp)."""
    norm_gate: bool = False
    """No new gate: the weight of the branch's last norm is the gate."""
    drop_norm: tuple[NormKind, ...] = ()
    activation: Literal["branch", "keep"] = "keep"
    placement: Position | None = None
    """No gate: the one norm of a block is moved there."""

    @property
    def plain(self) -> bool:
        """Whether the form is `S(x) + a * F(x)` with a trainable a: a gate that is there can serve."""
        return not (self.map or self.factor or self.norm_gate or self.biases) and self.trainable and self.skip == "one"

    @property
    def preserves(self) -> bool:
        """Whether a block computes what it did before at a gate of 1."""
        other = self.norm_gate or self.biases or self.placement or self.map == "carry"
        return self.factor is None and self.skip == "one" and not other

    @property
    def by_site(self) -> bool:
        """Whether factors depend on the place of a block in the network."""
        return callable(self.skip) or self.factor is not None or self.biases


def by_depth(options: Options) -> bool:
    """Whether something depends on how many blocks a network has, which the text of a class does not tell."""
    method = METHODS[options.method]
    return method.by_site or (callable(method.init) and options.alpha_init is None)


def applied(sites: Iterable[Site], options: Options) -> list[Site]:
    """The sites with what the method says of their gates: start values, factors, whether they are trained.

    Args:
        sites: in the order in which they run; twins on paths that did not run get what the ones that ran have.
        options: with the method; an `alpha_init` of its own wins over the method's.
    """
    sites = list(sites)
    method = METHODS[options.method]
    own = [site for site in sites if site.verdict == "converted"]
    total = sum(len(gate.parameters()) or 1 for site in own for gate in site.gates)
    order = {id(site): k for k, site in enumerate(own, 1)}
    first: dict[tuple[str, str], int] = {}
    for site in own:
        for gate in site.gates:
            first.setdefault((site.path, gate.alpha), order[id(site)])
    made = []
    for site in sites:
        if site.edited and site.gates:
            k = order.get(id(site)) or first.get((site.path, site.gates[0].alpha), len(own))
            site = (
                _refused_in_loop(site, method)
                if (method.by_site or method.map == "carry") and _is_walked(site)
                else _formed(site, method, options, k, total)
            )
        made.append(site)
    return made


def _formed(site: Site, method: Method, options: Options, k: int, total: int) -> Site:
    gates = tuple(_gate(gate, method, options, k, total) for gate in site.gates)
    skip = site.skip_gate
    if skip is not None and method.skip == "complement":
        skip = replace(
            skip, alpha=gates[0].alpha, loops=gates[0].loops, scale=replace(gates[0].scale, map="complement")
        )
    elif skip is not None and callable(method.skip):
        skip = replace(skip, scale=Scale(factor=method.skip(k, total)))
    if not method.biases:
        return replace(site, gates=gates, skip_gate=skip)
    stem = gates[0].alpha.replace("alpha", "bias", 1).replace(".", "_")
    shifts = tuple(replace(shift, alpha=f"{stem}_{number}") for number, shift in enumerate(site.shifts, 1))
    scaled = [repair for repair in site.repairs if repair.how == "scaled"]
    layers = len({repair.parameter for repair in scaled}) + 1
    down = total ** (-1 / (2 * layers - 2)) if layers > 1 else 1.0
    repairs = tuple(replace(one, factor=down) if one.how == "scaled" else one for one in site.repairs)
    norms = tuple(replace(norm, bias="") for norm in site.norms)
    return replace(site, gates=gates, shifts=shifts, repairs=repairs, norms=norms)


def _gate(gate: Gate, method: Method, options: Options, k: int, total: int) -> Gate:
    init = method.init(total) if callable(method.init) else method.init
    init = init if options.alpha_init is None or options.preserve else float(options.alpha_init)
    factor = 1.0 if method.factor is None else method.factor(k, total)
    scale = replace(gate.scale, map=method.map, factor=factor)
    start = gate.init if options.preserve or gate.init is None else init
    return replace(gate, init=start, trainable=gate.existing or method.trainable, scale=scale)


def _is_walked(site: Site) -> bool:
    return any(gate.loops for gate in site.gates)


def _refused_in_loop(site: Site, method: Method) -> Site:
    reason = "the factors of the method differ from pass to pass of the loop that adds"
    if method.map == "carry":
        reason = "each pass of the loop that adds would need a layer of its own for its gate"
    bare = replace(
        site, gates=(), norms=(), activation=None, repairs=(), skip="", skip_kind="", skip_gate=None, form=""
    )
    return replace(bare, verdict="refused", code="RZ919", reason=reason)


def _layer_scale(branches: int) -> float:
    """CaiT's start values, which count layers of two branches: 0.1 up to 18, 1e-5 up to 24, 1e-6 beyond."""
    return 0.1 if branches <= 36 else 1e-5 if branches <= 48 else 1e-6


METHODS: dict[str, Method] = {
    "rezero": Method("x + a*F(x)", "Bachlechner et al., UAI 2021, eq. 1", drop_norm=("layer",), activation="branch"),
    "rezero-one": Method(
        "x + a*F(x), a = 1", "the same, Table 3 (alpha = 1)", init=1.0, drop_norm=("layer",), activation="branch"
    ),
    "frozen": Method(
        "x + a*F(x), a = 1/L, constant",
        "the ablation its reviewers asked for",
        init=lambda branches: 1 / branches,
        trainable=False,
        drop_norm=("layer",),
        activation="branch",
    ),
    "skipinit": Method("x + a*F(x)", "De & Smith 2020; norms go, an activation of the sum stays", drop_norm=NORM_KINDS),
    "fixup": Method(
        "x + a*F(x), a = 1, biases of one number before the layers of F, the last of which is 0",
        "Zhang et al. 2019 (FixUp); the other m - 1 layers are scaled by L^(-1/(2m-2)), the classifier is 0",
        init=1.0,
        biases=True,
        drop_norm=NORM_KINDS,
    ),
    "zero-gamma": Method(
        "x + N(F(x)), the weight of N = 0",
        "Goyal et al. 2017; torchvision's zero_init_residual, timm's zero_init_last",
        granularity="channel",
        norm_gate=True,
    ),
    "layerscale": Method(
        "x + a*F(N(x)), a per channel", "Touvron et al. 2021 (CaiT)", init=_layer_scale, granularity="channel"
    ),
    "gated": Method("x + relu(a)*F(x), a = 1", "Savarese & Figueiredo 2017", init=1.0, map="relu"),
    "gated-authors": Method(
        "(1 - a)*x + a*F(x)", "the ReZero authors' code, highway.py", skip="complement", activation="branch"
    ),
    "beta": Method("x + b*F(x), b = 0.1, constant", "Balduzzi et al. 2017", init=0.1, trainable=False),
    "rescalenet": Method(
        "sqrt((k+L-1)/(k+L))*x + sqrt(1/(k+L))*a*F(x), a = 1",
        "Shao et al. 2020 (RescaleNet) with c = L, without its data-dependent biases",
        init=1.0,
        factor=lambda k, branches: math.sqrt(1 / (k + branches)),
        skip=lambda k, branches: math.sqrt((k + branches - 1) / (k + branches)),
        drop_norm=NORM_KINDS,
    ),
    "highway": Method(
        "x + T(x)*(F(x) - x), T(x) = sigmoid(W x + b), b = -3",
        "Srivastava et al. 2015, eq. 3",
        init=-3.0,
        granularity="channel",
        map="carry",
        activation="branch",
    ),
    "pre-norm": Method("x + F(N(x))", "Xiong et al. 2020; one norm, the one that is there", placement="pre"),
    "post-norm": Method("N(x + F(x))", "Vaswani et al. 2017", placement="post"),
    "gpt2-norm": Method(
        "x + N(F(x))", "a row of Bachlechner et al., Table 3; its formula was not at hand", placement="end"
    ),
}
"""By name, as `method=` takes it."""

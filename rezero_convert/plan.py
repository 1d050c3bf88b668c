"""The vocabulary every stage shares: what was found, what was decided, where.

Records only, all frozen, no torch and no libcst. Detection makes a `Plan`; the rewriters carry it out and
decide nothing; reports print it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

NormKind = Literal["layer", "batch", "group", "instance"]
NORM_KINDS: tuple[NormKind, ...] = ("layer", "batch", "group", "instance")

Verdict = Literal["converted", "gated", "refused", "long-skip", "interior", "not-executed", "hidden", "folded"]
"""converted: rewritten. gated: already a ReZero block, left alone. refused: not a residual block, or one that cannot
be rewritten; `Site.reason` says which. long-skip: spans blocks of its own stream. interior: inside another block's
branch. not-executed: on a path that the run did not take. hidden: seen in the dispatcher only.
folded: its gates are in the branch's weights (`fold`)."""


@dataclass(frozen=True, order=True, slots=True)
class Span:
    """A range of source text. Lines count from 1, columns are UTF-8 byte offsets from 0, as in `ast`."""

    file: str
    line: int
    col: int
    end_line: int
    end_col: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.col + 1}" if self.col >= 0 else f"{self.file}:{self.line}"

    def contains(self, other: Span) -> bool:
        """Whether `other` lies within this range (equal ranges do)."""
        return (
            self.file == other.file
            and (self.line, self.col) <= (other.line, other.col)
            and (other.end_line, other.end_col) <= (self.end_line, self.end_col)
        )


@dataclass(frozen=True, order=True, slots=True)
class Place:
    """The outermost function (a method, or a function of a module) whose text holds a span."""

    module: str
    """Python module name."""
    qualname: str
    """Qualified name of the method: `Block.forward`; nested functions belong to their method."""
    file: str
    line: int
    """First line, decorators included (`co_firstlineno`)."""

    @property
    def name(self) -> str:
        return self.qualname.rpartition(".")[2]

    @property
    def cls(self) -> str:
        """Qualified name of the class that defines the method, "" for a plain function."""
        return self.qualname.rpartition(".")[0]


@dataclass(frozen=True, order=True, slots=True)
class Operand:
    """One operand of the expression at `span` in the text of `place`.

    `index` is 0 or 1 for the left or right side of a binary operation or augmented assignment; for a call, the
    position among the positional arguments or a keyword's name. Where the call is a tensor's method (`x.add_(y)`,
    `receiver`), 0 is what stands before the dot and the arguments count from 1. `WHOLE` is the expression itself.
    """

    place: Place
    span: Span
    index: int | str
    receiver: bool = False

    def same_text(self, other: Operand) -> bool:
        """Whether both are one operand of one expression; text by itself does not know its module's name."""
        return (self.span, self.index) == (other.span, other.index)


WHOLE = ""


@dataclass(frozen=True, slots=True)
class Loop:
    """A `for` over modules, as a statement or in a comprehension: the alphas are a list walked beside it."""

    span: Span
    """The first of its variables, which tells the `for` clauses of one line apart."""
    modules: str
    """What is walked, as written: "self.layers[1:]"; in a nested loop perhaps the outer one's variable, "stage"."""
    variable: str
    """What nested loops call an element, as written: "stage"."""
    index: str = ""
    """What counts the passes from 0, a variable or an expression of one, "i - 1": the gate is `self.alphas[index]`. "":
    the gate is a loop variable of the alphas' name, walked with `zip`."""
    backwards: bool = False
    """The modules are walked from the last to the first, and so are the alphas."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How an alpha scales an operand: `factor * map(alpha)`."""

    map: Literal["", "relu", "complement", "shift", "carry"] = ""
    """complement: 1 - alpha. shift: no factor, added to the operand. carry: alpha is a layer, of which
    sigmoid(alpha(x)) scales the operand less the skip x."""
    factor: float = 1.0
    trailing: int = 0
    """How many dimensions of the operand follow that of the channels, for an alpha of shape (C,)."""


@dataclass(frozen=True, slots=True)
class SkipGate:
    """What scales the skip of a block, where a method says so."""

    at: Operand
    alpha: str = ""
    """The gate of the branch; "" for a constant, `scale.factor`."""
    scale: Scale = Scale()
    loops: tuple[Loop, ...] = ()


@dataclass(frozen=True, slots=True)
class Gate:
    """The gate of one residual branch."""

    at: Operand | None
    """The operand of the sum that is scaled; None when `existing`."""
    alpha: str
    """Attribute of the owner: `alpha_attn`; for an existing gate its path from the owner: `ls1.gamma`."""
    child: str
    """The owner's child that holds the branch's last weight ("" if none): the alpha is made below it."""
    branch: str
    """The branch as written in the source."""
    existing: bool = False
    """The gate was in the model; only its value changes."""
    of_norm: bool = False
    """An existing gate that is the weight of a norm."""
    conditional: bool = False
    """An existing gate that the class makes only under a condition (source route: the alpha is added all the same)."""
    init: float | None = 0.0
    """Start value; None leaves the present one (trained or preserved)."""
    shape: tuple[int, ...] = (1,)
    loops: tuple[Loop, ...] = ()
    """The add is in loops, outermost first: `alpha` names a `ParameterList`, one parameter a pass; in nested loops a
    `ModuleList` of such lists."""
    scale: Scale = Scale()
    trainable: bool = True
    carries: Operand | None = None
    """The skip, where the gate is computed from it and takes its part from the branch (highway)."""
    size: str = ""
    """What of the owner tells the number of channels, as written below `self`: "conv2.out_channels"."""
    members: tuple[str, ...] = ()
    """The paths of the parameters below `alpha` where there are loops: "0", "1" or "0.0", "0.1"; empty where the passes
    are not known (static route)."""

    def parameters(self) -> tuple[str, ...]:
        """The gate's parameters by their paths from the owner; a gate that is computed has none of its own."""
        if self.carries is not None:
            return ()
        return tuple(f"{self.alpha}.{member}" for member in self.members) if self.loops else (self.alpha,)


RepairKind = Literal["ones", "zeros", "scaled", "reset", "unwrap"]
NormAction = Literal["bypass", "slot", "unfuse", "keep"]
"""bypass: the call `norm(x)` in the text becomes `x`, and the module goes. slot: the module is replaced by an identity
where it is held (Sequential, ModuleList, loops). unfuse: a fused norm + activation module is replaced by its activation
and dropout. keep: stays; `Norm.reason` says why."""


@dataclass(frozen=True, slots=True)
class Norm:
    """A normalization that belongs to a block."""

    path: str
    """Module path from the root; "" for a functional or written-out norm."""
    type: str
    kind: NormKind
    position: Literal["pre", "inside", "end", "post"]
    action: NormAction
    reason: str
    at: Operand | None = None
    """The call, and which argument is the normalized tensor."""
    attribute: str = ""
    """The attribute path on the class at the call, `norm1` or `mlp.norm`; "" if it is not called as `self.<...>`."""
    bias: str = ""
    """Path of the convolution or linear layer that gets the zero bias the norm had provided; in a graph that does not
    tell the layers, of its weight."""


@dataclass(frozen=True, slots=True)
class Activation:
    """An activation of the sum: `act(x + F(x))`."""

    type: str
    at: Operand
    """The call, and which argument is the sum."""
    action: Literal["move", "keep"]
    reason: str


Position = Literal["pre", "end", "post"]
"""Where a norm stands: before the branch, `x + F(N(x))`, behind it, `x + N(F(x))`, behind the sum, `N(x + F(x))`."""


@dataclass(frozen=True, slots=True)
class Move:
    """A norm that changes its place: its call comes off what it normalizes, and goes around something else."""

    position: Position
    at: Operand
    """The call, and which argument is the normalized tensor."""
    to: tuple[Operand, ...]
    """Several are the one variable that a branch reads in several places: it is normalized once, before them."""


@dataclass(frozen=True, slots=True)
class Repair:
    """Mostly an undone zero initialization, without which alpha and branch would both have zero gradients for ever."""

    parameter: str
    """Path from the root: `layer1.0.bn2.weight`."""
    how: RepairKind
    """ones: filled with 1. zeros: with 0, as the method starts. scaled: multiplied by `factor`, as the method starts.
    reset: its module's `reset_parameters()`, or PyTorch's default initialization. unwrap (in files): the layer without
    the function around it that fills it with zeros."""
    certain: bool = True
    """It is zero now; False where a statement of the file may make it so (static route)."""
    factor: float = 1.0
    owner: tuple[str, str] | None = None
    """Path and class of the module below which it is, if that is not the one that adds."""


@dataclass(frozen=True, slots=True)
class Site:
    """One add in the code of one module instance, and what is to become of it."""

    verdict: Verdict
    code: str
    """Stable code of the verdict's kind: RZ1xx blocks, RZ9xx refusals (`codes.py`)."""
    reason: str
    """One sentence; names the operand or module."""
    path: str
    """Path of the instance that owns the add ("" is the root); on the static route, of the class's analysed context."""
    cls: str
    """Qualified name of the owner's class (the instance's, not the base that defines the method)."""
    place: Place | None
    span: Span | None
    text: str = ""
    """The source line."""
    form: str = ""
    """"pre-norm", "post-norm", "projection shortcut", ... joined by ", "."""
    skip: str = ""
    """The skip as written in the source."""
    skip_kind: Literal["identity", "projection", "slice", ""] = ""
    gates: tuple[Gate, ...] = ()
    skip_gate: SkipGate | None = None
    shifts: tuple[Gate, ...] = ()
    """Biases of one number before the layers of the branch (FixUp)."""
    norms: tuple[Norm, ...] = ()
    move: Move | None = None
    activation: Activation | None = None
    repairs: tuple[Repair, ...] = ()
    calls: int = 1
    """How often the add ran."""
    confidence: float = 1.0
    """1 when recorded; less for static findings."""
    written: Span | None = None
    """Of an add in the code of a graph: the line of the code that was traced, where the tracer has noted it; the
    columns are -1."""

    @property
    def shown(self) -> Span | None:
        """The place to tell a reader."""
        return self.written or self.span

    @property
    def edited(self) -> bool:
        """Whether the text changes: converted, or the twin of a converted one on a path that did not run."""
        twin = self.verdict == "not-executed" and bool(self.gates or self.move)
        return self.verdict == "converted" or twin


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for; the same names in Python and on the command line."""

    method: str = "rezero"
    alpha_init: float | Literal["preserve"] | None = 0.0
    """None leaves it to a method whose start value depends on the depth."""
    drop_norm: tuple[NormKind, ...] = ("layer",)
    activation: Literal["branch", "keep"] = "branch"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    share: Literal["branch", "layer"] = "branch"
    long_skips: bool = False
    norm_types: tuple[Any, ...] = ()
    granularity: Literal["scalar", "channel"] = "scalar"

    @property
    def preserve(self) -> bool:
        return self.alpha_init == "preserve"


@dataclass(frozen=True, slots=True)
class Plan:
    """Every add of a model with its verdict, and all that the rewriters need."""

    sites: tuple[Site, ...]
    options: Options = field(default_factory=Options)
    route: str = ""
    """How it was captured: "recorded (fake tensors)", "symbolic", "static", ..."""
    scalars: int = 0
    """Adds of Python numbers, integer tensors or a tensor with a number: counted, not listed."""
    notes: tuple[str, ...] = ()
    """What the reader should know about the capture as a whole."""
    kept_calls: tuple[tuple[Span, str], ...] = ()
    """Calls of norms that stay, with the `tail` of the norm's path: text that several instances share cannot drop them
    for some."""

    def of(self, *verdicts: Verdict) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if site.verdict in verdicts)

    @property
    def converted(self) -> tuple[Site, ...]:
        return self.of("converted")

    @property
    def edited(self) -> tuple[Site, ...]:
        """The sites whose text changes: the converted ones, and their twins on paths that did not run."""
        return tuple(site for site in self.sites if site.edited)


def tail(path: str) -> str:
    """What the instances of a class share of a norm's path: its last name, "norm"; of an element "mlp.3" or "mlp.*.3".

    The call of an element may be torch's own, in `nn.Sequential`, which all its instances share.
    """
    parts = path.split(".")
    first = max((i for i, part in enumerate(parts) if not _is_index(part)), default=-1)
    if first in (-1, len(parts) - 1):
        return parts[-1]
    return ".".join((parts[first], *("*" for _ in parts[first + 1 : -1]), parts[-1]))


def _is_index(part: str) -> bool:
    return part == "*" or part.isdigit()


def as_dict(record: Any) -> Any:
    """A record as JSON-able builtins."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        return {f.name: as_dict(getattr(record, f.name)) for f in dataclasses.fields(record)}
    if isinstance(record, (tuple, list)):
        return [as_dict(item) for item in record]
    if isinstance(record, type):
        return f"{record.__module__}.{record.__qualname__}"
    return record

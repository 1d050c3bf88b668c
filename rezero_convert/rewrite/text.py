"""Edit the text of functions as a Plan says: gates in, norm calls out, activations into the branch.

One engine for both routes. It decides nothing: every edit is an operand of the Plan, found by its position. What no
edit touches comes back byte for byte.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import libcst as cst
from libcst.metadata import CodePosition, CodeRange, MetadataWrapper, ParentNodeProvider, PositionProvider

from .. import sources
from ..errors import ConversionError
from ..plan import WHOLE, Loop, Move, Operand, Scale, Site, Span

GateSpelling = Callable[[cst.Name, cst.BaseExpression, cst.BaseExpression], cst.BaseExpression]
"""How `alpha` scales an operand; the first argument is the text of the parameter, `self.alpha_attn`."""

_Target = cst.BinaryOperation | cst.Call | cst.AugAssign
_For = cst.For | cst.CompFor
_Position = Callable[[int, int], CodePosition]
"""Gives a place in `ast`'s terms, line and column, in libcst's."""
_Line = TypeVar("_Line", cst.SimpleStatementLine, cst.SimpleStatementSuite)
_Item = TypeVar("_Item", cst.Arg, cst.BaseElement)
_Clause = TypeVar("_Clause", cst.For, cst.CompFor)

_INPLACE_SUMS: dict[str, type[cst.BaseBinaryOp]] = {"add_": cst.Add, "sub_": cst.Subtract, "subtract_": cst.Subtract}


def edit(text: str, sites: Iterable[Site], gate: GateSpelling, *, file: str, first_line: int = 1) -> str:
    """`text` with the edits of those `sites` that are to be edited and lie in it.

    Args:
        text: complete statements; the first one is not indented.
        sites: the Plan's sites; spans in other files or other lines are passed over.
        gate: `product` or `call`.
        file: the file name in the spans.
        first_line: the line number in `file` of the text's first line.

    Raises:
        ConversionError: nothing of the expected form is at a span (the file changed), or the form cannot be edited.
    """
    wanted = _Wanted(file, first_line, first_line + text.count("\n"))
    wanted.collect(sites)
    return _edited(text, wanted, gate)


def bypassed(text: str, operands: Iterable[Operand], *, file: str, first_line: int = 1) -> str:
    """`text` with an operand in the place of each operation or call.

    Raises:
        ConversionError: nothing of the expected form is at the span of an operand.
    """
    wanted = _Wanted(file, first_line, first_line + text.count("\n"))
    wanted.bypasses.update(((operand.span, operand.index), operand) for operand in operands)
    return _edited(text, wanted, call)


def _edited(text: str, wanted: _Wanted, gate: GateSpelling) -> str:
    if not wanted.operands():
        return text
    file, first_line = wanted.file, wanted.first
    try:
        wrapper = MetadataWrapper(cst.parse_module(text), unsafe_skip_copy=True)
    except cst.ParserSyntaxError as error:
        raise ConversionError(f"{file}:{first_line + error.raw_line - 1}: syntax error: {error.message}") from error
    positions = wrapper.resolve(PositionProvider)
    position = partial(_position, text.split("\n"), first_line)
    nodes = _locate(positions, wanted.operands(), position)
    loops = _loops(positions, wanted.gates.values(), position)
    editor = _Editor(wanted, nodes, wrapper.resolve(ParentNodeProvider), gate, loops)
    return wrapper.module.visit(editor).code


def product(owner: cst.Name, alpha: cst.BaseExpression, operand: cst.BaseExpression) -> cst.BaseExpression:
    """`alpha * operand`, the operand in parentheses unless it is a single term: what the source route writes."""
    return cst.BinaryOperation(left=alpha, operator=cst.Multiply(), right=parenthesised(operand))


def call(owner: cst.Name, alpha: cst.BaseExpression, operand: cst.BaseExpression) -> cst.BaseExpression:
    """`self.rezero_gate(alpha, operand)`: what the live route writes."""
    return cst.Call(
        func=cst.Attribute(value=owner, attr=cst.Name("rezero_gate")),
        args=[
            cst.Arg(alpha, comma=cst.Comma(whitespace_after=cst.SimpleWhitespace(" "))),
            cst.Arg(operand, comma=cst.MaybeSentinel.DEFAULT),
        ],
    )


def scaled(alpha: cst.BaseExpression, scale: Scale) -> cst.BaseExpression:
    """`factor * map(alpha)`, as a factor of a product."""
    if scale.trailing:
        sizes = ", ".join(["-1", *["1"] * scale.trailing])
        alpha = cst.ensure_type(cst.parse_expression(f"_.view({sizes})"), cst.Call).with_changes(
            func=cst.Attribute(alpha, cst.Name("view"))
        )
    if scale.map == "relu":
        alpha = cst.Call(cst.Attribute(alpha, cst.Name("relu")))
    elif scale.map == "complement":
        alpha = _wrap(cst.BinaryOperation(cst.Integer("1"), cst.Subtract(), alpha))
    if scale.factor != 1.0:
        alpha = cst.BinaryOperation(cst.Float(repr(scale.factor)), cst.Multiply(), alpha)
    return alpha


def parenthesised(node: cst.BaseExpression) -> cst.BaseExpression:
    """`node`, in parentheses unless it binds tighter than any operator."""
    return node if _is_term(node) else _wrap(node)


_ONE = Scale()


@dataclass(frozen=True, slots=True)
class _GateEdit:
    alpha: str
    """"" adds no gate: only the activation, or a constant factor, goes in."""
    activation: Operand | None
    where: Operand
    loops: tuple[Loop, ...] = ()
    scale: Scale = _ONE
    move: Move | None = None
    """The operand is one of several that read what a statement before them has normalized."""
    carries: Operand | None = None


@dataclass(slots=True)
class _Wanted:
    """The edits of one text, by operand."""

    file: str
    first: int
    last: int
    gates: dict[tuple[Span, int | str], _GateEdit] = field(default_factory=dict)
    bypasses: dict[tuple[Span, int | str], Operand] = field(default_factory=dict)

    def collect(self, sites: Iterable[Site]) -> None:
        for site in sites:
            if not site.edited:
                continue
            moved = site.activation.at if site.activation is not None and site.activation.action == "move" else None
            for gate in site.gates:
                if gate.at is None:
                    if moved is not None:
                        raise ConversionError(f"{moved.span}: no operand is known that the activation could move to")
                    continue
                alpha = "" if gate.existing else gate.alpha
                change = _GateEdit(alpha, moved, gate.at, gate.loops, gate.scale, carries=gate.carries)
                if not (gate.existing and moved is None):
                    self._enter(change)
            for change in _further(site):
                self._enter(change)
            calls = [norm.at for norm in site.norms if norm.action == "bypass" and norm.at is not None]
            for operand in (*calls, moved, site.move.at if site.move is not None else None):
                if operand is not None and self._holds(operand):
                    self.bypasses[operand.span, operand.index] = operand

    def _enter(self, change: _GateEdit) -> None:
        at = change.where
        if self._holds(at) and self.gates.setdefault((at.span, at.index), change) != change:
            raise ConversionError(f"{at.span}: two gates want the same operand")

    def operands(self) -> tuple[Operand, ...]:
        """Every operand that must be found in the text."""
        return (*(change.where for change in self.gates.values()), *self.bypasses.values())

    def _holds(self, operand: Operand) -> bool:
        span = operand.span
        return span.file == self.file and self.first <= span.line and span.end_line <= self.last


def _further(site: Site) -> Iterator[_GateEdit]:
    """The edits of operands besides those by the branches' gates."""
    for shift in site.shifts:
        if shift.at is not None:
            yield _GateEdit(shift.alpha, None, shift.at, shift.loops, shift.scale)
    if site.move is not None:
        several = site.move if len(site.move.to) > 1 else None
        for at in site.move.to:
            yield _GateEdit("", None if several else site.move.at, at, move=several)
    if site.skip_gate is not None:
        skip = site.skip_gate
        yield _GateEdit(skip.alpha, None, skip.at, skip.loops, skip.scale)


def _position(rows: Sequence[str], first_line: int, line: int, col: int) -> CodePosition:
    """A place in `ast`'s terms in libcst's."""
    row = rows[line - first_line].encode()
    return CodePosition(line - first_line + 1, len(row[:col].decode(errors="replace")))


def _locate(
    positions: Mapping[cst.CSTNode, CodeRange], operands: Sequence[Operand], position: _Position
) -> dict[Span, _Target]:
    """The node of each operand's expression."""
    exact: dict[tuple[CodePosition, CodePosition], _Target] = {}
    chained: dict[tuple[CodePosition, CodePosition], _Target] = {}
    for node, place in positions.items():
        if isinstance(node, (cst.BinaryOperation, cst.Call, cst.AugAssign)):
            exact[place.start, place.end] = node
            if isinstance(node, cst.Call) and isinstance(node.func, cst.Attribute):
                # the interpreter starts a call in a chain over several lines at its attribute
                chained[positions[node.func.attr].start, place.end] = node
    found: dict[Span, _Target] = {}
    for operand in operands:
        span = operand.span
        key = (position(span.line, span.col), position(span.end_line, span.end_col))
        node_at = exact.get(key) or chained.get(key)
        if node_at is None:
            raise ConversionError(f"{span}: no operation is there (has the file changed?)")
        found[span] = node_at
    return found


def _loops(
    positions: Mapping[cst.CSTNode, CodeRange], changes: Iterable[_GateEdit], position: _Position
) -> dict[Span, _For]:
    """The `for` clauses that alphas are walked in, by their first variables."""
    clauses = [node for node in positions if isinstance(node, (cst.For, cst.CompFor))]
    starts = {min(_starts(positions, node.target)): node for node in clauses}
    found: dict[Span, _For] = {}
    for span in dict.fromkeys(loop.span for change in changes for loop in change.loops):
        at = position(span.line, span.col)
        if (at.line, at.column) not in starts:
            raise ConversionError(f"{span}: no loop is there (has the file changed?)")
        found[span] = starts[at.line, at.column]
    return found


def _starts(positions: Mapping[cst.CSTNode, CodeRange], node: cst.CSTNode) -> Iterator[tuple[int, int]]:
    """Where the names in an expression begin."""
    if isinstance(node, cst.Name):
        yield positions[node].start.line, positions[node].start.column
    for child in node.children:
        yield from _starts(positions, child)


class _Editor(cst.CSTTransformer):
    """Applies the edits bottom-up; inner edits survive in outer ones."""

    def __init__(
        self,
        wanted: _Wanted,
        nodes: Mapping[Span, _Target],
        parents: Mapping[cst.CSTNode, cst.CSTNode],
        spelling: GateSpelling,
        loops: Mapping[Span, _For],
    ) -> None:
        super().__init__()
        self.parents = parents
        self.spelling = spelling
        self.nodes = nodes
        self.gates: dict[cst.CSTNode, list[_GateEdit]] = {}
        self.bypasses: dict[cst.CSTNode, Operand] = {}
        self.gone: set[cst.CSTNode] = set()
        for change in wanted.gates.values():
            self.gates.setdefault(nodes[change.where.span], []).append(change)
        for operand in wanted.bypasses.values():
            self.bypasses[nodes[operand.span]] = operand
        self.walks: dict[cst.CSTNode, dict[str, cst.BaseExpression]] = {}
        """Per `for` clause, the variables that walk lists of alphas."""
        self.walked: dict[tuple[Span, int | str], cst.BaseExpression] = {}
        """The alpha of a gate in loops."""
        self.normed: dict[Move, str] = {}
        """The variable of what is normalized for several operands."""
        self.before: dict[cst.CSTNode, list[cst.SimpleStatementLine]] = {}
        """New statements, by those that they go before."""
        for change in wanted.gates.values():
            if change.move is not None and change.move not in self.normed:
                self._normalize(change.move)
        for change in wanted.gates.values():
            if change.loops:
                self._walk(change, loops)

    def leave_BinaryOperation(
        self, original_node: cst.BinaryOperation, updated_node: cst.BinaryOperation
    ) -> cst.BaseExpression:
        bypass = self.bypasses.get(original_node)
        if bypass is not None:
            value = parenthesised(updated_node.right if bypass.index == 1 else updated_node.left)
            value = _wrap(value) if _spills(value) else value
            return value.with_changes(lpar=[*updated_node.lpar, *value.lpar], rpar=[*value.rpar, *updated_node.rpar])
        for change in self._parts_of(original_node):
            if change.where.index not in (0, 1):
                raise ConversionError(f"{change.where.span}: a binary operation has no operand {change.where.index!r}")
            side = "right" if change.where.index == 1 else "left"
            gated = self._gated(original_node, getattr(updated_node, side), change)
            if not isinstance(original_node.operator, (cst.Add, cst.Subtract)):
                gated = parenthesised(gated)
            updated_node = updated_node.with_changes(**{side: gated})
        return self._around(original_node, updated_node)

    def leave_AugAssign(self, original_node: cst.AugAssign, updated_node: cst.AugAssign) -> cst.AugAssign | cst.Assign:
        target: cst.BaseExpression | None = None
        for change in self._parts_of(original_node):
            span = change.where.span
            operators = {cst.AddAssign: cst.Add, cst.SubtractAssign: cst.Subtract}
            if type(original_node.operator) not in operators or change.where.index not in (0, 1):
                raise ConversionError(f"{span}: this augmented assignment is not a sum of two operands")
            if change.where.index == 1:
                updated_node = updated_node.with_changes(value=self._gated(original_node, updated_node.value, change))
                continue
            if not _is_path(original_node.target):
                raise ConversionError(f"{span}: a gate on this assignment's target would evaluate it twice")
            target = self._gated(original_node, original_node.target.deep_clone(), change)
        if self._whole(original_node) is not None and _is_path(original_node.target):
            target = target or original_node.target.deep_clone()
        if target is None:
            return updated_node
        operator = cst.Add() if isinstance(original_node.operator, cst.AddAssign) else cst.Subtract()
        equal = updated_node.operator
        assert isinstance(equal, (cst.AddAssign, cst.SubtractAssign))
        before, after = equal.whitespace_before, equal.whitespace_after
        assert isinstance(before, cst.SimpleWhitespace)
        assert isinstance(after, cst.SimpleWhitespace)
        return cst.Assign(
            targets=[
                cst.AssignTarget(
                    updated_node.target,
                    whitespace_before_equal=before,
                    whitespace_after_equal=after,
                )
            ],
            value=self._around(
                original_node,
                cst.BinaryOperation(left=target, operator=operator, right=_as_right_operand(updated_node.value)),
            ),
            semicolon=updated_node.semicolon,
        )

    def _parts_of(self, node: cst.CSTNode) -> list[_GateEdit]:
        """The edits of an expression's operands."""
        return [change for change in self.gates.get(node, ()) if change.where.index != WHOLE]

    def _whole(self, node: cst.CSTNode) -> _GateEdit | None:
        return next((change for change in self.gates.get(node, ()) if change.where.index == WHOLE), None)

    def _around(self, original: cst.CSTNode, updated: cst.BaseExpression) -> cst.BaseExpression:
        """The expression, in a call if one goes around it."""
        change = self._whole(original)
        if change is None:
            return updated
        plain = "\n" not in cst.Module(body=[]).code_for_node(updated)
        return self._gated(original, _bare(updated) if plain else updated, change)

    def leave_Call(self, original_node: cst.Call, updated_node: cst.Call) -> cst.BaseExpression:
        for change in self._parts_of(original_node):
            operand = self._operand(original_node, updated_node, change.where)
            gated = self._gated(original_node, operand, change)
            updated_node = self._with_operand(original_node, updated_node, change.where, gated)
        bypass = self.bypasses.get(original_node)
        if bypass is None:
            return self._around(original_node, updated_node)
        return self._bypassed(original_node, updated_node, bypass)

    def leave_Assign(self, original_node: cst.Assign, updated_node: cst.Assign) -> cst.Assign:
        if (
            original_node.value in self.bypasses
            and len(updated_node.targets) == 1
            and _is_path(updated_node.value)
            and updated_node.targets[0].target.deep_equals(_bare(updated_node.value))
        ):
            self.gone.add(original_node)
        return updated_node

    def leave_Expr(self, original_node: cst.Expr, updated_node: cst.Expr) -> cst.Expr | cst.Assign:
        core = original_node.value
        while isinstance(core, cst.Call) and core in self.bypasses:
            core = self._operand(core, core, self.bypasses[core])
        if core is not original_node.value and _is_path(updated_node.value):
            self.gone.add(original_node)
        added = updated_node.value
        for change in self.gates.get(core, ()):
            if not (isinstance(core, cst.Call) and isinstance(added, cst.Call)):
                continue
            if change.where.index == 0 and change.where.receiver:
                return self._assigned(core, added, updated_node, change)
        return updated_node

    def leave_SimpleStatementLine(
        self, original_node: cst.SimpleStatementLine, updated_node: cst.SimpleStatementLine
    ) -> cst.SimpleStatementLine:
        return self._without(original_node, updated_node)

    def leave_SimpleStatementSuite(
        self, original_node: cst.SimpleStatementSuite, updated_node: cst.SimpleStatementSuite
    ) -> cst.SimpleStatementSuite:
        return self._without(original_node, updated_node)

    def leave_IndentedBlock(
        self, original_node: cst.IndentedBlock, updated_node: cst.IndentedBlock
    ) -> cst.IndentedBlock:
        if not any(statement in self.gone or statement in self.before for statement in original_node.body):
            return updated_node
        kept: list[cst.BaseStatement] = []
        orphans: list[cst.EmptyLine] = []
        for before, after in zip(original_node.body, updated_node.body, strict=True):
            if before in self.gone:
                assert isinstance(after, cst.SimpleStatementLine)
                orphans = _joined(orphans, _unattached(after.leading_lines))
                continue
            if orphans and isinstance(after, cst.CSTNode) and hasattr(after, "leading_lines"):
                after = after.with_changes(leading_lines=_joined(orphans, after.leading_lines))
            orphans = []
            for added in self.before.get(before, ()):
                assert isinstance(after, cst.SimpleStatementLine)
                kept.append(added.with_changes(leading_lines=after.leading_lines))
                after = after.with_changes(leading_lines=[])
            kept.append(after)
        comments = [line for line in orphans if line.comment is not None]
        if not kept:
            kept.append(cst.SimpleStatementLine(body=[cst.Pass()], leading_lines=comments))
            comments = []
        return updated_node.with_changes(body=kept, footer=[*comments, *updated_node.footer])

    def _without(self, original: _Line, updated: _Line) -> _Line:
        """The line less the statements that go; a whole line that goes is taken out by its block."""
        pairs = list(zip(original.body, updated.body, strict=True))
        kept = [after for before, after in pairs if before not in self.gone]
        if len(kept) == len(pairs):
            return updated
        if not kept:
            if isinstance(original, cst.SimpleStatementSuite):
                return updated.with_changes(body=[cst.Pass()])
            self.gone.add(original)
            return updated
        kept[-1] = kept[-1].with_changes(semicolon=cst.MaybeSentinel.DEFAULT)
        return updated.with_changes(body=kept)

    def _normalize(self, move: Move) -> None:
        """Give what several operands read a variable, `normed = self.norm(x)`, in a statement before them."""
        first = min(move.to, key=lambda at: at.span)
        node = self.nodes[first.span]
        lines = [around for around in _ancestors(node, self.parents) if isinstance(around, cst.SimpleStatementLine)]
        read = self._read(node, first)
        if not lines or not isinstance(read, cst.Name):
            raise ConversionError(f"{first.span}: no statement can normalize what is read here")
        name = "normed" if "normed" not in self._names(node) else "rezero_normed"
        value = self._activated(read.deep_clone(), move.at)
        self.normed[move] = name
        self.before.setdefault(lines[0], []).append(
            cst.SimpleStatementLine([cst.Assign([cst.AssignTarget(cst.Name(name))], value)])
        )

    def _gated(self, at: cst.CSTNode, operand: cst.BaseExpression, change: _GateEdit) -> cst.BaseExpression:
        if change.move is not None:
            return cst.Name(self.normed[change.move])
        if change.activation is not None:
            operand = self._activated(operand, change.activation)
        if not change.alpha:
            if change.scale == _ONE:
                return operand
            return product(cst.Name("self"), cst.Float(repr(change.scale.factor)), operand)
        owner = cst.Name(self._first_argument(at, change.where.span))
        alpha = self.walked.get((change.where.span, change.where.index)) or self._attribute(at, change)
        if change.carries is not None:
            read = self._read(at, change.carries)
            computed = cst.Call(cst.Attribute(cst.Call(alpha.deep_clone(), [cst.Arg(read)]), cst.Name("sigmoid")))
            less = cst.BinaryOperation(parenthesised(operand), cst.Subtract(), read.deep_clone())
            return product(owner, computed, less)
        if change.scale.map == "shift":
            return cst.BinaryOperation(parenthesised(operand), cst.Add(), alpha.deep_clone())
        return self.spelling(owner, scaled(alpha.deep_clone(), change.scale), operand)

    def _attribute(self, at: cst.CSTNode, change: _GateEdit) -> cst.BaseExpression:
        """`self.<alpha>`"""
        found: cst.BaseExpression = cst.Name(self._first_argument(at, change.where.span))
        for attribute in change.alpha.split("."):
            found = cst.Attribute(found, cst.Name(attribute))
        return found

    def _walk(self, change: _GateEdit, loops: Mapping[Span, _For]) -> None:
        """Walk the alphas through the loops around a gate: `self.alpha[i]`, or a variable beside the modules."""
        clauses = [loops[loop.span] for loop in change.loops]
        alpha = self._attribute(clauses[0], change)
        used = self._names(clauses[0])
        for depth, (clause, loop) in enumerate(zip(clauses, change.loops, strict=True), 1):
            if loop.index:
                alpha = cst.Subscript(alpha, [cst.SubscriptElement(cst.Index(cst.parse_expression(loop.index)))])
                continue
            name = change.alpha.replace("alpha", "alpha" + "s" * (len(clauses) - depth), 1)
            if name in used:
                name = f"rezero_{name}"
            if loop.backwards:
                alpha = cst.Call(cst.Name("reversed"), [cst.Arg(alpha)])
            self.walks.setdefault(clause, {})[name] = alpha
            alpha = cst.Name(name)
        self.walked[change.where.span, change.where.index] = alpha

    def _names(self, node: cst.CSTNode) -> set[str]:
        """The variables of the outermost function around `node`."""
        function = [around for around in _ancestors(node, self.parents) if isinstance(around, cst.FunctionDef)][-1:]
        return {name for around in function for name in _variables(around)}

    def leave_For(self, original_node: cst.For, updated_node: cst.For) -> cst.For:
        return self._walking(original_node, updated_node)

    def leave_CompFor(self, original_node: cst.CompFor, updated_node: cst.CompFor) -> cst.CompFor:
        return self._walking(original_node, updated_node)

    def _walking(self, original_node: cst.CSTNode, updated_node: _Clause) -> _Clause:
        alphas = self.walks.get(original_node)
        if alphas is None:
            return updated_node
        target, walk = _beside(updated_node.target, updated_node.iter, alphas)
        return updated_node.with_changes(target=target, iter=walk)

    def _activated(self, operand: cst.BaseExpression, activation: Operand) -> cst.BaseExpression:
        """`operand` in the place of the sum in a copy of the activation's call."""
        node = self.nodes.get(activation.span)
        if node is None:  # the call is in another method of the same module
            try:
                parsed = cst.parse_expression(sources.segment(activation.span).strip())
            except cst.ParserSyntaxError as error:
                raise ConversionError(f"{activation.span}: no activation is there (has the file changed?)") from error
            if not isinstance(parsed, cst.Call):
                raise ConversionError(f"{activation.span}: no activation is there (has the file changed?)")
            node = parsed
        if not isinstance(node, cst.Call):
            raise ConversionError(f"{activation.span}: the activation is not a call")
        copy = node.deep_clone().with_changes(
            lpar=[], rpar=[], whitespace_before_args=cst.SimpleWhitespace(""), whitespace_after_func=_NO_SPACE
        )
        if copy.args and isinstance(copy.args[-1].comma, cst.Comma):
            last = copy.args[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
            copy = copy.with_changes(args=[*copy.args[:-1], last])
        if copy.args:
            last = copy.args[-1].with_changes(whitespace_after_arg=cst.SimpleWhitespace(""))
            copy = copy.with_changes(args=[*copy.args[:-1], last])
        return self._with_operand(node, copy, activation, operand)

    def _bypassed(self, original: cst.Call, updated: cst.Call, operand: Operand) -> cst.BaseExpression:
        """The operand in the place of the whole call."""
        value = self._operand(original, updated, operand)
        is_method = operand.receiver
        if is_method and value.lpar and not _spills(_bare(value)):
            value = _bare(value)  # the parentheses were for the method's dot
        comments = [] if is_method else _comments(updated)
        if comments or _spills(value):
            value = _wrap(
                value,
                updated.whitespace_before_args if comments else None,
                updated.args[-1].whitespace_after_arg if comments else None,
            )
        elif not _is_term(value) and not _accepts(self.parents.get(original), value) and not updated.lpar:
            value = _wrap(value)
        return value.with_changes(lpar=[*updated.lpar, *value.lpar], rpar=[*value.rpar, *updated.rpar])

    def _assigned(self, core: cst.Call, added: cst.Call, statement: cst.Expr, change: _GateEdit) -> cst.Assign:
        """The statement `out.add_(identity)` with a gated receiver, as an assignment to `out`."""
        span = change.where.span
        assert isinstance(core.func, cst.Attribute)
        assert isinstance(added.func, cst.Attribute)
        name, target = core.func.attr.value, _bare(core.func.value)
        if name not in _INPLACE_SUMS or not _is_path(target):
            raise ConversionError(f"{span}: a gate on the receiver of this call would be lost")
        gated = added.func.value
        value: cst.BaseExpression
        if len(added.args) == 1 and not added.args[0].star and _keyword(added.args[0]) in ("", "other"):
            gated = self._gated(core, target.deep_clone(), change)
            right = _as_right_operand(added.args[0].value)
            value = cst.BinaryOperation(left=gated, operator=_INPLACE_SUMS[name](), right=right)
        else:
            value = added.with_changes(func=added.func.with_changes(value=gated, attr=cst.Name(name[:-1])))
        if _spills(value):
            value = _wrap(value)
        target = target.deep_clone()
        assert isinstance(target, cst.BaseAssignTargetExpression)
        return cst.Assign(targets=[cst.AssignTarget(target)], value=value, semicolon=statement.semicolon)

    def _operand(self, original: cst.Call, call: cst.Call, operand: Operand) -> cst.BaseExpression:
        """The operand's expression in `call`, a version of `original`."""
        if operand.receiver and operand.index == 0:
            assert isinstance(call.func, cst.Attribute)
            return call.func.value
        return call.args[self._argument(original, operand)].value

    def _read(self, node: cst.CSTNode, operand: Operand) -> cst.BaseExpression:
        """A copy of an operand as it was written."""
        found: cst.BaseExpression | None = None
        if isinstance(node, cst.Call):
            found = self._operand(node, node, operand)
        elif isinstance(node, cst.BinaryOperation):
            found = node.left if operand.index == 0 else node.right
        elif isinstance(node, cst.AugAssign):
            found = node.target if operand.index == 0 else node.value
        if found is None:
            raise ConversionError(f"{operand.span}: no operand {operand.index!r} is there (has the file changed?)")
        return _bare(found.deep_clone())

    def _with_operand(
        self, original: cst.Call, call: cst.Call, operand: Operand, value: cst.BaseExpression
    ) -> cst.Call:
        if operand.receiver and operand.index == 0:
            return call.with_changes(func=call.func.with_changes(value=parenthesised(value)))
        position = self._argument(original, operand)
        args = list(call.args)
        args[position] = args[position].with_changes(value=value)
        return call.with_changes(args=args)

    def _argument(self, call: cst.Call, operand: Operand) -> int:
        """The position in `call.args` of the operand."""
        index = operand.index
        if isinstance(index, int):
            index -= operand.receiver
            for position, arg in enumerate(call.args):
                if arg.star or arg.keyword is not None:
                    break
                if position == index:
                    return position
        for position, arg in enumerate(call.args):
            if arg.keyword is not None and arg.keyword.value == operand.index:
                return position
        raise ConversionError(f"{operand.span}: the call has no argument {operand.index!r} (has the file changed?)")

    def _first_argument(self, node: cst.CSTNode, span: Span) -> str:
        """The name of `self` in the method around `node`."""
        method: cst.FunctionDef | cst.Lambda | None = None
        for around in _ancestors(node, self.parents):
            if isinstance(around, cst.ClassDef):
                break
            if isinstance(around, (cst.FunctionDef, cst.Lambda)):
                method = around
        params = [] if method is None else [*method.params.posonly_params, *method.params.params]
        if not params:
            raise ConversionError(f"{span}: not in a method, so there is no module to hold the alpha")
        return params[0].name.value


def _beside(
    target: cst.BaseAssignTargetExpression, walk: cst.BaseExpression, alphas: Mapping[str, cst.BaseExpression]
) -> tuple[cst.BaseExpression, cst.BaseExpression]:
    """Target and iterable of a `for` that walks lists of alphas beside what it walks."""
    lists = [cst.Arg(expression.deep_clone()) for expression in alphas.values()]
    names = [cst.Element(cst.Name(name)) for name in alphas]
    zipped = isinstance(walk, cst.Call) and isinstance(walk.func, cst.Name) and walk.func.value == "zip"
    if zipped and isinstance(walk, cst.Call) and isinstance(target, cst.Tuple):
        first = [arg for arg in walk.args if arg.keyword is None]
        walk = walk.with_changes(args=[*map(_without_comma, first), *lists, *walk.args[len(first) :]])
        return target.with_changes(elements=[*map(_without_comma, target.elements), *names]), walk
    keep = isinstance(walk, (cst.Tuple, cst.GeneratorExp)) or _spills(_bare(walk))
    inner = _wrap(target) if isinstance(target, cst.Tuple) and not target.lpar else target
    walk = cst.Call(cst.Name("zip"), [cst.Arg(walk if keep else _bare(walk)), *lists])
    return cst.Tuple([cst.Element(inner), *names], lpar=[], rpar=[]), walk


_NO_SPACE = cst.SimpleWhitespace("")
_TERMS = (cst.Name, cst.Attribute, cst.Subscript, cst.Call, cst.Await, cst.BaseNumber)
_DISPLAYS = (cst.List, cst.Dict, cst.Set, cst.ListComp, cst.DictComp, cst.SetComp, cst.BaseString)
_TIGHT = (cst.Multiply, cst.Divide, cst.MatrixMultiply, cst.FloorDivide, cst.Modulo, cst.Power)


def _is_term(node: cst.BaseExpression) -> bool:
    return bool(node.lpar) or isinstance(node, _TERMS + _DISPLAYS)


def _is_path(node: cst.BaseExpression) -> bool:
    """Whether `node` is a name or an attribute path from a name."""
    while isinstance(node, cst.Attribute):
        node = node.value
    return isinstance(node, cst.Name)


def _as_right_operand(node: cst.BaseExpression) -> cst.BaseExpression:
    """`node` as the right side of a sum."""
    if isinstance(node, cst.BinaryOperation) and isinstance(node.operator, _TIGHT):
        return node
    if isinstance(node, cst.UnaryOperation) and not isinstance(node.operator, cst.Not):
        return node
    return parenthesised(node)


def _wrap(
    node: cst.BaseExpression,
    before: cst.BaseParenthesizableWhitespace | None = None,
    after: cst.BaseParenthesizableWhitespace | None = None,
) -> cst.BaseExpression:
    left = cst.LeftParen(whitespace_after=before or _NO_SPACE)
    right = cst.RightParen(whitespace_before=after or _NO_SPACE)
    return node.with_changes(lpar=[left, *node.lpar], rpar=[*node.rpar, right])


def _bare(node: cst.BaseExpression) -> cst.BaseExpression:
    return node.with_changes(lpar=[], rpar=[])


def _accepts(parent: cst.CSTNode | None, node: cst.BaseExpression) -> bool:
    """Whether `node`, an argument of a call so far, can stand below `parent` without parentheses."""
    if isinstance(node, cst.NamedExpr):
        return isinstance(parent, cst.Arg)
    return isinstance(
        parent, (cst.Arg, cst.Assign, cst.AnnAssign, cst.AugAssign, cst.Return, cst.Expr, cst.Element, cst.Index)
    )


def _spills(node: cst.BaseExpression) -> bool:
    """Whether a line break in `node` is not inside brackets."""
    code = cst.Module(body=[]).code_for_node(node)
    if "\n" not in code and "\r" not in code:
        return False
    try:
        return len(ast.parse(f"_ = {code}").body) != 1
    except SyntaxError:
        return True


def _without_comma(item: _Item) -> _Item:
    return item.with_changes(comma=cst.MaybeSentinel.DEFAULT)


def _comments(call: cst.Call) -> list[cst.BaseParenthesizableWhitespace]:
    """White space with comments that would go with the call's parentheses."""
    spaces = [call.whitespace_before_args, *(arg.whitespace_after_arg for arg in call.args[-1:])]
    return [space for space in spaces if isinstance(space, cst.ParenthesizedWhitespace) and _has_comment(space)]


def _has_comment(space: cst.ParenthesizedWhitespace) -> bool:
    return space.first_line.comment is not None or any(line.comment is not None for line in space.empty_lines)


def _keyword(arg: cst.Arg) -> str:
    return "" if arg.keyword is None else arg.keyword.value


def _ancestors(node: cst.CSTNode, parents: Mapping[cst.CSTNode, cst.CSTNode]) -> Iterator[cst.CSTNode]:
    around = parents.get(node)
    while around is not None:
        yield around
        around = parents.get(around)


def _variables(node: cst.CSTNode) -> Iterator[str]:
    """The names below `node` that are no attributes and no keywords of calls."""
    if isinstance(node, cst.Name):
        yield node.value
    elif isinstance(node, (cst.Attribute, cst.Arg)):
        yield from _variables(node.value)
    else:
        for child in node.children:
            yield from _variables(child)


def _unattached(lines: Sequence[cst.EmptyLine]) -> list[cst.EmptyLine]:
    """Leading lines less the comment block that stands directly above the statement."""
    kept = list(lines)
    while kept and kept[-1].comment is not None:
        kept.pop()
    return kept


def _joined(orphans: Sequence[cst.EmptyLine], lines: Sequence[cst.EmptyLine]) -> list[cst.EmptyLine]:
    """Leading lines of a removed statement before those of the next, without doubling blank lines."""
    head = list(orphans)
    if lines and lines[0].comment is None:
        while head and head[-1].comment is None:
            head.pop()
    return [*head, *lines]

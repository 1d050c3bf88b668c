"""The text engine: each form of edit, and that nothing else changes."""

from __future__ import annotations

import ast
import textwrap

import pytest

from rezero_convert.errors import ConversionError
from rezero_convert.plan import Activation, Gate, Norm, Operand, Place, Site, Span
from rezero_convert.rewrite.text import call, edit, product
from rezero_convert.sources import register

FILE = "<model>"


def span(text: str, part: str, nth: int = 0, first_line: int = 1) -> Span:
    """The span of the nth occurrence of `part`, in the Plan's coordinates."""
    start = -1
    for _ in range(nth + 1):
        start = text.index(part, start + 1)
    end = start + len(part)

    def position(offset: int) -> tuple[int, int]:
        line = text.count("\n", 0, offset)
        return line + first_line, len(text[text.rfind("\n", 0, offset) + 1 : offset].encode())

    return Span(FILE, *position(start), *position(end))


def operand(text: str, part: str, index: int | str, nth: int = 0, first_line: int = 1) -> Operand:
    return Operand(Place("m", "Block.forward", FILE, 1), span(text, part, nth, first_line), index, is_method(part))


def is_method(part: str) -> bool:
    """Whether an operation is written as a tensor's method: `x.add(y)`, not `torch.add` or `self.act`."""
    node = ast.parse(part.strip()).body[0]
    func = node.value.func if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) else None
    root = func.value if isinstance(func, ast.Attribute) else None
    while isinstance(root, ast.Attribute):
        root = root.value
    return isinstance(func, ast.Attribute) and not (
        isinstance(root, ast.Name) and root.id in ("torch", "F", "operator", "self", "nn")
    )


def site(
    *gates: tuple[Operand | None, str],
    norms: tuple[Operand, ...] = (),
    activation: Operand | None = None,
    existing: bool = False,
    verdict: str = "converted",
) -> Site:
    return Site(
        verdict=verdict,  # type: ignore[arg-type]
        code="RZ101",
        reason="",
        path="",
        cls="Block",
        place=None,
        span=None,
        gates=tuple(Gate(at, alpha, "", "", existing=existing) for at, alpha in gates),
        norms=tuple(Norm("n", "LayerNorm", "layer", "pre", "bypass", "", at=at) for at in norms),
        activation=Activation("ReLU", activation, "move", "") if activation else None,
    )


def method(body: str, args: str = "self, x, out=None, identity=None") -> str:
    return (
        f"class Block:\n    def forward({args}):\n" + textwrap.indent(textwrap.dedent(body).strip("\n"), " " * 8) + "\n"
    )


def body_of(text: str) -> str:
    ast.parse(text)
    return textwrap.dedent("\n".join(text.split("\n")[2:])).strip("\n")


def gated(body: str, part: str, index: int | str, spelling=product, **more: object) -> str:
    text = method(body)
    return body_of(edit(text, [site((operand(text, part, index), "alpha"), **more)], spelling, file=FILE))  # type: ignore[arg-type]


# --- negatives ---


def test_stale_position_is_an_error_with_its_place() -> None:
    text = method("return x + self.f(x)")
    wrong = Operand(Place("m", "Block.forward", FILE, 1), Span(FILE, 3, 3, 3, 9), 1)
    with pytest.raises(ConversionError, match=r"<model>:3:4: .*changed"):
        edit(text, [site((wrong, "alpha"))], product, file=FILE)


def test_text_that_does_not_parse_is_an_error_with_its_line() -> None:
    text = method("return x + self.f(x)")
    at = operand(text, "x + self.f(x)", 1, first_line=1)
    with pytest.raises(ConversionError, match=r"<model>:\d+: syntax error"):
        edit(text.replace("return", "retur n"), [site((at, "alpha"))], product, file=FILE)


@pytest.mark.parametrize(
    ("body", "part", "index"),
    [
        ("out[:, g()] += x", "out[:, g()] += x", 0),
        ("out *= self.f(x)", "out *= self.f(x)", 1),
        ("return x + self.f(x)", "x + self.f(x)", 2),
        ("return torch.add(x, self.f(x))", "torch.add(x, self.f(x))", 2),
        ("return torch.add(x, self.f(x))", "torch.add(x, self.f(x))", "other"),
        ("self.parts[0].add_(x)", "self.parts[0].add_(x)", 0),
    ],
)
def test_forms_that_cannot_be_edited_are_errors(body: str, part: str, index: int | str) -> None:
    with pytest.raises(ConversionError, match=r"<model>:3:\d+: "):
        gated(body, part, index)


def test_a_function_without_self_is_an_error() -> None:
    text = "def f():\n    return x + g(x)\n"
    with pytest.raises(ConversionError, match="no module to hold the alpha"):
        edit(text, [site((operand(text, "x + g(x)", 1), "alpha"))], product, file=FILE)


def test_two_alphas_for_one_operand_are_an_error() -> None:
    text = method("return x + self.f(x)")
    at = operand(text, "x + self.f(x)", 1)
    with pytest.raises(ConversionError, match="two gates"):
        edit(text, [site((at, "alpha")), site((at, "alpha_f"))], product, file=FILE)


def test_an_activation_cannot_move_to_an_unknown_operand() -> None:
    text = method("return self.relu(x + self.ls(self.f(x)))")
    moved = operand(text, "self.relu(x + self.ls(self.f(x)))", 0)
    with pytest.raises(ConversionError, match="no operand"):
        edit(text, [site((None, "ls.gamma"), activation=moved, existing=True)], product, file=FILE)


def test_refused_sites_and_other_files_change_nothing() -> None:
    text = method("return x + self.f(x)")
    at = operand(text, "x + self.f(x)", 1)
    assert edit(text, [site((at, "alpha"), verdict="refused")], product, file=FILE) is text
    assert edit(text, [site((at, "alpha"))], product, file="other.py") is text
    assert edit(text, [site((at, "alpha"))], product, file=FILE, first_line=40) is text


# --- gates ---


@pytest.mark.parametrize(
    ("body", "part", "index", "expected"),
    [
        ("return x + self.f(x)", "x + self.f(x)", 1, "return x + self.alpha * self.f(x)"),
        ("return self.f(x) + x", "self.f(x) + x", 0, "return self.alpha * self.f(x) + x"),
        ("return x - self.f(x)", "x - self.f(x)", 1, "return x - self.alpha * self.f(x)"),
        ("return x + -self.f(x)", "x + -self.f(x)", 1, "return x + self.alpha * (-self.f(x))"),
        ("return x + 2 * self.f(x)", "x + 2 * self.f(x)", 1, "return x + self.alpha * (2 * self.f(x))"),
        ("return x + (self.f(x))", "x + (self.f(x))", 1, "return x + self.alpha * (self.f(x))"),
        ("return x + self.f(x) ** 2", "x + self.f(x) ** 2", 1, "return x + self.alpha * (self.f(x) ** 2)"),
        ("return x + self.f(x)[0]", "x + self.f(x)[0]", 1, "return x + self.alpha * self.f(x)[0]"),
        ("return x + await self.f(x)", "x + await self.f(x)", 1, "return x + self.alpha * await self.f(x)"),
        (
            "return x + (self.f(x) if self.on else x)",
            "x + (self.f(x) if self.on else x)",
            1,
            "return x + self.alpha * (self.f(x) if self.on else x)",
        ),
        ("x += self.f(x)", "x += self.f(x)", 1, "x += self.alpha * self.f(x)"),
        ("x -= self.f(x) + 1", "x -= self.f(x) + 1", 1, "x -= self.alpha * (self.f(x) + 1)"),
        ("x[:, 0] += self.f(x)", "x[:, 0] += self.f(x)", 1, "x[:, 0] += self.alpha * self.f(x)"),
        ("out += identity", "out += identity", 0, "out = self.alpha * out + identity"),
        ("out -= identity", "out -= identity", 0, "out = self.alpha * out - identity"),
        ("out += x + identity", "out += x + identity", 0, "out = self.alpha * out + (x + identity)"),
        ("out += 2 * identity", "out += 2 * identity", 0, "out = self.alpha * out + 2 * identity"),
        (
            "out += identity if x else out",
            "out += identity if x else out",
            0,
            "out = self.alpha * out + (identity if x else out)",
        ),
        ("torch.add(x, self.f(x))", "torch.add(x, self.f(x))", 1, "torch.add(x, self.alpha * self.f(x))"),
        (
            "return torch.add(x, other=self.f(x), alpha=2)",
            "torch.add(x, other=self.f(x), alpha=2)",
            "other",
            "return torch.add(x, other=self.alpha * self.f(x), alpha=2)",
        ),
        ("return operator.add(self.f(x), x)", "operator.add(self.f(x), x)", 0, None),
        ("return x.add(self.f(x))", "x.add(self.f(x))", 1, "return x.add(self.alpha * self.f(x))"),
        ("return x.add(other=self.f(x))", "x.add(other=self.f(x))", "other", None),
        ("return self.f(x).add_(x)", "self.f(x).add_(x)", 0, "return (self.alpha * self.f(x)).add_(x)"),
        ("return self.ff.add(x, self.f(x))", "self.ff.add(x, self.f(x))", 1, None),
        ("out.add_(identity)", "out.add_(identity)", 0, "out = self.alpha * out + identity"),
        ("out.sub_(identity)", "out.sub_(identity)", 0, "out = self.alpha * out - identity"),
        ("out.add_(self.f(x))", "out.add_(self.f(x))", 1, "out.add_(self.alpha * self.f(x))"),
        (
            "out.add_(identity, alpha=2)",
            "out.add_(identity, alpha=2)",
            0,
            "out = (self.alpha * out).add(identity, alpha=2)",
        ),
        ("return 3 * (x + self.f(x))", "x + self.f(x)", 1, "return 3 * (x + self.alpha * self.f(x))"),
    ],
)
def test_gate_forms(body: str, part: str, index: int | str, expected: str | None) -> None:
    if expected is None:
        expected = body.replace("self.f(x)", "self.alpha * self.f(x)")
    assert gated(body, part, index) == expected


def test_the_live_spelling_needs_no_parentheses() -> None:
    assert gated("return x + 2 * self.f(x)", "x + 2 * self.f(x)", 1, call) == (
        "return x + self.rezero_gate(self.alpha, 2 * self.f(x))"
    )
    assert gated("out.add_(identity, alpha=2)", "out.add_(identity, alpha=2)", 0, call) == (
        "out = self.rezero_gate(self.alpha, out).add(identity, alpha=2)"
    )


def test_self_is_what_the_method_calls_it() -> None:
    text = "class B:\n    def forward(me, /, x):\n        def run(y):\n            return y + me.f(y)\n\n"
    text += "        return run(x)\n"
    result = edit(text, [site((operand(text, "y + me.f(y)", 1), "alpha"))], product, file=FILE)
    assert "return y + me.alpha * me.f(y)" in result


def test_parallel_branches_in_one_sum() -> None:
    text = method("return x + self.a(x) + self.b(x)")
    inner = operand(text, "x + self.a(x)", 1)
    outer = operand(text, "x + self.a(x) + self.b(x)", 1)
    result = edit(text, [site((outer, "alpha_b"), (inner, "alpha_a"))], product, file=FILE)
    assert body_of(result) == "return x + self.alpha_a * self.a(x) + self.alpha_b * self.b(x)"


def test_a_block_inside_the_branch_of_a_block() -> None:
    text = method("return x + self.f(x + self.g(x))")
    inner = operand(text, "x + self.g(x)", 1)
    outer = operand(text, "x + self.f(x + self.g(x))", 1)
    result = edit(text, [site((outer, "alpha_f")), site((inner, "alpha_g"))], product, file=FILE)
    assert body_of(result) == "return x + self.alpha_f * self.f(x + self.alpha_g * self.g(x))"


def test_columns_are_bytes_and_lines_may_start_late() -> None:
    text = method('return self.say("Größe 📏") + x + self.f(x)')
    at = operand(text, 'self.say("Größe 📏") + x + self.f(x)', 1, first_line=90)
    result = edit(text, [site((at, "alpha"))], product, file=FILE, first_line=90)
    assert body_of(result) == 'return self.say("Größe 📏") + x + self.alpha * self.f(x)'


def test_a_chained_call_starts_at_its_attribute() -> None:
    text = method("y = (\n    self.f(x)\n    .reshape(3)\n    .add(x)\n)\nreturn y")
    full = span(text, "self.f(x)\n            .reshape(3)\n            .add(x)")
    attribute = span(text, "add(x)")
    recorded = Span(FILE, attribute.line, attribute.col, full.end_line, full.end_col)
    at = Operand(Place("m", "Block.forward", FILE, 1), recorded, 0, receiver=True)
    result = edit(text, [site((at, "alpha"))], call, file=FILE)
    assert (
        "y = (\n            self.rezero_gate(self.alpha, self.f(x)\n            .reshape(3))\n            .add(x)\n"
        in result
    )
    ast.parse(result)


def test_everything_else_is_byte_identical() -> None:
    text = "# odd   spacing\r\nclass   Block :\r\n\tdef forward( self,x ) :  # c\r\n"
    text += "\t\treturn x+self.f( x )   # sum\r\n\r\n\r\n#end"
    result = edit(text, [site((operand(text, "x+self.f( x )", 1), "alpha"))], product, file=FILE)
    assert result == text.replace("self.f( x )", "self.alpha * self.f( x )")


# --- norms ---


@pytest.mark.parametrize(
    ("body", "part", "index", "expected"),
    [
        ("return self.norm(x + self.f(x))", "self.norm(x + self.f(x))", 0, "return x + self.f(x)"),
        ("return self.norm(x + self.f(x)).view()", "self.norm(x + self.f(x))", 0, "return (x + self.f(x)).view()"),
        ("return 2 * self.norm(x + y)", "self.norm(x + y)", 0, "return 2 * (x + y)"),
        ("return self.f(self.norm(x + y))", "self.norm(x + y)", 0, "return self.f(x + y)"),
        ("return self.f(self.norm(x))", "self.norm(x)", 0, "return self.f(x)"),
        ("y = self.norm(z := self.f(x))", "self.norm(z := self.f(x))", 0, "y = (z := self.f(x))"),
        ("return F.layer_norm(x, (4,), eps=1e-5)", "F.layer_norm(x, (4,), eps=1e-5)", 0, "return x"),
        ("return F.layer_norm(input=x, eps=1)", "F.layer_norm(input=x, eps=1)", "input", "return x"),
        ("x = self.norm(x)\nreturn x", "self.norm(x)", 0, "return x"),
        ("x = self.norm(x)  # gone\nreturn x", "self.norm(x)", 0, "return x"),
        ("y = self.norm(x)\nreturn y", "self.norm(x)", 0, "y = x\nreturn y"),
        ("# normalize\nx = self.norm(x)\n# keep\nreturn x", "self.norm(x)", 0, "# keep\nreturn x"),
        ("a = 1\n\nx = self.norm(x)\n\nreturn x", "self.norm(x)", 0, "a = 1\n\nreturn x"),
        ("a = 1\n\nx = self.norm(x)\nreturn x", "self.norm(x)", 0, "a = 1\n\nreturn x"),
        ("# far\n\n# near\nx = self.norm(x)\nreturn x", "self.norm(x)", 0, "# far\n\nreturn x"),
        ("if x:\n    x = self.norm(x)\nreturn x", "self.norm(x)", 0, "if x:\n    pass\nreturn x"),
        ("if x: x = self.norm(x)\nreturn x", "self.norm(x)", 0, "if x: pass\nreturn x"),
        ("if x:\n    x = self.norm(x)\n    # why\nreturn x", "self.norm(x)", 0, "if x:\n    pass\n    # why\nreturn x"),
        ("y = 1; x = self.norm(x); z = 2", "self.norm(x)", 0, "y = 1; z = 2"),
        ("y = 1; x = self.norm(x)", "self.norm(x)", 0, "y = 1"),
        ("x: Tensor = self.norm(x)", "self.norm(x)", 0, "x: Tensor = x"),
        (
            "y = self.norm(\n    x  # here\n)",
            "self.norm(\n            x  # here\n        )",
            0,
            "y = (\n    x  # here\n)",
        ),
        (
            "x = self.norm(\n    x\n    + y\n)",
            "self.norm(\n            x\n            + y\n        )",
            0,
            "x = (x\n    + y)",
        ),
        ("y = self.norm(\n    x + y,\n)", "self.norm(\n            x + y,\n        )", 0, "y = x + y"),
    ],
)
def test_norm_forms(body: str, part: str, index: int | str, expected: str) -> None:
    text = method(body)
    assert body_of(edit(text, [site(norms=(operand(text, part, index),))], product, file=FILE)) == expected


def test_norms_one_in_the_other() -> None:
    text = method("x = self.n2(self.n1(x))\nreturn x")
    calls = (operand(text, "self.n2(self.n1(x))", 0), operand(text, "self.n1(x)", 0))
    assert body_of(edit(text, [site(norms=calls)], product, file=FILE)) == "return x"


def test_post_norm_block() -> None:
    text = method("x = self.norm(x + self.f(x))\nreturn x")
    gate = (operand(text, "x + self.f(x)", 1), "alpha")
    result = edit(text, [site(gate, norms=(operand(text, "self.norm(x + self.f(x))", 0),))], product, file=FILE)
    assert body_of(result) == "x = x + self.alpha * self.f(x)\nreturn x"


def test_norm_at_the_end_of_the_branch() -> None:
    text = method("return x + self.norm(self.f(x) + 1)")
    gate = (operand(text, "x + self.norm(self.f(x) + 1)", 1), "alpha")
    result = edit(text, [site(gate, norms=(operand(text, "self.norm(self.f(x) + 1)", 0),))], product, file=FILE)
    assert body_of(result) == "return x + self.alpha * (self.f(x) + 1)"


# --- activations ---


@pytest.mark.parametrize(
    ("body", "sum_part", "index", "act_part", "expected"),
    [
        (
            "out += identity\nout = self.relu(out)\nreturn out",
            "out += identity",
            0,
            "self.relu(out)",
            "out = self.alpha * self.relu(out) + identity\nreturn out",
        ),
        (
            "out += identity\nreturn self.relu(out)",
            "out += identity",
            0,
            "self.relu(out)",
            "out = self.alpha * self.relu(out) + identity\nreturn out",
        ),
        (
            "out = out + identity\nself.relu(out)\nreturn out",
            "out + identity",
            0,
            "self.relu(out)",
            "out = self.alpha * self.relu(out) + identity\nreturn out",
        ),
        (
            "out = out + identity\nout.relu_()\nreturn out",
            "out + identity",
            0,
            "out.relu_()",
            "out = self.alpha * out.relu_() + identity\nreturn out",
        ),
        (
            "return F.relu(x + self.f(x), inplace=True)",
            "x + self.f(x)",
            1,
            "F.relu(x + self.f(x), inplace=True)",
            "return x + self.alpha * F.relu(self.f(x), inplace=True)",
        ),
        (
            "return (x + 2 * self.f(x)).clamp(0)",
            "x + 2 * self.f(x)",
            1,
            "(x + 2 * self.f(x)).clamp(0)",
            "return x + self.alpha * (2 * self.f(x)).clamp(0)",
        ),
        (
            "return self.relu(\n    x + self.f(x),\n)",
            "x + self.f(x)",
            1,
            "self.relu(\n            x + self.f(x),\n        )",
            "return x + self.alpha * self.relu(self.f(x))",
        ),
        (
            "out.add_(identity).relu_()\nreturn out",
            "out.add_(identity)",
            0,
            "out.add_(identity).relu_()",
            "out = self.alpha * out.relu_() + identity\nreturn out",
        ),
        (
            "self.relu(out.add_(identity))\nreturn out",
            "out.add_(identity)",
            0,
            "self.relu(out.add_(identity))",
            "out = self.alpha * self.relu(out) + identity\nreturn out",
        ),
    ],
)
def test_activation_moves(body: str, sum_part: str, index: int, act_part: str, expected: str) -> None:
    text = method(body)
    act_index = 0
    made = site((operand(text, sum_part, index), "alpha"), activation=operand(text, act_part, act_index))
    assert body_of(edit(text, [made], product, file=FILE)) == expected


def test_activation_moves_below_an_existing_gate_without_a_new_one() -> None:
    text = method("return self.relu(x + self.ls(self.f(x)))")
    made = site(
        (operand(text, "x + self.ls(self.f(x))", 1), "ls.gamma"),
        activation=operand(text, "self.relu(x + self.ls(self.f(x)))", 0),
        existing=True,
    )
    assert body_of(edit(text, [made], product, file=FILE)) == "return x + self.relu(self.ls(self.f(x)))"


def test_editing_the_result_again_finds_nothing() -> None:
    text = method("out += identity\nout = self.relu(out)\nreturn out")
    made = site((operand(text, "out += identity", 0), "alpha"), activation=operand(text, "self.relu(out)", 0))
    once = edit(text, [made], product, file=FILE)
    with pytest.raises(ConversionError):
        edit(once, [made], product, file=FILE)


def test_activation_in_another_method_of_the_module() -> None:
    text = method("return x + self.f(x)")
    other = "class Block:\n    def run(self, x):\n        return F.relu(self.forward(x), inplace=True)\n"
    whole = text + "\n\n" + other
    register(FILE, whole)
    made = site(
        (operand(whole, "x + self.f(x)", 1), "alpha"),
        activation=operand(whole, "F.relu(self.forward(x), inplace=True)", 0),
    )
    assert body_of(edit(text, [made], product, file=FILE)) == "return x + self.alpha * F.relu(self.f(x), inplace=True)"
    first_line = text.count("\n") + 3
    edited = edit(other, [made], product, file=FILE, first_line=first_line)
    assert body_of(edited) == "return self.forward(x)"
    both = edit(whole, [made], product, file=FILE)
    assert both == edit(text, [made], product, file=FILE) + "\n\n" + edited

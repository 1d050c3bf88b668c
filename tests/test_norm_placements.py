"""`method="pre-norm"`, `"post-norm"` and `"gpt2-norm"`: norms moved, against twins written by hand and torch's own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import relatives
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rezero_convert as rz
from rezero_convert.options import options as make_options

METHODS = ("pre-norm", "post-norm", "gpt2-norm")
CHANGES = [(name, method) for name in ("pre", "post") for method in METHODS if method != f"{name}-norm"]


def placed(method: str, x: Tensor, branch: Callable[[Tensor], Tensor], norm: nn.Module) -> Tensor:
    if method == "pre-norm":
        return x + branch(norm(x))
    return norm(x + branch(x)) if method == "post-norm" else x + norm(branch(x))


def twin(net: Any, x: Tensor, method: str) -> Tensor:
    """What a Transformer of `relatives` computes with its norms at another place, by hand."""
    x = net.embed(x)
    for block in net.blocks:
        x = placed(method, x, lambda h, b=block: b.attn(h, h, h, need_weights=False)[0], block.norm1)
        x = placed(method, x, lambda h, b=block: b.fc2(F.gelu(b.fc1(h))), block.norm2)
    return net.head(x)


def gradients(model: nn.Module, run: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    y = run()
    model.zero_grad()
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return y.detach(), [parameter.grad.clone() for parameter in model.parameters()]


def reasons(model: nn.Module, x: Any, method: str) -> list[tuple[str, str]]:
    return [(site.code, site.reason) for site in rz.audit(model, x, method=method).plan.of("refused")]


# What is refused


@pytest.mark.parametrize("option", [{"alpha_init": 0.5}, {"drop_norm": "layer"}, {"share": "layer"}])
def test_there_is_no_gate_to_speak_of(option: dict[str, Any]) -> None:
    with pytest.raises(rz.ConversionError, match=f"moves the norms and makes no gates: no {next(iter(option))}"):
        rz.convert(*relatives.made("pre"), method="post-norm", **option)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "said"), [("resnet", "the block has several norms"), ("dense", "no norm that could")])
def test_networks_whose_norms_have_no_other_place(name: str, said: str, method: str) -> None:
    model, x = relatives.made(name)
    found = reasons(model, x, method)
    assert len(found) == 3
    assert all(code == "RZ919" and said in reason for code, reason in found)
    with pytest.warns(rz.NoEffectWarning, match=said):
        rz.convert(model, x, method=method)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other = nn.LayerNorm(4), nn.LayerNorm(4)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)


class Parallel(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + torch.tanh(self.a(h)) + torch.tanh(self.b(h))


class Sandwich(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.other(self.a(self.norm(x)))


class Inside(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.norm(self.a(x)))


class ReadTwice(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.norm(x)
        return x + torch.tanh(self.a(h)), h


class Factor(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * self.a(self.norm(x))


class Projected(Block):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x) + torch.tanh(self.a(self.norm(x)))


class Wrapped(nn.Module):
    """The norm is called in a module around the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.norm(x))


class Wrapping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Wrapped()

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(x))


class InPlaceReader(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(F.relu(self.norm(x), inplace=True))


class Reassigned(Block):
    def forward(self, x: Tensor) -> Tensor:
        norm = self.other
        h = torch.tanh(self.a(x))
        norm = self.norm
        return norm(x + h)


class Statement(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(self.norm(x)))
        h.add_(x)
        return h


class Expressions(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = x
        return self.norm(x + torch.tanh(self.a(x)) * self.b(y))


class Unordered(Block):
    """No one statement comes before what reads the stream."""

    def forward(self, x: Tensor, deep: bool = False) -> Tensor:
        if deep:
            h = self.a(x)
        else:
            h = self.b(x)
        return self.norm(x + torch.tanh(h * self.other.weight) * self.b(x))


@pytest.mark.parametrize(
    ("net", "method", "said"),
    [
        (Parallel, "post-norm", "several branches are added to one skip"),
        (Sandwich, "post-norm", "several norms (norm before the branch, other behind the branch)"),
        (Inside, "pre-norm", "norm stands between the layers of the branch"),
        (ReadTwice, "post-norm", "the output of norm is also read outside the branch"),
        (Factor, "gpt2-norm", "ends in a factor"),
        (Projected, "post-norm", "defined for an identity skip"),
        (Wrapping, "post-norm", "inner.norm is not called in the text of the method that adds"),
        (Statement, "post-norm", "a statement that works in place"),
        (InPlaceReader, "post-norm", "works in place, and would overwrite the stream"),
        (Reassigned, "pre-norm", "the call of the norm uses norm, which is set anew"),
        (Expressions, "pre-norm", "by several expressions"),
        (Unordered, "pre-norm", "no statement by itself comes before"),
    ],
)
def test_a_norm_that_cannot_be_moved_stays_with_the_reason(net: type[nn.Module], method: str, said: str) -> None:
    model, x = net(), torch.randn(2, 4)
    before = copy.deepcopy(model.state_dict())
    found = reasons(model, x, method)
    assert found
    assert all(code == "RZ919" and said in reason for code, reason in found), found
    with pytest.warns(rz.NoEffectWarning, match=r".*nothing was rewritten"):
        same = rz.convert(model, x, method=method)
    assert type(same) is net
    assert all(torch.equal(before[key], value) for key, value in same.state_dict().items())


def test_validation_notices_a_norm_elsewhere() -> None:
    model, x = relatives.made("pre")
    made = rz.convert(model, x, method="post-norm")
    assert rz.validate(made, x).ok
    block = made.blocks[1]
    block.forward = lambda x: block.norm2(x + block.fc2(block.norm1(x).repeat(1, 1, 2)))
    (failure, *_) = rz.validate(made, x).failures
    assert "placed" in failure
    assert "blocks.1.norm1 of blocks.1 is not where the method has it" in failure


# Twins


@pytest.mark.parametrize(("name", "method"), CHANGES)
def test_a_twin_computes_the_same(name: str, method: str) -> None:
    model, x = relatives.made(name)
    made = rz.convert(model, x, method=method)
    shell = copy.deepcopy(model)
    assert list(made.state_dict()) == list(model.state_dict())
    assert not list(rz.alphas(made))
    ours, own = gradients(made, lambda: made(x))
    theirs, others = gradients(shell, lambda: twin(shell, x, method))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for one, other in zip(own, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    assert (ours - model(x)).abs().max() > 0.01
    assert rz.validate(made, x).ok
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(again(x), made(x))
    assert rz.audit(made, x, method=method).counts["gated"] == 4
    with pytest.raises(rz.ConversionError, match=r"would not compute the same: 4 norms moved in \(blocks"):
        rz.original_state_dict(made)
    assert torch.equal(rz.unconvert(made)(x), model(x))


def encoder(first: bool, kind: str = "encoder") -> nn.Module:
    torch.manual_seed(0)
    made = {"encoder": nn.TransformerEncoderLayer, "decoder": nn.TransformerDecoderLayer}[kind]
    layer = made(8, 2, 16, 0.0, batch_first=True, norm_first=first, dtype=torch.float64)
    if kind == "decoder":
        return nn.TransformerDecoder(layer, 2)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize(("first", "method"), [(False, "pre-norm"), (True, "post-norm")])
def test_torch_s_own_norm_first(first: bool, method: str, kind: str) -> None:
    model, other = encoder(first, kind), encoder(not first, kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.rand_like(parameter))
    other.load_state_dict(model.state_dict())
    x = (torch.randn(2, 3, 8, dtype=torch.float64),) * (1 + (kind == "decoder"))
    made = rz.convert(model, x, method=method)
    for training in (True, False):
        assert torch.equal(made.train(training)(*x), other.train(training)(*x))
    with torch.no_grad():  # no fast path past the text
        torch.testing.assert_close(made(*x), other(*x), rtol=1e-12, atol=1e-12)
    assert rz.audit(other, x, method=method).counts["gated"] == (4 if kind == "encoder" else 6)


def test_the_path_that_did_not_run_moves_its_norms_too() -> None:
    model, x = encoder(first=True), torch.randn(2, 3, 8, dtype=torch.float64)
    made = rz.convert(model, x, method="gpt2-norm")
    before = made(x)
    for layer in made.layers:
        layer.norm_first = False
    assert torch.equal(made(x), before)


def test_bert_and_gpt2() -> None:
    from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

    torch.manual_seed(0)
    small: dict[str, Any] = {"vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = BertModel(BertConfig(**small, intermediate_size=16)).eval()
    ids = {"input_ids": torch.randint(0, 50, (1, 5))}
    made = rz.convert(bert, ids, method="gpt2-norm")
    layer, h = made.encoder.layer[0].output, torch.randn(1, 5, 8)
    f = torch.randn(1, 5, 16)
    assert torch.equal(layer(f, h), layer.LayerNorm(layer.dense(f)) + h)
    assert all("in another module" in reason for code, reason in reasons(bert, ids, "pre-norm") if code == "RZ919")
    gpt = GPT2Model(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=50)).eval()
    made = rz.convert(gpt, ids, method="post-norm")
    block = made.h[0]
    x = block.ln_1(h + block.attn(h)[0])
    torch.testing.assert_close(block(h), block.ln_2(x + block.mlp(x)))


@torch.no_grad()
def test_bart_becomes_mbart() -> None:
    """Whose layers are BART's with the norms before the branches."""
    from transformers import BartConfig, BartModel, MBartConfig, MBartModel

    torch.manual_seed(0)
    small: dict[str, Any] = {"vocab_size": 50, "d_model": 8, "encoder_layers": 2, "decoder_layers": 2}
    small |= {
        f"{part}_{what}": size
        for part in ("encoder", "decoder")
        for what, size in (("attention_heads", 2), ("ffn_dim", 16))
    }
    bart, mbart = BartModel(BartConfig(**small)).eval(), MBartModel(MBartConfig(**small)).eval()
    made = rz.convert(bart, {"input_ids": torch.randint(0, 50, (1, 5))}, method="pre-norm")
    h, memory = torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    for own, other in zip(made.encoder.layers, mbart.encoder.layers, strict=True):
        other.load_state_dict(own.state_dict())
        assert torch.equal(own(h, None), other(h, None))
    for own, other in zip(made.decoder.layers, mbart.decoder.layers, strict=True):
        other.load_state_dict(own.state_dict())
        assert torch.equal(own(h, encoder_hidden_states=memory), other(h, encoder_hidden_states=memory))


# Routes


DOORS = {
    "symbolic_trace": lambda model, x: torch.fx.symbolic_trace(copy.deepcopy(model)),
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.export's own
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(("name", "method"), CHANGES)
def test_a_graph_computes_what_the_twin_computes(name: str, method: str, door: str) -> None:
    model, x = relatives.made(name)
    made = rz.convert(DOORS[door](model.eval(), x), x, method=method)
    torch.testing.assert_close(made(x), twin(model, x, method), rtol=1e-10, atol=1e-10)
    assert made.state_dict().keys() == DOORS[door](model, x).state_dict().keys()
    assert torch.equal(copy.deepcopy(made)(x), made(x))
    torch.testing.assert_close(rz.unconvert(made)(x), model(x), rtol=1e-10, atol=1e-10)


def from_text(text: str) -> dict[str, Any]:
    space: dict[str, Any] = {"__name__": "rewritten"}
    exec(compile(text, "rewritten.py", "exec"), space)
    return space


@pytest.mark.parametrize("run", [True, False])
@pytest.mark.parametrize(("name", "method"), CHANGES)
def test_a_rewritten_file_computes_what_the_twin_computes(name: str, method: str, run: bool) -> None:
    file = Path(relatives.__file__)
    model, x = relatives.made(name)
    given = {"model": model, "example_inputs": x} if run else {}
    found = rz.convert_source(file.read_text(), file=str(file), method=method, **given)
    other = from_text(found.text)["made"](name)[0]
    torch.testing.assert_close(other(x), twin(model, x, method), rtol=1e-12, atol=1e-12)
    assert rz.validate(other, x, options=make_options(method=method)).ok
    with pytest.raises(rz.ConversionError, match="no gate to validate"):
        rz.validate(other, x)
    assert not rz.validate(model, x, options=make_options(method=method)).ok


def test_files_read_as_written_by_hand() -> None:
    text = Path(relatives.__file__).read_text()
    pre = rz.convert_source(text, method="pre-norm").text
    assert "        normed = self.norm1(x)\n        x = x + self.attn(normed, normed, normed, need_w" in pre
    assert "return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))" in pre
    post = rz.convert_source(text, method="post-norm").text
    assert "x = self.norm1(x + self.attn(h, h, h, need_weights=False)[0])" in post
    assert "return self.norm2(x + self.fc2(F.gelu(self.fc1(x))))" in post


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(self.norm(x)))
        h += x
        return torch.add(h, torch.tanh(self.b(self.other(h))))


class Method(Block):
    def run(self, y: Tensor, z: Tensor) -> Tensor:
        return torch.tanh(self.a(y) * self.b(y) * z)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.run(x, torch.ones(4)))


class Looped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer.norm(x + torch.tanh(layer.a(x)))
        return x


class Child(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return torch.tanh(self.a(x)) * self.b(x) * scale


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.child = nn.LayerNorm(4), Child()

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        residual = x
        x = self.child(x, mask=None, **options)
        return self.norm(residual + x)


@torch.no_grad()
def test_ways_to_write_a_block() -> None:
    x = torch.randn(2, 4)
    net = rz.convert(InPlace(), x, method="post-norm")
    h = net.norm(torch.tanh(net.a(x)) + x)
    torch.testing.assert_close(net(x), net.other(h + torch.tanh(net.b(h))))
    net = rz.convert(Method(), x, method="pre-norm")
    h = net.norm(x)
    torch.testing.assert_close(net(x), x + torch.tanh(net.a(h) * net.b(h)))
    for made in (rz.convert(Looped(), x, method="pre-norm"), rz.convert(Looped(), method="pre-norm")):
        y = x
        for layer in made.layers:
            y = y + torch.tanh(layer.a(layer.norm(y)))
        torch.testing.assert_close(made(x), y)
    net = rz.convert(Parent(), x, method="pre-norm")
    torch.testing.assert_close(net(x), x + net.child(net.norm(x)))


def test_a_note_tells_that_no_norm_is_left_before_the_head() -> None:
    model, x = relatives.made("post")
    (note,) = rz.audit(model, x, method="pre-norm").plan.notes
    assert "no norm stands behind the last block, blocks.1" in note
    assert not rz.audit(*relatives.made("pre"), method="post-norm").plan.notes
    model.head = nn.Sequential(nn.LayerNorm(8, dtype=torch.float64), model.head)
    assert not rz.audit(model, x, method="gpt2-norm").plan.notes


def test_a_note_tells_that_a_network_mixes_placements() -> None:
    net = nn.Sequential(Method(), Sandwich(), nn.LayerNorm(4))
    notes = rz.audit(net, torch.randn(2, 4), method="pre-norm").plan.notes
    assert notes == ("1 block of 2 could not be changed: the network mixes placements",)


def test_there_and_back() -> None:
    model, x = relatives.made("post")
    made = rz.convert(rz.convert(model, x, method="pre-norm"), x, method="post-norm")
    assert torch.equal(made(x), model(x))
    assert rz.validate(made, x).ok


def test_after_a_move_the_norms_can_be_dropped() -> None:
    model, x = relatives.made("post")
    made = rz.convert(rz.convert(model, x, method="pre-norm"), x, method="rezero")
    assert len(list(rz.alphas(made))) == 4
    assert rz.validate(made, x).ok
    h = torch.randn(2, 3, 8, dtype=torch.float64)
    assert torch.equal(made.blocks(h), h)

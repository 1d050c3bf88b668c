"""`method="highway"`: carry gates computed from the skip, against twins written by hand."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import relatives
import torch
from nets import Parallel, Walked
from test_norm_placements import DOORS, from_text
from torch import Tensor, nn
from torch.nn import functional as F

import rezero_convert as rz
from rezero_convert.options import options as make_options

GATES = {
    "resnet": ["alpha"] * 3,
    "pre": ["alpha_attn", "alpha_fc2"] * 2,
    "post": ["alpha_attn", "alpha_fc2"] * 2,
    "dense": ["alpha"] * 3,
}


def layers(model: Any) -> list[nn.Module]:
    """The layers of the gates, in the order in which they run."""
    return [getattr(block, name) for block in model.blocks for name in dict.fromkeys(GATES_OF[type(block).__name__])]


GATES_OF = {"Basic": ["alpha"], "Dense": ["alpha"], "Pre": GATES["pre"], "Post": GATES["post"]}


def join(layer: nn.Module, x: Tensor, f: Tensor) -> Tensor:
    """Srivastava et al. 2015, eq. 3."""
    weight, bias = layer.weight, layer.bias
    if x.dim() == 4:
        t = torch.sigmoid(torch.einsum("oi,bihw->bohw", weight[:, :, 0, 0], x) + bias[:, None, None])
    else:
        t = torch.sigmoid(x @ weight.T + bias)
    return t * f + (1 - t) * x


def twin(net: Any, x: Tensor, gates: list[nn.Module]) -> Tensor:
    """What a network of `relatives` computes with carry gates, by hand."""
    gate = iter(gates)
    x = F.relu(net.stem(x)) if hasattr(net, "stem") else net.embed(x)
    for block in net.blocks:
        if isinstance(block, relatives.Basic):
            f = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
            x = join(next(gate), x if block.down is None else block.down(x), F.relu(f))
        elif isinstance(block, relatives.Dense):
            x = join(next(gate), x, F.relu(block.fc(x)))
        elif isinstance(block, relatives.Pre):
            h = block.norm1(x)
            x = join(next(gate), x, block.attn(h, h, h, need_weights=False)[0])
            x = join(next(gate), x, block.fc2(F.gelu(block.fc1(block.norm2(x)))))
        else:
            x = block.norm1(join(next(gate), x, block.attn(x, x, x, need_weights=False)[0]))
            x = block.norm2(join(next(gate), x, block.fc2(F.gelu(block.fc1(x)))))
    return net.head(x.mean((2, 3)) if hasattr(net, "stem") else x)


# What is refused


class Expression(Parallel):
    def forward(self, x: Tensor) -> Tensor:
        return x.clone() + torch.tanh(self.a(x))


class Subtracted(Parallel):
    def forward(self, x: Tensor) -> Tensor:
        return x - torch.tanh(self.a(x))


class Helped(Parallel):
    def forward(self, x: Tensor) -> Tensor:
        return added(torch.tanh(self.a(x)), x)


def added(f: Tensor, x: Tensor) -> Tensor:
    return x + f


class Gated(Parallel):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((4,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * torch.tanh(self.a(x))


class Outer(nn.Module):
    """Channels in the third of four dimensions, where no layer of torch.nn reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None, :, None].expand(2, 3, 4, 5)
        return x + torch.tanh(self.a(x.transpose(2, 3))).transpose(2, 3)


class Moved(Parallel):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.a(x)).reshape(-1, 2, 2).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (Parallel, "several branches are added to one skip"),
        (Expression, "the skip is not a variable at the add"),
        (Helped, "the skip is not a variable at the add"),
        (Subtracted, "the branch is not added as it is"),
        (Walked, "each pass of the loop that adds would need a layer of its own"),
        (Gated, "has a gate already, gamma"),
        (Outer, "no layer of torch.nn has its channels in dimension 2 of 4"),
        (Moved, "reshape between the last weight"),
    ],
)
def test_blocks_without_a_place_for_a_carry_gate(net: type[nn.Module], said: str) -> None:
    (site,) = rz.audit(net(), torch.randn(2, 4), method="highway").plan.sites
    assert (site.verdict, site.code) == ("refused", "RZ919")
    assert said in site.reason
    with pytest.warns(rz.NoEffectWarning, match=said):
        rz.convert(net(), torch.randn(2, 4), method="highway")


def test_a_gate_for_each_channel_it_is() -> None:
    with pytest.raises(rz.ConversionError, match="a gate for each channel: no granularity 'scalar'"):
        rz.convert(*relatives.made("dense"), method="highway", granularity="scalar")


@pytest.mark.parametrize(
    "forward",
    [
        lambda block, x: x + block.alpha(x).sigmoid() * F.relu(block.fc(x)),
        lambda block, x: x + block.alpha(x).tanh() * (F.relu(block.fc(x)) - x),
        lambda block, x: x + block.alpha(2 * x).sigmoid() * (F.relu(block.fc(x)) - x),
        lambda block, x: x + block.alpha(x).sigmoid() * (F.relu(block.fc(x)) - 2 * x),
    ],
)
def test_validation_notices_another_form(forward: Any) -> None:
    model, x = relatives.made("dense")
    made = rz.convert(model, x, method="highway")
    assert rz.validate(made, x).ok
    block = made.blocks[1]
    block.forward = lambda x: forward(block, x)
    (failure, *_) = rz.validate(made, x).failures
    assert "carried" in failure
    assert "blocks.1.alpha carries no skip" in failure


# Twins


@pytest.mark.parametrize("name", GATES)
def test_a_twin_computes_the_same(name: str) -> None:
    model, x = relatives.made(name)
    made = rz.convert(model, x, method="highway").train()
    new = [key for key in made.state_dict() if key not in model.state_dict()]
    assert len(new) == 2 * len(GATES[name])
    with torch.no_grad():
        for layer in layers(made):
            assert set(layer.bias.tolist()) == {-3.0}
            layer.bias.uniform_(-1, 1)
    shell, gates = copy.deepcopy(model).train(), copy.deepcopy(nn.ModuleList(layers(made)))
    ours, theirs = made(x), twin(shell, x, list(gates))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    weigh = torch.linspace(-1, 1, ours.numel(), dtype=ours.dtype).view_as(ours)
    (ours * weigh).sum().backward()
    (theirs * weigh).sum().backward()
    for key, parameter in shell.named_parameters():
        torch.testing.assert_close(made.get_parameter(key).grad, parameter.grad, rtol=1e-8, atol=1e-10)
    for layer, gate in zip(layers(made), gates, strict=True):
        torch.testing.assert_close(layer.weight.grad, gate.weight.grad, rtol=1e-8, atol=1e-10)
        assert layer.weight.grad.any()
    assert rz.validate(made, x).ok
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(again.eval()(x), made.eval()(x))
    assert rz.audit(made, x, method="highway").counts["converted"] == 0
    back = rz.unconvert(made)
    assert list(back.state_dict()) == list(model.state_dict())
    back.load_state_dict(model.state_dict())
    assert torch.equal(back.eval()(x), model.eval()(x))


@torch.no_grad()
def test_blocks_start_near_the_identity() -> None:
    """sigmoid(-3) = 0.047 of what the weights make of nothing: the rest is the skip."""
    torch.manual_seed(0)
    model, _ = relatives.made("dense")
    block = rz.convert(model, torch.randn(5, 4).double(), method="highway").blocks[0]
    x = 1e-3 * torch.randn(1000, 8, dtype=torch.float64)
    f = F.relu(block.fc(x))
    share = (block(x) - x).norm() / (f - x).norm()
    assert abs(float(share) - 0.0474) < 0.001
    model = rz.convert(model, torch.randn(5, 4).double(), method="highway", alpha_init=-30)
    torch.testing.assert_close(model.blocks(x), x, rtol=0, atol=1e-9)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.export's own
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ["resnet", "pre"])
def test_a_graph_computes_what_the_model_computes(name: str, door: str) -> None:
    model, x = relatives.made(name)
    made = rz.convert(model.eval(), x, method="highway")
    other = rz.convert(DOORS[door](model, x), x, method="highway")
    other.load_state_dict(made.state_dict())
    torch.testing.assert_close(other(x), made(x), rtol=1e-10, atol=1e-10)
    assert torch.equal(copy.deepcopy(other)(x), other(x))
    assert rz.validate(other, x).ok
    torch.testing.assert_close(rz.unconvert(other)(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", GATES)
def test_a_rewritten_file_computes_what_the_model_computes(name: str) -> None:
    file = Path(relatives.__file__)
    model, x = relatives.made(name)
    found = rz.convert_source(file.read_text(), file=str(file), model=model, example_inputs=x, method="highway")
    other = from_text(found.text)["made"](name)[0]
    assert len(layers(other)) == len(GATES[name])
    made = rz.convert(model, x, method="highway")
    other.load_state_dict(made.state_dict())
    assert torch.equal(other.eval()(x), made.eval()(x))
    assert rz.validate(other, x, options=make_options(method="highway")).ok
    assert not rz.validate(model, x, options=make_options(method="highway")).ok


def test_a_file_by_itself() -> None:
    found = rz.convert_source(Path(relatives.__file__).read_text(), method="highway")
    assert "self.alpha = nn.Conv2d(self.conv2.out_channels, self.conv2.out_channels, 1)\n" in found.text
    assert "nn.init.constant_(self.alpha.bias, -3.0)\n" in found.text
    assert "return x + self.alpha(x).sigmoid() * (F.relu(self.fc(x)) - x)" in found.text
    assert "self.alpha_attn = nn.Linear(self.attn.embed_dim, self.attn.embed_dim)\n" in found.text
    assert not found.report.plan.of("refused")
    text = "from torch import nn\nfrom elsewhere import mix\n\n\nclass Block(nn.Module):\n    def __init__(self):\n"
    text += "        super().__init__()\n        self.w = nn.Parameter(mix())\n\n    def forward(self, x):\n"
    (site,) = rz.audit_source(text + "        return x + x @ self.w\n", method="highway").plan.sites
    assert site.code == "RZ915"
    assert "pass --model and --inputs" in site.reason


@torch.no_grad()
def test_without_inputs_the_layers_tell_the_width() -> None:
    for name in ("pre", "dense"):
        model, x = relatives.made(name)
        made, other = rz.convert(model, method="highway"), rz.convert(model, x, method="highway")
        made.load_state_dict(other.state_dict())
        torch.testing.assert_close(made(x), other(x))


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + x @ self.weight


def test_without_inputs_a_width_that_nothing_tells_is_asked_for() -> None:
    with pytest.warns(rz.NoEffectWarning, match="the shapes are not known: pass example inputs"):
        rz.convert(ByHand(), method="highway")


def test_one_gate_for_a_layer_of_two_branches() -> None:
    model, x = relatives.made("pre")
    made = rz.convert(model, x, method="highway", share="layer")
    assert {key for key in made.state_dict() if "alpha" in key} == {
        f"blocks.{number}.alpha.{name}" for number in range(2) for name in ("weight", "bias")
    }

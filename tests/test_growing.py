"""Deeper models: same outputs, living new blocks, working caches, optimizers that go on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from nets import Net
from torch import Tensor, nn
from zoo import BY_NAME, Block, call

import rezero_convert as rz


class Deep(Net):
    """A list of blocks between a stem and a head."""

    def __init__(self, depth: int = 3, **children: Any) -> None:
        super().__init__(
            stem=nn.Linear(8, 6), blocks=nn.ModuleList(Block(6) for _ in range(depth)), head=nn.Linear(6, 2), **children
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def trained(model: nn.Module, inputs: Any = X, scale: float = 0.3) -> nn.Module:
    model = rz.convert(model, inputs)
    for _, alpha in rz.alphas(model):
        nn.init.normal_(alpha, std=scale)
    return model


def values(model: nn.Module) -> list[float]:
    return [float(alpha.detach().mean()) for _, alpha in rz.alphas(model)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"factor": 1}, "factor must be"),
        ({"factor": 2.0}, "factor must be"),
        ({"where": "front"}, "where must be"),
        ({"weights": "new"}, "weights"),
        ({"blocks": "layers"}, "no module 'layers'"),
        ({"blocks": "head"}, "is a Linear, not a ModuleList"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    arguments = {"blocks": "blocks", "example_inputs": X, **options}
    with pytest.raises(rz.ConversionError, match=said):
        rz.grow(trained(Deep()), **arguments)


def test_an_optimizer_needs_the_model_itself() -> None:
    model = trained(Deep())
    with pytest.raises(rz.ConversionError, match="inplace=True"):
        rz.grow(model, "blocks", 2, X, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def test_unconverted_blocks_are_refused() -> None:
    with pytest.raises(rz.ConversionError, match=r"blocks\.0 has no gate"):
        rz.grow(Deep(), "blocks", 2, X)
    some = rz.convert(Deep(), X, exclude="blocks.1")
    with pytest.raises(rz.ConversionError, match=r"blocks\.1 has no gate"):
        rz.grow(some, "blocks", 2, X)


def test_blocks_that_change_the_shape_are_refused() -> None:
    case = BY_NAME["torchvision resnet18"]
    model = rz.convert(case.make(), case.inputs())
    with pytest.raises(rz.ConversionError, match=r"layer2\.0 has a projection as its skip"):
        rz.grow(model, "layer2", 2, case.inputs())


def test_blocks_with_more_than_gated_branches_are_refused_by_their_outputs() -> None:
    class More(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.tanh(x))

    model = Deep()
    model.blocks = nn.ModuleList(More(6) for _ in range(2))
    model = trained(model)
    before = list(model.blocks)
    with pytest.raises(rz.ConversionError, match="outputs are not those of before"):
        rz.grow(model, "blocks", 2, X, inplace=True)
    assert list(model.blocks) == before


def test_a_shared_gate_and_a_tied_block_are_refused() -> None:
    model = trained(Deep(2))
    model.blocks[1].alpha = model.blocks[0].alpha
    with pytest.raises(rz.ConversionError, match="shares a gate"):
        rz.grow(model, "blocks", 2, X)
    tied = Deep(1)
    tied.blocks.append(tied.blocks[0])
    with pytest.raises(rz.ConversionError, match="several places"):
        rz.grow(trained(tied), "blocks", 2, X)


def test_gates_in_a_list_beside_the_blocks_are_refused() -> None:
    class Beside(Net):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + torch.tanh(layer(x))
            return x

    model = trained(Beside(layers=nn.ModuleList(nn.Linear(8, 8) for _ in range(3))))
    with pytest.raises(rz.ConversionError, match=r"layers\.0 has no gate of its own"):
        rz.grow(model, "layers", 2, X)


def test_new_blocks_that_do_not_run_are_refused_and_nothing_is_left() -> None:
    class Counted(Deep):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for at in range(3):
                x = self.blocks[at](x)
            return self.head(x)

    model = trained(Counted())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before, plan, count = list(model.blocks), model.rezero_plan, len(optimizer.param_groups[0]["params"])
    with pytest.raises(rz.ConversionError, match="deeper model"):
        rz.grow(model, "blocks", 2, X, where="append", inplace=True, optimizer=optimizer)
    assert list(model.blocks) == before
    assert model.rezero_plan is plan
    assert len(optimizer.param_groups[0]["params"]) == count


@pytest.mark.parametrize("where", ["interleave", "append"])
@pytest.mark.parametrize("weights", ["copy", "fresh"])
@pytest.mark.parametrize("factor", [2, 3])
def test_outputs_stay_bit_identical_and_new_gates_are_zero(where: Any, weights: Any, factor: int) -> None:
    model = trained(Deep())
    old = values(model)
    deeper = rz.grow(model, "blocks", factor, X, where=where, weights=weights)
    assert torch.equal(deeper(X), model(X))
    assert len(model.blocks) == 3
    assert len(deeper.blocks) == 3 * factor
    zeros = [0.0] * (factor - 1)
    wanted = [one for value in old for one in (value, *zeros)] if where == "interleave" else [*old, *zeros * 3]
    assert values(deeper) == wanted
    at = 1 if where == "interleave" else 3
    assert torch.equal(deeper.blocks[at].linear.weight, model.blocks[0].linear.weight) == (weights == "copy")
    assert len({parameter.data_ptr() for parameter in deeper.parameters()}) == len(list(deeper.parameters()))


def test_weights_that_nothing_initializes_cannot_be_fresh() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.tanh(x @ self.matrix)

    model = Deep()
    model.blocks = nn.ModuleList([Own(), Own()])
    model = trained(model)
    with pytest.raises(rz.ConversionError, match="nothing initializes matrix anew"):
        rz.grow(model, "blocks", 2, X, weights="fresh")
    assert torch.equal(rz.grow(model, "blocks", 2, X)(X), model(X))


def test_the_new_blocks_learn_and_the_record_knows_them() -> None:
    deeper = rz.grow(trained(Deep()), "blocks", 2, X)
    names = [name for name, _ in rz.alphas(deeper)]
    assert names == [f"blocks.{at}.alpha" for at in range(6)]
    assert [site.path for site in rz.audit(deeper).plan.converted] == [f"blocks.{at}" for at in range(6)]
    assert rz.validate(deeper, X).ok
    optimizer = torch.optim.SGD(deeper.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        deeper(X).square().mean().backward()
        optimizer.step()
    assert all(value != 0 for value in values(deeper))
    assert all(bool(block.linear.weight.grad.any()) for block in deeper.blocks)


def test_what_grew_can_be_taken_back_copied_and_grown_again() -> None:
    deeper = rz.grow(rz.grow(trained(Deep()), "blocks", 2, X), "blocks", 2, X)
    assert len(list(rz.alphas(copy.deepcopy(deeper)))) == 12
    plain = rz.unconvert(deeper)
    assert not list(rz.alphas(plain))
    assert all(type(block) is Block for block in plain.blocks)


def test_a_sequential_grows() -> None:
    model = trained(Deep())
    model.blocks = nn.Sequential(*model.blocks)
    assert torch.equal(rz.grow(model, "blocks", 2, X)(X), model(X))


@pytest.mark.parametrize(
    "make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.Adafactor],
    ids=lambda make: str(make.__name__),
)  # fmt: skip
def test_an_optimizer_goes_on(make: Any) -> None:
    model = trained(Deep())
    optimizer = make(rz.param_groups(model, lr=0.01, alpha_lr=0.1))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)

    def step() -> None:
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
        schedule.step()

    step()
    old = dict(optimizer.state)
    rz.grow(model, "blocks", 2, X, inplace=True, optimizer=optimizer)
    assert all(optimizer.state[parameter] is state for parameter, state in old.items())
    weights, gates = optimizer.param_groups
    assert {id(one) for one in gates["params"]} == {id(alpha) for _, alpha in rz.alphas(model)}
    assert {id(one) for one in (*weights["params"], *gates["params"])} == {id(one) for one in model.parameters()}
    for _ in range(2):
        step()
    assert all(value != 0 for value in values(model))


@pytest.mark.parametrize(
    ("name", "path"), [("transformers gpt2", "transformer.h"), ("transformers llama", "model.layers")]
)
@pytest.mark.parametrize("where", ["interleave", "append"])
def test_caches_of_transformers_keep_working(name: str, path: str, where: Any) -> None:
    case = BY_NAME[name]
    inputs = case.inputs()
    model = trained(case.make(), inputs, 0.5).eval()
    deeper = rz.grow(model, path, 2, inputs, where=where, weights="fresh")
    blocks = deeper.get_submodule(path)
    assert deeper.config.num_hidden_layers == len(blocks) == 4
    assert model.config.num_hidden_layers == 2
    assert all(part.config is deeper.config for part in blocks.modules() if hasattr(part, "config"))
    indices = [part.layer_idx for block in blocks for part in block.modules() if hasattr(part, "layer_idx")]
    assert sorted(set(indices)) == indices == [0, 1, 2, 3]
    assert torch.equal(call(deeper, inputs), call(model, inputs))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "min_new_tokens": 6}
    for cached in (True, False):
        tokens = deeper.generate(**inputs, use_cache=cached, **options)
        assert torch.equal(tokens, model.generate(**inputs, use_cache=cached, **options))
    assert len(deeper(**inputs, use_cache=True).past_key_values.layers) == 4
    for _, alpha in rz.alphas(deeper):
        nn.init.normal_(alpha, std=0.5)
    whole = deeper(**inputs, use_cache=False).logits
    half = deeper(input_ids=inputs["input_ids"][:, :5], use_cache=True)
    rest = deeper(input_ids=inputs["input_ids"][:, 5:], past_key_values=half.past_key_values)
    torch.testing.assert_close(rest.logits, whole[:, 5:], rtol=1e-4, atol=1e-4)


def test_encoders_grow_afresh_and_a_configuration_of_two_depths_is_refused() -> None:
    transformers = pytest.importorskip("transformers")
    case = BY_NAME["transformer post-norm"]
    inputs = case.inputs()
    model = trained(case.make(), inputs).eval()
    deeper = rz.grow(model, "decoder.layers", 2, inputs, weights="fresh")
    assert torch.equal(deeper(*inputs), model(*inputs))
    assert len(list(rz.alphas(deeper))) == case.blocks + 2 * 3
    options = {"num_layers": 2, "d_model": 16, "num_heads": 2, "d_ff": 32, "d_kv": 8, "vocab_size": 99}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(decoder_start_token_id=0, **options))
    tokens = {"input_ids": torch.tensor([[3, 4, 5]]), "decoder_input_ids": torch.tensor([[6, 7]])}
    with pytest.raises(rz.ConversionError, match="two depths"):
        rz.grow(rz.convert(t5, tokens), "encoder.block", 2, tokens)


def test_timm_grows_without_inputs() -> None:
    timm = pytest.importorskip("timm")
    model = trained(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2), torch.randn(2, 3, 32, 32)).eval()
    deeper = rz.grow(model, "blocks", 2)
    assert len(list(rz.alphas(deeper))) == 2 * 4

"""The oracles of the design, on models that others wrote: equality, identity, liveness, count, idempotence, twins."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
from typing import Any

import pytest
import torch
import zoo
from torch import nn

import rezero_convert as rz

CASES = [pytest.param(case, id=case.name) for case in zoo.CASES]


@pytest.fixture(autouse=True)
def _unfused() -> Any:
    """torch.nn's fused attention differs from its own unfused form by rounding: off on both sides."""
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


def run(model: nn.Module, inputs: Any, *, train: bool) -> torch.Tensor:
    model.train(train)
    torch.manual_seed(1)
    return zoo.call(model, inputs)


@pytest.mark.parametrize("case", CASES)
def test_preserve_mode_is_bit_identical(case: zoo.Case) -> None:
    model, inputs = case.make(), case.inputs()
    converted = rz.convert(model, inputs, alpha_init="preserve", verify=False)
    assert len(list(rz.alphas(converted))) == case.blocks
    for train in (False, True):
        twins = [copy.deepcopy(one) for one in (model, converted)]  # batch statistics move in train mode
        outputs = [run(twin, inputs, train=train) for twin in twins]
        assert torch.equal(*outputs)
        for output in outputs:
            output.square().mean().backward()
        grads = dict(twins[1].named_parameters())
        for name, parameter in twins[0].named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(grads[name].grad, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_conversion_holds(case: zoo.Case) -> None:
    model, inputs = case.make(), case.inputs()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    converted = rz.convert(model, inputs)  # verified
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    alphas = dict(rz.alphas(converted))
    assert len(alphas) == case.blocks
    assert not any(alpha.any() for alpha in alphas.values())
    assert all(alpha.shape == (1,) for name, alpha in alphas.items() if "alpha" in name)
    kept = dict(converted.named_modules())
    assert all(isinstance(kept[path], type(module)) for path, module in model.named_modules() if path in kept
               and not isinstance(kept[path], nn.Identity))  # fmt: skip
    report = rz.audit(converted).to_dict()
    expected = set(before) - {f"{n['path']}.{k}" for s in report["sites"] for n in s["norms"] if n["action"] != "keep"
                              for k in ("weight", "bias")} | set(alphas)  # fmt: skip
    added = {name for name in converted.state_dict() if name not in before}
    assert added <= set(alphas)
    assert expected == set(converted.state_dict())


@pytest.mark.parametrize("case", CASES)
def test_converting_twice_changes_nothing(case: zoo.Case) -> None:
    inputs = case.inputs()
    converted = rz.convert(case.make(), inputs, verify=False)
    for _, alpha in rz.alphas(converted):
        nn.init.constant_(alpha, 0.25)
    with pytest.warns(rz.NoEffectWarning, match="gated already"):
        again = rz.convert(converted, inputs)
    assert {name: value.tolist() for name, value in again.state_dict().items() if "alpha" in name} == {
        name: value.tolist() for name, value in converted.state_dict().items() if "alpha" in name
    }
    assert [type(module) for module in again.modules()] == [type(module) for module in converted.modules()]


@pytest.mark.parametrize("case", CASES)
def test_copies_and_pickles_behave_alike(case: zoo.Case) -> None:
    inputs = case.inputs()
    converted = rz.convert(case.make(), inputs, verify=False)
    for _, alpha in rz.alphas(converted):
        nn.init.normal_(alpha)
    expected = run(converted, inputs, train=False)
    stream = io.BytesIO()
    torch.save(converted, stream)
    stream.seek(0)
    for other in (
        copy.deepcopy(converted),
        pickle.loads(pickle.dumps(converted)),
        torch.load(stream, weights_only=False),
    ):
        assert torch.equal(run(other, inputs, train=False), expected)
        assert len(list(rz.alphas(other))) == case.blocks


@pytest.mark.parametrize("name", ["transformers gpt2", "transformers llama"])
def test_generate_still_runs(name: str) -> None:
    case = zoo.BY_NAME[name]
    model, inputs = case.make().eval(), case.inputs()
    preserved = rz.convert(model, inputs, alpha_init="preserve").eval()
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(model.generate(**inputs, **options), preserved.generate(**inputs, **options))
    assert rz.convert(model, inputs).eval().generate(**inputs, **options).shape == (2, 13)


def _in_child(data: bytes, inputs: torch.Tensor, queue: Any) -> None:
    queue.put(pickle.loads(data)(inputs).detach().numpy())


def test_a_converted_model_survives_being_sent_to_another_process() -> None:
    inputs = torch.randn(2, 8)
    converted = rz.convert(zoo.stack(3), inputs)
    for _, alpha in rz.alphas(converted):
        nn.init.normal_(alpha)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(pickle.dumps(converted), inputs, queue))
    child.start()
    received = queue.get(timeout=120)
    child.join()
    assert torch.equal(torch.from_numpy(received), converted(inputs))


# Hand-written twins


class ReZeroBasicBlock(nn.Module):
    """The authors' residual block, after their CIFAR code: the ReLU inside the branch, then the gate."""

    def __init__(self, block: Any, alpha: torch.Tensor) -> None:
        super().__init__()
        self.block, self.alpha = block, alpha

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b = self.block
        shortcut = x if b.downsample is None else b.downsample(x)
        return shortcut + self.alpha * torch.relu(b.bn2(b.conv2(torch.relu(b.bn1(b.conv1(x))))))


def test_resnet_equals_a_handwritten_rezero_resnet() -> None:
    case = zoo.BY_NAME["torchvision resnet18"]
    model, inputs = case.make().eval(), case.inputs()
    converted = rz.convert(model, inputs).eval()
    twin = copy.deepcopy(model)
    alphas = dict(rz.alphas(converted))
    for layer in ("layer1", "layer2", "layer3", "layer4"):
        for index in ("0", "1"):
            alpha = alphas[f"{layer}.{index}.alpha"]
            nn.init.normal_(alpha)
            blocks = getattr(twin, layer)
            blocks[int(index)] = ReZeroBasicBlock(blocks[int(index)], alpha.detach())
    torch.testing.assert_close(converted(inputs), twin(inputs))


def test_encoder_layer_equals_a_handwritten_rezero_layer() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    converted = rz.convert(layer, x).eval()
    nn.init.constant_(converted.alpha_self_attn, 0.3)
    nn.init.constant_(converted.alpha_linear2, -0.7)
    attended = x + 0.3 * layer.self_attn(x, x, x, need_weights=False)[0]
    expected = attended - 0.7 * layer.linear2(torch.relu(layer.linear1(attended)))
    torch.testing.assert_close(converted(x), expected)


def test_gpt_block_equals_a_handwritten_rezero_block() -> None:
    case = zoo.BY_NAME["transformers gpt2"]
    model, inputs = case.make().eval(), case.inputs()
    converted = rz.convert(model, inputs).eval()
    for _, alpha in rz.alphas(converted):
        nn.init.normal_(alpha)
    body, alphas = model.transformer, dict(rz.alphas(converted))
    ids = inputs["input_ids"]
    x = body.wte(ids) + body.wpe(torch.arange(ids.shape[1]))
    for index, block in enumerate(body.h):
        x = x + alphas[f"transformer.h.{index}.alpha_attn"] * _causal_attention(block.attn, x)
        x = x + alphas[f"transformer.h.{index}.alpha_mlp"] * block.mlp(x)
    torch.testing.assert_close(converted(**inputs).logits, model.lm_head(body.ln_f(x)), rtol=1e-4, atol=1e-5)


def _causal_attention(attention: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (
        part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in attention.c_attn(x).chunk(3, dim=-1)
    )
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), -torch.inf)
    return attention.c_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


# The fused fast path of torch.nn


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("mask", [None, "causal", "padding"])
def test_gates_take_effect_in_eval_without_gradients(norm_first: bool, batch_first: bool, mask: str | None) -> None:
    torch.backends.mha.set_fastpath_enabled(True)
    layer = nn.TransformerEncoderLayer(16, 2, 32, norm_first=norm_first, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    x = torch.randn(3, 5, 16) if batch_first else torch.randn(5, 3, 16)
    options: dict[str, Any] = {}
    if mask == "causal":
        options = {"mask": nn.Transformer.generate_square_subsequent_mask(5), "is_causal": True}
    elif mask == "padding":
        options = {"src_key_padding_mask": torch.tensor([[False] * 5, [False] * 5, [False] * 3 + [True] * 2])}
    converted = rz.convert(model, {"src": x, **options}).eval()
    with torch.no_grad():
        assert torch.equal(converted(x, **options), x)
        nn.init.constant_(converted.layers[1].alpha_linear2, 0.5)
        changed = converted(x, **options)
    assert not torch.equal(changed, x)
    with torch.enable_grad():
        torch.testing.assert_close(converted(x, **options), changed)

"""The spectrum of the residual stream, against closed forms, known spectra and the authors' published values."""

from __future__ import annotations

import copy
import json
import math
from statistics import mean
from typing import Any

import pytest
import torch
from nets import Net
from torch import Tensor, nn
from toys import toy
from zoo import BY_NAME, Block, stack

import rezero_convert as rz


class Scaled(nn.Module):
    """x + scale * W x."""

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.linear(x)


def test_a_model_without_residual_blocks_is_refused() -> None:
    with pytest.raises(rz.ConversionError, match="no residual block"):
        rz.isometry(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(1, 4))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"stream": 1}, "no residual stream 1"),
        ({"method": "guess"}, "method must be"),
        ({"probes": 1}, "at least 2 probes"),
        ({"steps": 0}, "1 step"),
        ({"bin_width": 0.0}, "bin_width"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(rz.ConversionError, match=said):
        rz.isometry(stack(2), torch.randn(1, 8), **options)


def test_a_model_that_raises_is_told() -> None:
    with pytest.raises(rz.ConversionError, match="raised on the inputs"):
        rz.isometry(stack(2), torch.randn(1, 7))


def test_a_stream_without_gradients_is_refused() -> None:
    class Frozen(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return self.body(x) * 1.0

    with pytest.raises(rz.ConversionError, match="no gradient"):
        rz.isometry(Frozen(body=nn.Sequential(Block(4), Block(4))), torch.randn(1, 4))


def test_linear_blocks_have_the_product_of_their_matrices() -> None:
    model = nn.Sequential(Scaled(6), Scaled(6, 0.5)).double()
    product = torch.eye(6, dtype=torch.float64)
    for block in model:
        product = (torch.eye(6) + block.scale * block.linear.weight.detach()) @ product
    wanted = torch.linalg.svdvals(product)
    result = rz.isometry(model, torch.randn(1, 6, dtype=torch.float64))
    torch.testing.assert_close(torch.tensor(result.singular_values, dtype=torch.float64), wanted)
    assert result.mean_squared == pytest.approx(float(wanted.square().mean()))
    assert result.mean_squared_error == 0.0
    assert result.largest == pytest.approx(float(wanted[0]))


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("encoder post-norm", "exact"),
        ("transformer post-norm", "exact"),
        ("fc stack", "lanczos"),
        ("transformers gpt2", "lanczos"),
        ("transformers llama", "lanczos"),
        pytest.param("timm vit_tiny", "lanczos", marks=pytest.mark.slow),
    ],
)
def test_alpha_zero_gives_exactly_one(name: str, method: Any) -> None:
    case = BY_NAME[name]
    inputs = case.inputs()
    result = rz.isometry(rz.convert(case.make(), inputs), inputs, method=method, probes=2, steps=1)
    if method == "exact":
        assert result.mean_squared == 1.0
        assert set(result.singular_values) == {1.0}
    assert result.mean_squared == pytest.approx(1.0, abs=1e-6)
    assert result.median == pytest.approx(1.0, abs=1e-6)
    assert all(block.share == 0.0 and block.branch_variance == 0.0 for block in result.blocks)
    (bar,) = result.histogram
    assert bar.low < 0.0 < bar.high
    assert bar.share == pytest.approx(1.0)


def test_the_same_model_before_its_conversion_is_no_isometry() -> None:
    result = rz.isometry(stack(20), torch.randn(1, 8))
    assert result.mean_squared > 10
    assert len(result.blocks) == 20
    assert min(block.share for block in result.blocks) > 0.01


def test_lanczos_agrees_with_the_whole_spectrum_within_its_error_bars() -> None:
    model, x = toy("pre", 1, seed=1), torch.randn(1, 4, 16)
    whole = rz.isometry(model, x)
    some = rz.isometry(model, x, method="lanczos", probes=16, steps=24)
    assert whole.method == "exact"
    assert abs(some.mean_squared - whole.mean_squared) < 4 * some.mean_squared_error
    assert 0 < some.mean_squared_error < 0.2 * whole.mean_squared
    assert some.largest == pytest.approx(whole.largest, rel=1e-4)
    assert some.median == pytest.approx(whole.median, rel=0.1)
    shares = {bar.low: bar.share for bar in whole.histogram}
    for bar in some.histogram:
        assert abs(bar.share - shares.get(bar.low, 0.0)) < 4 * bar.error + 0.02
    assert not some.singular_values


def test_directions_that_are_lost_count_as_zeros() -> None:
    class Narrow(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.second(x[:, :2])

    result = rz.isometry(rz.convert(Narrow(first=Block(6), second=Block(2)), torch.randn(9, 6)), torch.randn(1, 6))
    assert result.singular_values == (1.0, 1.0, 0.0, 0.0, 0.0, 0.0)
    assert result.zero == pytest.approx(2 / 3)
    assert result.mean_squared == pytest.approx(1 / 3)
    assert result.zero + sum(bar.share for bar in result.histogram) == pytest.approx(1.0)


def test_a_kept_post_norm_forgets_mean_and_length() -> None:
    x = torch.randn(1, 3, 16)
    model = rz.convert(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2), x, drop_norm="none")
    result = rz.isometry(model, x)
    assert result.zero == pytest.approx(3 * 2 / 48)
    assert result.singular_values[-6] < result.floor < 0.1 < result.singular_values[-7]


def test_the_post_norm_of_the_last_block_belongs_to_the_stream() -> None:
    model, x = toy("post", 2, seed=0), torch.randn(1, 4, 16)
    before = rz.isometry(model, x).mean_squared
    last: Any = model[-1]
    last.norm2.weight.data.mul_(2)
    assert rz.isometry(model, x).mean_squared == pytest.approx(4 * before, rel=1e-5)


def test_the_head_does_not_belong_to_the_stream() -> None:
    model, x = stack(3), torch.randn(1, 8)
    before = rz.isometry(model, x)
    model[-1].weight.data.mul_(5)
    model[0].bias.data.zero_()
    assert rz.isometry(model, x).shape == before.shape == (1, 16)
    assert before.stream == ("1", "3")


def test_encoder_and_decoder_are_two_streams() -> None:
    case = BY_NAME["transformer pre-norm"]
    model, inputs = case.make(), case.inputs()
    encoder = rz.isometry(model, inputs, stream=0, method="lanczos", probes=2)
    decoder = rz.isometry(model, inputs, method="lanczos", probes=2)
    assert (len(encoder.blocks), len(decoder.blocks)) == (4, 6)
    assert (encoder.shape, decoder.shape) == ((2, 5, 16), (2, 4, 16))
    assert decoder.notes


def test_resnets_have_projections_on_their_stream() -> None:
    case = BY_NAME["torchvision resnet18"]
    result = rz.isometry(case.make(), torch.randn(1, 3, 32, 32), probes=2, steps=4)
    assert result.method == "lanczos"
    assert len(result.blocks) == 8
    assert result.mean_squared > 0


def test_share_and_variances_are_those_of_the_tensors() -> None:
    block = Scaled(4)
    block.linear.weight.data = torch.eye(4)
    x = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    (row,) = rz.isometry(block, x).blocks
    assert row.share == 0.5
    assert row.skip_variance == row.branch_variance == pytest.approx(3.5)
    assert row.variance == pytest.approx(14.0)


def test_the_model_is_left_as_it_was() -> None:
    model = BY_NAME["torchvision resnet18"].make().train()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    rz.isometry(model, torch.randn(2, 3, 32, 32, generator=torch.Generator()), probes=2, steps=2, training=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_result_is_data_and_prints() -> None:
    result = rz.isometry(stack(3), torch.randn(1, 8), method="lanczos")
    assert json.loads(json.dumps(result.to_dict()))["mean_squared"] == result.mean_squared
    assert "mean squared singular value" in str(result)
    assert "+-" in str(result)
    with pytest.raises(AttributeError):
        result.zero = 1.0  # type: ignore[misc]  # frozen


def spectra(kind: Any, depth: int, seeds: int) -> tuple[float, float]:
    """Mean squared singular value, and log10 of the median one, averaged over seeds."""
    x = torch.randn(1, 4, 16, dtype=torch.float64)
    results = [rz.isometry(toy(kind, depth, seed).double(), x) for seed in range(seeds)]
    medians = [math.log10(max(one.median, 1e-30)) for one in results]
    return mean(one.mean_squared for one in results), mean(medians)


def test_the_notebooks_values_at_12_layers() -> None:
    post, pre, ours = (spectra(kind, 12, 2) for kind in ("post", "pre", "rezero"))
    assert 0.2 < post[0] < 5  # published .810, measured before 1.7
    assert 5 < pre[0] < 30  # 10.2, 12.5
    assert 1.0 < ours[0] < 1.2  # 1.06, 1.07
    assert -2.5 < post[1] < -1  # measured before: -1.4


@pytest.mark.slow
def test_the_notebooks_values_at_128_layers() -> None:
    post, pre, ours = (spectra(kind, 128, 2) for kind in ("post", "pre", "rezero"))
    assert post[0] < 0.2  # published .000, measured before .13
    assert 30 < pre[0] < 1000  # 66.3, 118
    assert 1.7 < ours[0] < 3  # 2.14, 2.23
    assert post[1] < -7  # measured before: -9.2


def test_alpha_zero_at_64_layers_gives_one() -> None:
    result = rz.isometry(toy("rezero", 64, 0, alpha=0.0), torch.randn(1, 4, 16), method="lanczos", probes=2, steps=2)
    assert result.mean_squared == pytest.approx(1.0, abs=1e-6)

"""Checkpoints of originals and of converted models, those of transformers among them; resets that spare the gates."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Linears, Net, W, vectors
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    Dinov2Config,
    Dinov2Model,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    VisionTextDualEncoderModel,
)

import rezero_convert as rz
from rezero_convert.validation import Check, Validation

IDS = torch.arange(16).reshape(2, 8)


def gpt2(layers: int = 2) -> GPT2LMHeadModel:
    special = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(n_layer=layers, n_embd=32, n_head=2, vocab_size=64, n_positions=32, **special))


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))


def bert() -> BertModel:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertModel(BertConfig(vocab_size=64, max_position_embeddings=32, **sizes))


def dino() -> Dinov2Model:
    return Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8)
    )


def moved(model: Any, value: float = 0.3) -> Any:
    """With gates that are neither 0 nor 1."""
    with torch.no_grad():
        for number, (_, alpha) in enumerate(rz.alphas(model)):
            alpha.fill_(value + number / 16)
    return model


def run(model: nn.Module) -> Tensor:
    model.eval()
    inputs = torch.ones(1, 3, 16, 16) if getattr(model, "main_input_name", "") == "pixel_values" else IDS
    with torch.no_grad():
        return model(inputs)[0]


class PreNorm(Net):
    def __init__(self) -> None:
        super().__init__(norm=nn.LayerNorm(W), a=nn.Linear(W, W), gamma=nn.Parameter(torch.full((W,), 0.5)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(self.norm(x))
        return x + self.gamma * self.a(x)


class ZeroLast(Linears):
    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.b.weight)
        nn.init.zeros_(self.b.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.relu(self.a(x)))


# --- the original's checkpoint ---


def test_a_state_that_is_not_the_originals_is_refused_and_nothing_is_loaded() -> None:
    model = rz.convert(PreNorm(), vectors())
    state = PreNorm().state_dict()
    before = copy.deepcopy(model.state_dict())
    without = {key: value for key, value in state.items() if key != "a.bias"}
    for wrong, message in (
        ({**state, "head.weight": torch.ones(1)}, r"1 key neither the model's .*: head.weight"),
        (without, r"1 key missing, and not made by the conversion: a.bias"),
        ({**state, "a.bias": torch.ones(W + 1)}, r"1 key of another shape in the model: a.bias"),
    ):
        with pytest.raises(rz.ConversionError, match=message):
            rz.load_original_state_dict(model, wrong)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_models_that_are_not_converted_or_are_folded_are_refused() -> None:
    with pytest.raises(rz.ConversionError, match="not a converted model"):
        rz.load_original_state_dict(PreNorm(), PreNorm().state_dict())
    with pytest.raises(rz.ConversionError, match="not a converted model"):
        rz.original_state_dict(PreNorm())
    folded = rz.fold(moved(rz.convert(gpt2(), IDS)), IDS)
    with pytest.raises(rz.ConversionError, match="folded into its weights"):
        rz.load_original_state_dict(folded, gpt2().state_dict())


def test_every_key_is_accounted_for() -> None:
    model, state = rz.convert(PreNorm(), vectors()), PreNorm().state_dict()
    done = rz.load_original_state_dict(model, state)
    assert done.dropped == ("norm.weight", "norm.bias")
    assert done.held == ("gamma",)
    assert set(done.new) == {name for name, _ in rz.alphas(model)} - {"gamma"}
    assert {*done.loaded, *done.dropped, *done.held} == set(state)
    assert torch.equal(model.a.weight, state["a.weight"])
    assert not model.gamma.any()
    assert "norms that the conversion dropped: norm.weight, norm.bias" in str(done)
    assert json.loads(json.dumps(done.to_dict()))["held"] == ["gamma"]


def test_a_zero_that_was_undone_is_not_loaded_again_but_a_trained_weight_is() -> None:
    model = rz.convert(ZeroLast(), vectors())
    assert rz.load_original_state_dict(model, ZeroLast().state_dict()).held == ("b.weight",)
    assert model.b.weight.any()
    trained = {**ZeroLast().state_dict(), "b.weight": torch.ones(W, W)}
    assert rz.load_original_state_dict(model, trained).held == ()
    assert torch.equal(model.b.weight, torch.ones(W, W))


@pytest.mark.parametrize("make", [gpt2, llama, bert, dino])
def test_preserve_mode_with_the_originals_checkpoint_is_the_original(make: Any) -> None:
    trained = make()
    model = rz.convert(make(), alpha_init="preserve")
    done = rz.load_original_state_dict(model, trained.state_dict())
    assert done.dropped == done.held == ()
    assert torch.equal(run(model), run(trained))


def test_tied_weights_may_be_absent() -> None:
    trained = gpt2()
    state = {key: value for key, value in trained.state_dict().items() if key != "lm_head.weight"}
    model = rz.convert(gpt2(), alpha_init="preserve")
    rz.load_original_state_dict(model, state)
    assert torch.equal(run(model), run(trained))


# --- and the other way round ---


def test_what_the_original_would_not_compute_is_refused() -> None:
    for model, message in (
        (rz.convert(PreNorm(), vectors()), r"1 gate not at 1 \(alpha\w*\); 1 norm dropped \(norm\)"),
        (moved(rz.convert(gpt2(), alpha_init="preserve")), r"4 gates not at 1 \(transformer.h.\{0,1\}.alpha_attn"),
    ):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(rz.ConversionError, match=message):
            rz.original_state_dict(model)
        with pytest.warns(UserWarning, match=message):
            state = rz.original_state_dict(model, lossy=True)
        original = PreNorm() if isinstance(model, PreNorm) else gpt2()
        assert list(state) == list(original.state_dict())
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_activation_that_moved_is_a_loss() -> None:
    class After(Linears):
        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(x + self.a(x))

    model = rz.convert(After(), vectors(), alpha_init=1.0)
    with pytest.raises(rz.ConversionError, match=r"1 activation moved into the branch of \(the model\)"):
        rz.original_state_dict(model)


@pytest.mark.parametrize("make", [gpt2, llama, bert, dino])
def test_a_folded_model_goes_back_into_the_original(make: Any) -> None:
    model = moved(rz.convert(make(), alpha_init="preserve"))
    state = rz.original_state_dict(rz.fold(model))
    original = make()
    original.load_state_dict(state)
    torch.testing.assert_close(run(original), run(model))


# --- transformers ---


@pytest.mark.parametrize("options", [{}, {"alpha_init": "preserve"}, {"include": "*.1*", "drop_norm": "none"}])
@pytest.mark.parametrize("make", [gpt2, bert, dino])
def test_save_and_load_again(make: Any, options: dict[str, Any], tmp_path: Path) -> None:
    model = moved(rz.convert(make(), **options))
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded, info = rz.from_pretrained(type(make()), tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert isinstance(loaded, type(make()))
    assert dict(rz.alphas(loaded)).keys() == dict(rz.alphas(model)).keys()
    assert torch.equal(run(loaded), run(model))
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert torch.equal(run(rz.from_pretrained(type(make()), again)), run(model))


def test_auto_classes_types_and_places(tmp_path: Path) -> None:
    model = moved(rz.convert(llama()))
    model.save_pretrained(tmp_path)
    loaded = rz.from_pretrained(AutoModelForCausalLM, tmp_path, dtype=torch.bfloat16, device_map={"": "cpu"})
    assert isinstance(loaded, LlamaForCausalLM)
    assert {alpha.dtype for _, alpha in rz.alphas(loaded)} == {torch.bfloat16}
    torch.testing.assert_close(run(loaded).float(), run(model), atol=0.05, rtol=0.05)
    assert torch.equal(loaded.generate(IDS[:1], max_new_tokens=3, do_sample=False)[:, :8], IDS[:1])


def test_two_conversions_are_made_again_in_their_order(tmp_path: Path) -> None:
    model = rz.convert(rz.convert(gpt2(), include="*.h.0"), include="*.h.1", drop_norm="none")
    moved(model).save_pretrained(tmp_path)
    assert torch.equal(run(rz.from_pretrained(GPT2LMHeadModel, tmp_path)), run(model))


def test_a_folded_model_is_loaded_with_gates_at_1(tmp_path: Path) -> None:
    for number, make in enumerate((gpt2, dino)):
        model = rz.fold(moved(rz.convert(make())))
        model.save_pretrained(tmp_path / str(number))
        loaded = rz.from_pretrained(type(make()), tmp_path / str(number))
        assert all((alpha == 1).all() for _, alpha in rz.alphas(loaded))
        torch.testing.assert_close(run(loaded), run(model))


def test_the_plain_class_says_what_it_does_not_know_and_so_does_audit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = moved(rz.convert(gpt2(), alpha_init="preserve"))
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    plain, info = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert info["unexpected_keys"] == {name for name, _ in rz.alphas(model)}
    assert "UNEXPECTED" in caplog.text
    assert not torch.equal(run(plain), run(model))
    for call in (rz.audit, rz.convert):
        with pytest.warns(UserWarning, match=r"run ungated; rezero_convert.from_pretrained\(GPT2LMHeadModel, path\)"):
            call(plain)


class Wrapped(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, ids: Tensor) -> Any:
        return self.body(ids)


INSIDE = {  # with a configuration of its own, and sharing that of the model around it
    "in a module": (lambda: Wrapped(bert()), "body"),
    "a part of a transformers model": (gpt2, "transformer"),
    "a part with its own configuration": (
        lambda: VisionTextDualEncoderModel(vision_model=dino(), text_model=bert()), "text_model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("folded", [False, True])
def test_a_model_inside_that_is_saved_alone_is_known_as_converted(name: str, folded: bool, tmp_path: Path) -> None:
    make, path = INSIDE[name]
    inputs = {"input_ids": IDS, "pixel_values": torch.ones(2, 3, 16, 16)} if "own" in name else IDS
    whole = moved(rz.convert(make(), inputs, include="*.1*"))
    part = (rz.fold(whole, inputs) if folded else whole).get_submodule(path)
    part.save_pretrained(tmp_path)
    loaded = rz.from_pretrained(type(make().get_submodule(path)), tmp_path)
    gates = {key: alpha.item() for key, alpha in whole.get_submodule(path).named_parameters() if "alpha" in key}
    expected = dict.fromkeys(gates, 1.0) if folded else gates
    assert {key: alpha.item() for key, alpha in rz.alphas(loaded)} == expected
    assert len(gates) == 2
    torch.testing.assert_close(run(loaded), run(whole.get_submodule(path)))
    plain = type(make().get_submodule(path)).from_pretrained(tmp_path)
    for model in (plain, Wrapped(plain)):
        with pytest.warns(
            UserWarning, match=f"run ungated; rezero_convert.from_pretrained.{type(plain).__name__}, path"
        ):
            rz.audit(model, IDS)


@pytest.mark.parametrize("name", INSIDE)
def test_what_is_undone_has_no_entry_left(name: str) -> None:
    make, path = INSIDE[name]
    inputs = {"input_ids": IDS, "pixel_values": torch.ones(2, 3, 16, 16)} if "own" in name else IDS
    model = rz.convert(make(), inputs, alpha_init="preserve")
    assert "rezero_convert" in model.get_submodule(path).config.to_dict()
    back = rz.unconvert(model)
    assert "rezero_convert" not in back.get_submodule(path).config.to_dict()


def test_what_is_not_a_converted_model_is_not_loaded_as_one(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "plain")
    with pytest.raises(rz.ConversionError, match="says of no conversion"):
        rz.from_pretrained(GPT2LMHeadModel, tmp_path / "plain")
    rz.unconvert(rz.convert(gpt2(), alpha_init="preserve")).save_pretrained(tmp_path / "back")
    assert "rezero_convert" not in json.loads((tmp_path / "back" / "config.json").read_text())
    model = rz.convert(gpt2())
    model.config.rezero_convert["gates"] = "transformer.h.0.alpha"
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(rz.ConversionError, match=r"had the gates transformer.h.0.alpha, converting it now gives"):
        rz.from_pretrained(GPT2LMHeadModel, tmp_path / "other")
    original = gpt2()
    original.config.rezero_convert = rz.convert(gpt2()).config.rezero_convert
    original.save_pretrained(tmp_path / "ungated")
    with pytest.raises(rz.ConversionError, match=r"4 gates not in the files: transformer.h.\{0,1\}.alpha_attn"):
        rz.from_pretrained(GPT2LMHeadModel, tmp_path / "ungated")


def test_an_error_leaves_the_configuration_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt2()
    broken = Validation("", (), (Check("read", "eval", False),))
    monkeypatch.setattr("rezero_convert.api.validate", lambda *_: broken)
    with pytest.raises(rz.ConversionError, match="does not hold"):
        rz.convert(model, inplace=True)
    assert not hasattr(model.config, "rezero_convert")
    rz.convert(model, inplace=True, verify=False)
    assert model.config.rezero_convert["conversions"] == [{}]


@pytest.mark.parametrize("make", [gpt2, llama, bert, dino])
def test_conversion_after_from_pretrained_keeps_the_outputs(make: Any, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    model = type(make()).from_pretrained(tmp_path)
    assert torch.equal(run(rz.convert(model, alpha_init="preserve")), run(model))


# --- resets ---


def values(model: nn.Module) -> set[float]:
    return {alpha.item() for _, alpha in rz.alphas(model)}


def at_start(model: nn.Module) -> bool:
    return all(not alpha.is_meta and not alpha.any() for _, alpha in rz.alphas(model))


class Reset(Linears):
    def reset_parameters(self) -> None:
        for parameter in self.parameters(recurse=False):
            nn.init.ones_(parameter)
        self.a.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.relu(self.a(x)))


def test_reset_parameters_leaves_gates_at_their_start() -> None:
    for module in moved(rz.convert(nn.Sequential(Reset(), Reset()), vectors())):
        module.reset_parameters()
        assert not module.alpha.any()
        assert type(module).reset_parameters.__doc__ == Reset.reset_parameters.__doc__
    model = moved(rz.convert(gpt2(), alpha_init=0.25))
    for module in model.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    assert values(model) == {0.25}
    assert callable(Reset().reset_parameters)
    assert not hasattr(gpt2().transformer.h[0], "reset_parameters")


@pytest.mark.parametrize("make", [gpt2, llama, bert])
def test_initialization_by_transformers_leaves_gates_alone(make: Any) -> None:
    model: PreTrainedModel = rz.convert(make())
    model.init_weights()
    model.post_init()
    model.apply(model._init_weights)
    assert at_start(model)


def test_validation_tells_of_gates_that_were_overwritten() -> None:
    model = rz.convert(dino())
    assert not [note for note in rz.validate(model).notes if "start values" in note]
    model.apply(model._init_weights)  # sets LayerScale, the gates here
    assert not at_start(model)
    (note,) = [note for note in rz.validate(model).notes if "start values" in note]
    assert note.startswith("4 of 4 gates are not at their start values (largest: 1)")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_validation_fails_on_gates_that_are_not_finite(value: float) -> None:
    model = moved(rz.convert(gpt2(), IDS), value)
    assert any(failure.startswith("finite (structure): ") for failure in rz.validate(model, IDS).failures)


@pytest.mark.parametrize("make", [gpt2, lambda: nn.Sequential(Reset(), Reset())])
def test_gates_are_at_their_start_after_the_meta_device(make: Any) -> None:
    with torch.device("meta"):
        model = make()
    inputs = IDS if isinstance(model, GPT2LMHeadModel) else vectors()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = rz.convert(model, inputs, alpha_init=0.5)
    model.to_empty(device="cpu")
    assert len(dict(rz.alphas(model))) > 1
    assert values(model) == {0.5}
    moved(model).to(torch.float64)
    assert 0.5 not in values(model)

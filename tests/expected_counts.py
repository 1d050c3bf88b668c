"""How many residual branches architectures have, read off their definitions: a table for precision and recall.

A case says which classes add residual branches, and how many in one instance: a number, the attribute that makes the
add conditional, or a function of the instance. `total` is the same count from the depths of the configuration. Nothing
here comes from the detector.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import zoo
from torch import nn

Rule = int | str | Callable[[Any], int]
"""Branches an instance adds: a number; an attribute, one branch unless it is None or False; a function of it."""


@dataclass(frozen=True)
class Case:
    """A model and its residual branches."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Any] = lambda: None
    total: int | None = None
    """From the configuration; None where that leaves it to the constructor which blocks have a skip."""
    rules: Mapping[str, Rule] = field(default_factory=dict)
    """Per class name."""

    def expected(self, model: nn.Module) -> Counter[int]:
        """The branches of each module, by its id (a module that is used twice is one)."""
        found: Counter[int] = Counter()
        for module in model.modules():
            rule = self.rules.get(type(module).__name__, 0)
            if count := _branches(rule, module):
                found[id(module)] = count
        return found


def _branches(rule: Rule, module: nn.Module) -> int:
    if isinstance(rule, int):
        return rule
    if isinstance(rule, str):
        return int(getattr(module, rule) is not None and getattr(module, rule) is not False)
    return rule(module)


def _timm(_name: str, _total: int | None, _options: dict[str, Any] | None = None, **rules: Rule) -> Case:
    return Case(_name, zoo._timm(_name, **(_options or {})), total=_total, rules=rules)


def _vision(_name: str, _total: int | None, _size: int = 64, _options: Any = None, **rules: Rule) -> Case:
    make = zoo._torchvision(_name, **(_options or {}))
    return Case(f"torchvision {_name}", make, zoo._image(_size), _total, rules)


def _video(_name: str, _total: int, _size: int, **rules: Rule) -> Case:
    make = zoo._torchvision(_name)
    return Case(f"torchvision {_name}", make, lambda: torch.randn(1, 3, 16, _size, _size), _total, rules)


_DEPTH = {"depth": 2}

TIMM = (
    _timm("beit_base_patch16_224", 2 * 2, _DEPTH, Block=2),
    _timm("botnet26t_256", 2 * 4, BottleneckBlock="shortcut", SelfAttnBlock="shortcut"),
    _timm("halonet26t", 2 * 4, BottleneckBlock="shortcut", SelfAttnBlock="shortcut"),
    _timm("lambda_resnet26t", 2 * 4, BottleneckBlock="shortcut", SelfAttnBlock="shortcut"),
    _timm("gernet_s", 1 + 3 + 7 + 2 + 1, BasicBlock="shortcut", BottleneckBlock="shortcut"),
    _timm("gcresnet33ts", 2 + 3 + 3 + 2, BottleneckBlock="shortcut"),  # the context added in GlobalContext is broadcast
    _timm("bat_resnext26ts", 2 * 4, BottleneckBlock="shortcut"),  # bilinear attention's own skip is interior
    _timm("repvgg_a0", 0),
    _timm("mobileone_s0", 0),
    _timm("cait_xxs24_224", 2 * 3 + 2 * 2, {"depth": 3}, LayerScaleBlock=2, LayerScaleBlockClassAttn=2),
    # and after the serial stages six rounds of three parallel ones, which merge resolutions within their branches
    _timm("coat_tiny", 2 * 8 + 4 + 6 * 3 * 2, SerialBlock=2, ConvPosEnc=1, ParallelBlock=6),
    _timm("coat_lite_tiny", 2 * 8 + 4, SerialBlock=2, ConvPosEnc=1),  # a positional convolution a stage, shared
    _timm("convit_tiny", 2 * 12, Block=2),
    _timm("convmixer_768_32", 32, Residual=1),
    _timm("convnext_atto", 2 + 2 + 6 + 2, ConvNeXtBlock=1),
    _timm("convnextv2_atto", 2 + 2 + 6 + 2, ConvNeXtBlock=1),
    _timm("cpubone_nano", None, ResidualBlock="shortcut"),
    # a patch-embedding block and a projection besides, a fusion block (class attention) per branch
    _timm("crossvit_9_240", 3 * (2 * (1 + 3) + 2), Block=2, CrossAttentionBlock=1),
    _timm("csatv2", None, Block=1, TransformerBlock=2),
    _timm("cspresnet50", 3 + 3 + 5 + 2, BottleneckBlock=1),
    _timm("cspdarknet53", 1 + 2 + 8 + 8 + 4, DarkBlock=1),
    _timm("cs3darknet_s", 1 + 3 + 4 + 1, DarkBlock=1),
    _timm("cs3edgenet_x", None, EdgeBlock=1),
    _timm("cspnext_tiny", None, CspNextBlock="add_identity"),
    _timm("davit_tiny", (1 + 1 + 3 + 1) * 2 * (2 + 2), SpatialBlock=2, ChannelBlock=2, ConvPosEnc=1),
    _timm("deepseek_vit_412m", 2 * 2, _DEPTH, DeepseekVitBlock=2),
    _timm("deit_tiny_distilled_patch16_224", 2 * 2, _DEPTH, Block=2),
    _timm("deit3_small_patch16_224", 2 * 2, _DEPTH, Block=2),
    _timm("densenet121", 0),
    _timm("dla34", 2 + 2 * 2 + 2 * 2 + 2, DlaBasic=1),
    _timm("dla60_res2net", 2 + 2 * 2 + 2 * 4 + 2, DlaBottle2neck=1),
    _timm("dla102", None, DlaBottleneck=1, DlaRoot="shortcut"),
    _timm("dpn68", 3 + 4 + 12 + 3, DualPathBlock=1),
    _timm("dpn48b", 3 + 4 + 6 + 3, DualPathBlock=1),
    _timm("edgenext_xx_small", 2 + 2 + 6 + 2, ConvBlock=1, SplitTransposeBlock=1),  # attention inside: interior
    _timm("efficientformer_l1", 3 + 2 + 6 + 4 + 1, MetaBlock1d=2, MetaBlock2d=1),
    _timm(
        "efficientformerv2_s0",
        None,
        EfficientFormerV2Block=lambda m: 1 + (m.token_mixer is not None),
        Downsample="attn",
    ),
    _timm("efficientnet_b0", 0 + 1 + 1 + 2 + 2 + 3 + 0, InvertedResidual="has_skip", DepthwiseSeparableConv="has_skip"),
    _timm("efficientnet_lite0", 0 + 1 + 1 + 2 + 2 + 3 + 0, InvertedResidual="has_skip"),
    _timm("efficientnetv2_rw_t", None, InvertedResidual="has_skip", EdgeResidual="has_skip", ConvBnAct="has_skip"),
    _timm("efficientnet_es", None, InvertedResidual="has_skip", EdgeResidual="has_skip"),
    _timm("efficientnet_cc_b0_4e", 9, InvertedResidual="has_skip", CondConvResidual="has_skip"),
    _timm("mixnet_s", None, InvertedResidual="has_skip", DepthwiseSeparableConv="has_skip"),
    _timm("mnasnet_050", None, InvertedResidual="has_skip", DepthwiseSeparableConv="has_skip"),
    _timm("mobilenetv2_050", 0 + 1 + 2 + 3 + 2 + 2 + 0, InvertedResidual="has_skip"),
    _timm("tinynet_e", None, InvertedResidual="has_skip", DepthwiseSeparableConv="has_skip"),
    _timm("efficientvim_m1", 4 * 6 + 2 * 2, EfficientViMBlock=4, PatchMerging=2),
    _timm("efficientvit_b0", None, ResidualBlock="shortcut"),
    _timm("efficientvit_l1", None, ResidualBlock="shortcut"),
    _timm("efficientvit_m0", 5 * (1 + 2 + 3) + 4 * 2, ResidualDrop=1),
    _timm("eva02_tiny_patch14_224", 2 * 2, _DEPTH, EvaBlock=2),
    _timm("vit_small_patch16_dinov3", 2 * 2, _DEPTH, EvaBlock=2),
    _timm("fasternet_t0", 1 + 2 + 8 + 2, MLPBlock=1),
    _timm("fastvit_t8", 2 * (2 + 2 + 4 + 2), RepMixer=1, RepMixerBlock=1),
    _timm(
        "fastvit_sa12",
        2 * (2 + 2 + 6 + 2) + 1,
        RepMixer=1, RepMixerBlock=1, AttentionBlock=2, RepConditionalPosEnc=1,
    ),
    _timm("focalnet_tiny_srf", 2 * (2 + 2 + 6 + 2), FocalNetBlock=2),
    # a convolution block before each of the three downsamplings and after the stem
    _timm("gcvit_xxtiny", None, GlobalContextVitBlock=2, MbConvBlock=1),
    _timm("gemma4_vit_167m", 2 * 2, _DEPTH, Gemma4Block=2),
    _timm("ghostnet_050", 16, GhostBottleneck=1),
    _timm("ghostnetv2_100", 16, GhostBottleneck=1),
    _timm("ghostnetv3_050", 16, GhostBottleneckV3=1),
    _timm("hardcorenas_a", None, InvertedResidual="has_skip", DepthwiseSeparableConv="has_skip"),
    _timm("hgnet_tiny", 1, HighPerfGpuBlock="residual"),  # all but the first of a stage
    _timm("hgnetv2_b0", 1, HighPerfGpuBlock="residual"),
    _timm("hiera_tiny_224", 2 * (1 + 2 + 7 + 2), HieraBlock=2),
    _timm("sam2_hiera_tiny", 2 * (1 + 2 + 7 + 2), MultiScaleBlock=2),
    _timm("hrnet_w18_small", None, BasicBlock=1, Bottleneck=1),
    _timm("iformer_t", None, Residual=1),
    _timm("inception_next_atto", 2 + 2 + 6 + 2, MetaNeXtBlock=1),
    _timm("inception_resnet_v2", 10 + 20 + 9 + 1, Block35=1, Block17=1, Block8=1),
    _timm("inception_v3", 0),
    _timm("inception_v4", 0),
    _timm("lcnetv2_small", None, RepDepthwiseSeparable="use_shortcut"),
    _timm("levit_128s", 2 * (2 + 3 + 4) + 2, LevitBlock=2, LevitDownsample=1),
    _timm("levit_conv_128s", 2 * (2 + 3 + 4) + 2, LevitBlock=2, LevitDownsample=1),
    _timm("lowformer_b0", None, ResidualBlock="shortcut"),
    _timm("mambaout_femto", 3 + 3 + 9 + 3, GatedConvBlock=1),
    _timm("coatnet_pico_rw_224", None, MbConvBlock=1, TransformerBlock2d=2),
    _timm("coatnet_nano_rw_224", None, MbConvBlock=1, TransformerBlock2d=2),
    _timm("maxvit_pico_rw_256", (2 + 2 + 5 + 2) * (1 + 2 * 2), MbConvBlock=1, PartitionAttentionCl=2),
    _timm("maxxvit_rmlp_nano_rw_256", (1 + 2 + 3 + 1) * (1 + 2 * 2), ConvNeXtBlock=1, PartitionAttentionCl=2),
    _timm("poolformer_s12", 2 + 2 + 6 + 2, MetaFormerBlock=1),  # pooling has no weight: the perceptron alone
    _timm("caformer_s18", 2 * (3 + 3 + 9 + 3), MetaFormerBlock=2),
    _timm("convformer_s18", 2 * (3 + 3 + 9 + 3), MetaFormerBlock=2),
    _timm("mixer_s32_224", 2 * 8, MixerBlock=2),
    _timm("gmixer_12_224", 2 * 12, MixerBlock=2),
    _timm("resmlp_12_224", 2 * 12, ResBlock=2),
    _timm("gmlp_ti16_224", 30, SpatialGatingBlock=1),
    _timm("lcnet_050", 0),
    _timm("mobilenetv3_small_050", None, InvertedResidual="has_skip", DepthwiseSeparableConv="has_skip"),
    _timm("mobilenetv4_conv_small", None, UniversalInvertedResidual="has_skip", ConvBnAct="has_skip"),
    _timm(
        "mobilenetv4_hybrid_medium",
        None,
        UniversalInvertedResidual="has_skip", MobileAttention="has_skip", EdgeResidual="has_skip",
    ),
    _timm(
        "mobilenetv5_300m",
        None,
        UniversalInvertedResidual="has_skip", MobileAttention="has_skip", EdgeResidual="has_skip",
    ),
    _timm("mobilevit_xxs", None, BottleneckBlock="shortcut", Block=2),
    _timm("mobilevitv2_050", None, BottleneckBlock="shortcut", LinearTransformerBlock=2),
    _timm("mvitv2_tiny", 2 * (1 + 2 + 5 + 2), MultiScaleBlock=2),  # the pooled query added within: interior
    _timm("naflexvit_base_patch16_gap", 2 * 12, Block=2),
    _timm("nasnetalarge", None, FirstCell=1, NormalCell=1),  # one separable convolution is added to its own input
    _timm("nest_tiny", 2 * (2 + 2 + 8), TransformerLayer=2),
    _timm("nextvit_small", None, NextConvBlock=2, NextTransformerBlock=3),
    _timm("dm_nfnet_f0", 1 + 2 + 6 + 3, NormFreeBlock=1),
    _timm("nf_resnet26", 2 * 4, NormFreeBlock=1),
    _timm("nf_regnet_b0", 1 + 3 + 6 + 6, NormFreeBlock=1),
    _timm("pit_ti_224", 2 * (2 + 6 + 4), Block=2),
    _timm("pnasnet5large", 0),
    _timm("pvt_v2_b0", 2 * (2 + 2 + 2 + 2), Block=2),
    _timm("pvt_v2_b2_li", 2 * (3 + 4 + 6 + 3), Block=2),
    _timm("qwen3_vit_88m", 2 * 2, _DEPTH, EvaBlock=2),
    _timm("rdnet_tiny", 0),
    _timm("regnetx_002", 1 + 1 + 4 + 7, Bottleneck=1),
    _timm("regnety_002", 1 + 1 + 4 + 7, Bottleneck=1),
    _timm("regnetz_005", None, Bottleneck="downsample"),
    _timm("repghostnet_050", None, RepGhostBottleneck=1),
    _timm("repvit_m0_9", None, RepViTBlock=1, RepVitDownsample=1),
    _timm("res2net50_14w_8s", 3 + 4 + 6 + 3, Bottle2neck=1),
    _timm("resnest14d", 1 + 1 + 1 + 1, ResNestBottleneck=1),
    _timm("resnet18", 2 + 2 + 2 + 2, BasicBlock=1),
    _timm("resnet50", 3 + 4 + 6 + 3, Bottleneck=1),
    _timm("resnet26d", 2 + 2 + 2 + 2, Bottleneck=1),
    _timm("seresnet50", 3 + 4 + 6 + 3, Bottleneck=1),
    _timm("ecaresnet26t", 2 + 2 + 2 + 2, Bottleneck=1),
    _timm("resnet50_gn", 3 + 4 + 6 + 3, Bottleneck=1),
    _timm("resnetaa50", 3 + 4 + 6 + 3, Bottleneck=1),
    _timm("resnetrs50", 3 + 4 + 6 + 3, Bottleneck=1),
    _timm("resnetv2_18", 2 + 2 + 2 + 2, PreActBasic=1),
    _timm("resnetv2_50", 3 + 4 + 6 + 3, PreActBottleneck=1),
    _timm("resnetv2_50x1_bit", 3 + 4 + 6 + 3, PreActBottleneck=1),
    _timm("rexnet_100", None, LinearBottleneck="use_shortcut"),
    _timm("selecsls42", 0),
    _timm("legacy_seresnet18", 2 + 2 + 2 + 2, SEResNetBlock=1),
    _timm("legacy_seresnext26_32x4d", 2 + 2 + 2 + 2, SEResNeXtBottleneck=1),
    _timm("sequencer2d_s", 2 * (4 + 3 + 8 + 3), Sequencer2dBlock=2),
    _timm("shvit_s1", None, Residual=1),
    _timm("skresnet18", 2 + 2 + 2 + 2, SelectiveKernelBasic=1),
    _timm("skresnet50", 3 + 4 + 6 + 3, SelectiveKernelBottleneck=1),
    _timm("starnet_s050", 1 + 1 + 3 + 1, Block=1),
    # a convolution encoder per block but the last of a stage, which has a local representation, attention and linear
    _timm("swiftformer_xs", 2 + 2 + 5 + 3 + 4 * 3, ConvEncoder=1, LocalRepresentation=1, Block=2),
    _timm("swin_tiny_patch4_window7_224", 2 * (2 + 2 + 6 + 2), SwinTransformerBlock=2),
    _timm("swinv2_tiny_window8_256", 2 * (2 + 2 + 6 + 2), SwinTransformerV2Block=2),
    _timm("swinv2_cr_tiny_ns_224", 2 * (2 + 2 + 6 + 2), SwinTransformerV2CrBlock=2),
    _timm("tiny_vit_5m_224", 2 + 2 * (2 + 6 + 2), MBConv=1, TinyVitBlock=2),
    _timm("tnt_s_patch16_224", 4 * 12, Block=4),
    _timm("tresnet_m", 3 + 4 + 11 + 3, BasicBlock=1, Bottleneck=1),
    _timm("twins_pcpvt_small", 2 * (3 + 4 + 6 + 3) + 4, Block=2, PosConv=1),
    _timm("twins_svt_small", 2 * (2 + 2 + 10 + 4) + 4, Block=2, PosConv=1),
    _timm("visformer_tiny", None, Block=lambda m: 1 + (m.attn is not None)),
    _timm("vit_tiny_patch16_224", 2 * 12, Block=2),
    _timm("vit_base_patch16_siglip_224", 2 * 2 + 1, _DEPTH, Block=2, AttentionPoolLatent=1),
    _timm("vit_small_patch16_36x1_224", 2 * 2, _DEPTH, Block=2),
    _timm("vit_small_patch16_18x2_224", 2 * 2, _DEPTH, ParallelThingsBlock=2),
    _timm("vit_base_patch16_xp_224", 2 * 2, _DEPTH, ParallelScalingBlock=lambda m: 2 if m.out_proj is None else 1),
    _timm("vit_small_resnet26d_224", 2 * 2 + 8, _DEPTH, Block=2, Bottleneck=1),
    _timm("vit_relpos_small_patch16_224", 2 * 12, RelPosBlock=2),
    _timm("vit_relpos_base_patch16_rpn_224", 2 * 12, ResPostRelPosBlock=2),
    _timm("samvit_base_patch16", 2 * 2, {"depth": 2, "global_attn_indexes": (1,)}, Block=2),
    _timm("vitamin_small_224", 2 + 4 + 2 * 14, MbConvLNBlock=1, Block=2),
    _timm("volo_d1_224", 2 * (4 + 4 + 8 + 2) + 2 * 2, Outlooker=2, Transformer=2, ClassBlock=2),
    _timm("ese_vovnet39b", 0 + 0 + 1 + 1, OsaBlock="residual"),
    _timm("vgg11", 0),
    _timm("legacy_xception", 12, Block=1),
    _timm("xception41", 3 + 8 + 1, XceptionModule=lambda m: int(not m.no_skip)),
    _timm("xception41p", 3 + 8 + 1, PreXceptionModule=lambda m: int(not m.no_skip)),
    _timm("xcit_nano_12_p16_224", 3 * 12 + 2 * 2, XCABlock=3, ClassAttentionBlock=2),
)  # fmt: skip

TORCHVISION = (
    _vision("alexnet", 0, 96),
    _vision("vgg11", 0),
    _vision("squeezenet1_0", 0, 96),
    _vision("densenet121", 0),
    _vision("googlenet", 0, 96, {"aux_logits": False, "init_weights": False}),
    _vision("shufflenet_v2_x0_5", 0),
    _vision("resnet18", 2 + 2 + 2 + 2, BasicBlock=1),
    _vision("resnet50", 3 + 4 + 6 + 3, Bottleneck=1),
    _vision("resnext50_32x4d", 3 + 4 + 6 + 3, Bottleneck=1),
    _vision("wide_resnet50_2", 3 + 4 + 6 + 3, Bottleneck=1),
    _vision("convnext_tiny", 3 + 3 + 9 + 3, CNBlock=1),
    _vision("efficientnet_b0", 0 + 1 + 1 + 2 + 2 + 3 + 0, MBConv="use_res_connect"),
    _vision("efficientnet_v2_s", 2 + 3 + 3 + 5 + 8 + 14, MBConv="use_res_connect", FusedMBConv="use_res_connect"),
    _vision("maxvit_t", (2 + 2 + 5 + 2) * (1 + 2 * 2), 224, MBConv=1, PartitionAttentionLayer=2),
    _vision("mnasnet0_5", 2 + 2 + 2 + 1 + 3 + 0, _InvertedResidual="apply_residual"),
    _vision("mobilenet_v2", 0 + 1 + 2 + 3 + 2 + 2 + 0, InvertedResidual="use_res_connect"),
    _vision("mobilenet_v3_large", 10, InvertedResidual="use_res_connect"),
    _vision("mobilenet_v3_small", 6, InvertedResidual="use_res_connect"),
    _vision("regnet_x_400mf", 1 + 2 + 7 + 12, ResBottleneckBlock=1),
    _vision("regnet_y_400mf", 1 + 3 + 6 + 6, ResBottleneckBlock=1),
    _vision("swin_t", 2 * (2 + 2 + 6 + 2), SwinTransformerBlock=2),
    _vision("swin_v2_t", 2 * (2 + 2 + 6 + 2), SwinTransformerBlockV2=2),
    _vision("vit_b_32", 2 * 12, 64, {"image_size": 64}, EncoderBlock=2),
    _vision("fcn_resnet50", 3 + 4 + 6 + 3, 64, {"weights_backbone": None}, Bottleneck=1),
    _vision("deeplabv3_resnet50", 3 + 4 + 6 + 3, 64, {"weights_backbone": None}, Bottleneck=1),
    _vision("lraspp_mobilenet_v3_large", 10, 64, {"weights_backbone": None}, InvertedResidual="use_res_connect"),
    _video("r3d_18", 2 + 2 + 2 + 2, 64, BasicBlock=1),
    _video("mc3_18", 2 + 2 + 2 + 2, 64, BasicBlock=1),
    _video("r2plus1d_18", 2 + 2 + 2 + 2, 64, BasicBlock=1),
    _video("s3d", 0, 224),
    _video("mvit_v1_b", 2 * 16, 224, MultiscaleBlock=2),
    _video("mvit_v2_s", 2 * 16, 224, MultiscaleBlock=2),
    _video("swin3d_t", 2 * (2 + 2 + 6 + 2), 64, SwinTransformerBlock=2),
    Case(  # two encoders of three stages of two, the refinement of the coordinates; the recurrent unit is none
        "torchvision raft_small",
        zoo._torchvision("raft_small"),
        lambda: (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128)),
        2 * 3 * 2 + 1,
        {"BottleneckBlock": 1, "RAFT": 1},
    ),
    Case(
        "torchvision raft_large",
        zoo._torchvision("raft_large"),
        lambda: (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128)),
        2 * 3 * 2 + 1,
        {"ResidualBlock": 1, "RAFT": 1},
    ),
)

_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_KV = {"num_key_value_heads": 2}
_IDS = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_TEXT = {**_SIZES, **_IDS}
_GPT = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64, **_IDS}
_IMAGE = {**_SIZES, "image_size": 32, "patch_size": 16}
_PAIR = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, **_IDS,
}  # fmt: skip
_T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2, **_IDS}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def _ids() -> Any:
    return {"input_ids": torch.randint(3, 90, (2, 8))}


def _pairs() -> Any:
    return {**_ids(), "decoder_input_ids": torch.randint(3, 90, (2, 6))}


def _sound() -> Any:
    return {"input_values": torch.randn(2, 8000)}


def _features(size: int, length: int) -> Callable[[], Any]:
    return lambda: {"input_features": torch.randn(2, length, size)}


def _pixels(size: int = 32) -> Callable[[], Any]:
    return lambda: {"pixel_values": torch.randn(2, 3, size, size)}


def _pixels_and_ids() -> Any:
    return {**_ids(), **_pixels()()}


def _hf(_name: str, _total: int, _config: dict[str, Any], _inputs: Callable[[], Any] = _ids, **rules: Rule) -> Case:
    config = _name
    for ending in ("ForCausalLM", "ForMaskedLM", "ForImageClassification", "LMHeadModel", "Model"):
        config = config.removesuffix(ending)
    options = dict(_config)
    make = zoo._transformers(_name, options.pop("_config", f"{config}Config"), **options)
    return Case(f"transformers {_name}", make, _inputs, _total, rules)


def _pair_of(kind: str, size: int) -> dict[str, Any]:
    """Small nested configurations of a two-tower model."""
    text = {**_TEXT, "max_position_embeddings": 32, "projection_dim": 16}
    vision = {**_IMAGE, "image_size": size, "projection_dim": 16}
    return {"text_config": text, "vision_config": vision, "projection_dim": 16}


TRANSFORMERS = (
    # decoders
    _hf("GPT2LMHeadModel", 2 * 2, _GPT, GPT2Block=2),
    _hf("LlamaForCausalLM", 2 * 2, {**_TEXT, **_KV}, LlamaDecoderLayer=2),
    _hf("MistralForCausalLM", 2 * 2, {**_TEXT, **_KV}, MistralDecoderLayer=2),
    _hf("Qwen2ForCausalLM", 2 * 2, {**_TEXT, **_KV}, Qwen2DecoderLayer=2),
    _hf("Qwen3ForCausalLM", 2 * 2, {**_TEXT, **_KV, "head_dim": 16}, Qwen3DecoderLayer=2),
    _hf("GemmaForCausalLM", 2 * 2, {**_TEXT, **_KV, "head_dim": 16}, GemmaDecoderLayer=2),
    _hf("Gemma2ForCausalLM", 2 * 2, {**_TEXT, **_KV, "head_dim": 16}, Gemma2DecoderLayer=2),
    _hf(
        "Gemma3ForCausalLM",
        2 * 2,
        {**_TEXT, **_KV, "head_dim": 16, "_config": "Gemma3TextConfig"},
        Gemma3DecoderLayer=2,
    ),
    _hf("Olmo2ForCausalLM", 2 * 2, {**_TEXT, **_KV}, Olmo2DecoderLayer=2),
    _hf("GraniteForCausalLM", 2 * 2, {**_TEXT, **_KV, "residual_multiplier": 0.5}, GraniteDecoderLayer=2),
    _hf("NemotronForCausalLM", 2 * 2, {**_TEXT, **_KV}, NemotronDecoderLayer=2),
    _hf("Starcoder2ForCausalLM", 2 * 2, {**_TEXT, **_KV}, Starcoder2DecoderLayer=2),
    _hf("PersimmonForCausalLM", 2 * 2, _TEXT, PersimmonDecoderLayer=2),
    _hf("Phi3ForCausalLM", 2 * 2, {**_TEXT, **_KV}, Phi3DecoderLayer=2),
    _hf("Glm4ForCausalLM", 2 * 2, {**_TEXT, **_KV, "head_dim": 16}, Glm4DecoderLayer=2),
    _hf("SmolLM3ForCausalLM", 2 * 2, {**_TEXT, **_KV}, SmolLM3DecoderLayer=2),
    _hf("HeliumForCausalLM", 2 * 2, {**_TEXT, **_KV, "head_dim": 16}, HeliumDecoderLayer=2),
    _hf("BitNetForCausalLM", 2 * 2, {**_TEXT, **_KV}, BitNetDecoderLayer=2),
    _hf("GPTNeoForCausalLM", 2 * 2, {
        "hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]],
        "max_position_embeddings": 64, **_IDS,
    }, GPTNeoBlock=2),
    _hf("GPTNeoXForCausalLM", 2 * 2, _TEXT, GPTNeoXLayer=2),
    _hf("GPTJForCausalLM", 2 * 2, {**_GPT, "rotary_dim": 8}, GPTJBlock=2),
    _hf("CodeGenForCausalLM", 2 * 2, {**_GPT, "n_head": 4, "rotary_dim": 8}, CodeGenBlock=2),
    _hf("GPTBigCodeForCausalLM", 2 * 2, _GPT, GPTBigCodeBlock=2),
    _hf("CohereForCausalLM", 2 * 2, {**_TEXT, **_KV}, CohereDecoderLayer=2),
    _hf("PhiForCausalLM", 2 * 2, _TEXT, PhiDecoderLayer=2),
    _hf("FalconForCausalLM", 2 * 2, {"_config": "FalconConfig", **{
        key: value for key, value in _TEXT.items() if key != "intermediate_size"}}, FalconDecoderLayer=2),
    _hf("StableLmForCausalLM", 2 * 2, {**_TEXT, **_KV}, StableLmDecoderLayer=2),
    _hf("OPTForCausalLM", 2 * 2, {
        "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 64, "word_embed_proj_dim": 32, **_IDS}, OPTDecoderLayer=2),
    _hf("BloomForCausalLM", 2 * 2, {"n_layer": 2, "hidden_size": 32, "n_head": 2, **_IDS},
        BloomAttention=1, BloomMLP=1),
    _hf("MptForCausalLM", 2 * 2, {"d_model": 32, "n_heads": 2, "n_layers": 2, **_IDS}, MptBlock=1, MptMLP=1),
    _hf("XGLMForCausalLM", 2 * 2, {
        "d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 2, **_IDS}, XGLMDecoderLayer=2),
    _hf("BioGptForCausalLM", 2 * 2, _TEXT, BioGptDecoderLayer=2),
    _hf("CTRLLMHeadModel", 2 * 2, {"n_layer": 2, "n_embd": 32, "n_head": 2, "dff": 64, **_IDS}, EncoderLayer=2),
    _hf("OpenAIGPTLMHeadModel", 2 * 2, _GPT, Block=2),
    # mixtures of experts: the routed and the shared expert are no blocks
    _hf("MixtralForCausalLM", 2 * 2, {**_TEXT, **_KV, "num_local_experts": 4}, MixtralDecoderLayer=2),
    _hf("Qwen2MoeForCausalLM", 2 * 2, {
        **_TEXT, **_KV, **_EXPERTS, "shared_expert_intermediate_size": 32}, Qwen2MoeDecoderLayer=2),
    _hf("OlmoeForCausalLM", 2 * 2, {**_TEXT, **_KV, "num_experts": 4, "num_experts_per_tok": 2}, OlmoeDecoderLayer=2),
    _hf("GptOssForCausalLM", 2 * 2, {**_TEXT, **_KV, "head_dim": 16, "num_local_experts": 4}, GptOssDecoderLayer=2),
    _hf("DeepseekV3ForCausalLM", 2 * 2, {
        **_TEXT, **_KV, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8, "v_head_dim": 16}, DeepseekV3DecoderLayer=2),
    _hf("GraniteMoeHybridForCausalLM", 2 * 2, {
        **_TEXT, **_KV, "mamba_n_heads": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
        "layer_types": ["attention", "attention"]}, GraniteMoeHybridDecoderLayer=2),
    # state spaces, recurrences, hybrids
    _hf("MambaForCausalLM", 2, {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, **_IDS}, MambaBlock=1),
    _hf("Mamba2ForCausalLM", 2, {
        "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 2,
        "expand": 2, "chunk_size": 8, **_IDS}, Mamba2Block=1),
    _hf("JambaForCausalLM", 2 * 2, {
        **_TEXT, **_KV, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False, "mamba_d_state": 4},
        JambaAttentionDecoderLayer=2, JambaMambaDecoderLayer=2),
    _hf("BambaForCausalLM", 2 * 2, {
        **_TEXT, **_KV, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
        "mamba_chunk_size": 8}, BambaDecoderLayer=2),
    # attention and mamba beside each other, then the perceptron
    _hf("FalconH1ForCausalLM", 3 * 2, {
        **_TEXT, **_KV, "head_dim": 16, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
        "mamba_chunk_size": 8}, FalconH1DecoderLayer=3),
    _hf("RwkvForCausalLM", 2 * 2, {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 32, **_IDS},
        RwkvBlock=2),
    _hf("RecurrentGemmaForCausalLM", 2 * 2, {
        **_TEXT, **_KV, "head_dim": 16, "lru_width": 32, "attention_window_size": 16,
        "block_types": ["recurrent", "attention"]}, RecurrentGemmaDecoderLayer=2),
    _hf("Lfm2ForCausalLM", 2 * 2, {**_TEXT, **_KV, "layer_types": ["conv", "full_attention"]}, Lfm2DecoderLayer=2),
    # encoders
    _hf("BertModel", 2 * 2, _TEXT, BertSelfOutput=1, BertOutput=1),
    _hf("RobertaModel", 2 * 2, _TEXT, RobertaSelfOutput=1, RobertaOutput=1),
    _hf("ElectraModel", 2 * 2, _TEXT, ElectraSelfOutput=1, ElectraOutput=1),
    _hf("AlbertModel", 2, {**_TEXT, "embedding_size": 16}, AlbertAttention=1, AlbertLayer=1),  # one shared layer
    _hf("DistilBertModel", 2 * 2, {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2, **_IDS},
        TransformerBlock=2),
    # its convolution is of the embeddings and is added to the first layer's output: neither is computed from the other
    _hf("DebertaV2Model", 2 * 2, {
        **_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "conv_kernel_size": 3,
        "max_position_embeddings": 32}, DebertaV2SelfOutput=1, DebertaV2Output=1),
    _hf("DebertaModel", 2 * 2, {**_TEXT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        DebertaSelfOutput=1, DebertaOutput=1),
    _hf("ConvBertModel", 2 * 2, {**_TEXT, "embedding_size": 32}, ConvBertSelfOutput=1, ConvBertOutput=1),
    _hf("MPNetModel", 2 * 2, _TEXT, MPNetAttention=1, MPNetOutput=1),
    _hf("SqueezeBertModel", 2 * 2, {**_TEXT, "embedding_size": 32, "q_groups": 2, "k_groups": 2, "v_groups": 2,
        "post_attention_groups": 1, "intermediate_groups": 2, "output_groups": 2}, ConvDropoutLayerNorm=1),
    _hf("FNetModel", 2, {**_TEXT, "tpu_short_seq_length": 8}, FNetOutput=1),  # the Fourier mixer has no weight
    _hf("RoFormerModel", 2 * 2, {**_TEXT, "embedding_size": 32}, RoFormerSelfOutput=1, RoFormerOutput=1),
    _hf("EsmModel", 2 * 2, {**_TEXT, "position_embedding_type": "rotary"}, EsmSelfOutput=1, EsmOutput=1),
    _hf("ModernBertModel", 2 * 2, {**_TEXT, "cls_token_id": 1, "sep_token_id": 2}, ModernBertEncoderLayer=2),
    _hf("XLMModel", 2 * 2, {"emb_dim": 32, "n_layers": 2, "n_heads": 2, **_IDS}, XLMModel=2 * 2),
    _hf("XLNetModel", 2 * 2, {"d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64, **_IDS},
        XLNetRelativeAttention=1, XLNetFeedForward=1),
    _hf("CanineModel", 2 * (1 + 2 + 1), {**_TEXT, "local_transformer_stride": 4, "num_hash_buckets": 64},
        lambda: {"input_ids": torch.randint(3, 90, (2, 16))}, CanineSelfOutput=1, CanineOutput=1),
    _hf("FunnelModel", 2 * (1 + 1 + 1), {  # the upsampled stream is merged with an earlier one: no block
        "block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 64,
        **_IDS}, FunnelRelMultiheadAttention=1, FunnelPositionwiseFFN=1),
    _hf("NystromformerModel", 2 * 2, {**_TEXT, "segment_means_seq_len": 8, "num_landmarks": 4},
        NystromformerSelfOutput=1, NystromformerOutput=1),
    # pairs of encoder and decoder
    _hf("BartModel", 2 * 2 + 2 * 3, _PAIR, BartEncoderLayer=2, BartDecoderLayer=3),
    _hf("MBartModel", 2 * 2 + 2 * 3, _PAIR, MBartEncoderLayer=2, MBartDecoderLayer=3),
    _hf("PegasusModel", 2 * 2 + 2 * 3, _PAIR, _pairs, PegasusEncoderLayer=2, PegasusDecoderLayer=3),
    _hf("MarianModel", 2 * 2 + 2 * 3, {**_PAIR, "decoder_start_token_id": 0}, _pairs,
        MarianEncoderLayer=2, MarianDecoderLayer=3),
    _hf("BlenderbotModel", 2 * 2 + 2 * 3, _PAIR, _pairs, BlenderbotEncoderLayer=2, BlenderbotDecoderLayer=3),
    _hf("M2M100Model", 2 * 2 + 2 * 3, _PAIR, _pairs, M2M100EncoderLayer=2, M2M100DecoderLayer=3),
    _hf("ProphetNetModel", 2 * 2 + 2 * 3, {
        "hidden_size": 32, "encoder_ffn_dim": 64, "num_encoder_layers": 2, "num_encoder_attention_heads": 2,
        "decoder_ffn_dim": 64, "num_decoder_layers": 2, "num_decoder_attention_heads": 2, **_IDS}, _pairs,
        ProphetNetEncoderLayer=2, ProphetNetDecoderLayer=3),
    _hf("T5Model", 2 * 2 + 2 * 3, _T5, _pairs, T5LayerSelfAttention=1, T5LayerCrossAttention=1, T5LayerFF=1),
    _hf("MT5Model", 2 * 2 + 2 * 3, _T5, _pairs, MT5LayerSelfAttention=1, MT5LayerCrossAttention=1, MT5LayerFF=1),
    _hf("LongT5Model", 2 * 2 + 2 * 3, {**_T5, "local_radius": 3}, _pairs,
        LongT5LayerSelfAttention=1, LongT5LayerLocalSelfAttention=1, LongT5LayerCrossAttention=1, LongT5LayerFF=1),
    _hf("SwitchTransformersModel", 2 * 2 + 2 * 3, {**_T5, "num_experts": 2}, _pairs,
        SwitchTransformersLayerSelfAttention=1, SwitchTransformersLayerCrossAttention=1, SwitchTransformersLayerFF=1),
    # images
    _hf("ViTModel", 2 * 2, _IMAGE, _pixels(), ViTLayer=2),
    _hf("DeiTModel", 2 * 2, _IMAGE, _pixels(), DeiTLayer=2),
    _hf("BeitModel", 2 * 2, {**_IMAGE, "layer_scale_init_value": 0.1}, _pixels(), BeitLayer=2),
    _hf("Dinov2Model", 2 * 2, _IMAGE, _pixels(), Dinov2Layer=2),
    _hf("DINOv3ViTModel", 2 * 2, _IMAGE, _pixels(), DINOv3ViTLayer=2),
    _hf("SwinModel", 2 * 2, {
        "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
        _pixels(), SwinLayer=2),
    _hf("Swinv2Model", 2 * 2, {
        "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
        _pixels(), Swinv2Layer=2),
    _hf("ConvNextModel", 4, {"hidden_sizes": [16, 16, 16, 16], "depths": [1, 1, 1, 1]}, _pixels(), ConvNextLayer=1),
    _hf("ConvNextV2Model", 4, {"hidden_sizes": [16, 16, 16, 16], "depths": [1, 1, 1, 1]}, _pixels(),
        ConvNextV2Layer=1),
    _hf("ResNetModel", 4, {"hidden_sizes": [16, 16, 16, 16], "depths": [1, 1, 1, 1], "embedding_size": 16},
        _pixels(64), ResNetBottleNeckLayer=1),
    _hf("RegNetModel", 4, {
        "hidden_sizes": [16, 16, 16, 16], "depths": [1, 1, 1, 1], "embedding_size": 16, "groups_width": 8},
        _pixels(64), RegNetXLayer=1, RegNetYLayer=1),
    _hf("BitModel", 4, {
        "hidden_sizes": [64, 64, 64, 64], "depths": [1, 1, 1, 1], "embedding_size": 32, "num_groups": 8}, _pixels(64),
        BitPreActivationBottleneckLayer=1),
    _hf("SegformerModel", 2 * 4, {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 16, 32, 32]}, _pixels(64),
        SegformerLayer=2),
    _hf("PvtModel", 2 * 4, {"image_size": 64, "depths": [1, 1, 1, 1], "hidden_sizes": [16, 16, 32, 32],
        "num_attention_heads": [1, 1, 2, 2]}, _pixels(64), PvtLayer=2),
    _hf("PoolFormerModel", 4, {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 16, 32, 32]}, _pixels(64),
        PoolFormerLayer=1),  # pooling has no weight
    _hf("FocalNetModel", 2 * 2, {
        "image_size": 32, "embed_dim": 16, "depths": [1, 1], "focal_levels": [2, 2], "focal_windows": [3, 3],
        "hidden_sizes": [16, 32]}, _pixels(), FocalNetLayer=2),
    _hf("HieraModel", 2 * 4, {
        "image_size": [64, 64], "embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]}, _pixels(64),
        HieraLayer=2),
    _hf("LevitModel", 2 * 3 + 2, {
        "image_size": 64, "hidden_sizes": [16, 32, 48], "depths": [1, 1, 1], "num_attention_heads": [2, 2, 2],
        "key_dim": [8, 8, 8]}, _pixels(64), LevitResidualLayer=1),
    _hf("MobileViTModel", 2 * (2 + 4 + 3) + 2, {
        "image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 16, 16, 24, 24, 24, 32]},
        _pixels(64), MobileViTTransformerLayer=1, MobileViTOutput=1, MobileViTInvertedResidual="use_residual"),
    _hf("CvtModel", 2 * (1 + 2 + 3), {
        "embed_dim": [16, 16, 16], "depth": [1, 2, 3], "num_heads": [1, 1, 2]}, _pixels(64), CvtLayer=1, CvtOutput=1),
    _hf("YolosModel", 2 * 2, {**_IMAGE, "image_size": [32, 32], "num_detection_tokens": 4}, _pixels(), YolosLayer=1,
        YolosOutput=1),
    _hf("TimesformerModel", 3 * 2, {**_IMAGE, "num_frames": 2},
        lambda: {"pixel_values": torch.randn(1, 2, 3, 32, 32)}, TimesformerLayer=3),
    _hf("VideoMAEModel", 2 * 2, {**_IMAGE, "num_frames": 4, "tubelet_size": 2},
        lambda: {"pixel_values": torch.randn(1, 4, 3, 32, 32)}, VideoMAELayer=1, VideoMAEOutput=1),
    # sound
    _hf("Wav2Vec2Model", 2 * 2 + 1, {**_TEXT, "apply_spec_augment": False}, _sound,
        Wav2Vec2EncoderLayer=2, Wav2Vec2Encoder=1),  # the positional convolution
    _hf("HubertModel", 2 * 2 + 1, {**_TEXT, "apply_spec_augment": False}, _sound,
        HubertEncoderLayer=2, HubertEncoder=1),
    _hf("WavLMModel", 2 * 2 + 1, {**_TEXT, "apply_spec_augment": False}, _sound,
        WavLMEncoderLayer=2, WavLMEncoder=1),
    _hf("UniSpeechModel", 2 * 2 + 1, {**_TEXT, "apply_spec_augment": False}, _sound,
        UniSpeechEncoderLayer=2, UniSpeechEncoder=1),
    _hf("Data2VecAudioModel", 2 * 2 + 1, {**_TEXT, "apply_spec_augment": False}, _sound,
        Data2VecAudioEncoderLayer=2, Data2VecAudioEncoder=1),
    _hf("Wav2Vec2ConformerModel", 4 * 2, {**_TEXT, "apply_spec_augment": False}, _sound,
        Wav2Vec2ConformerEncoderLayer=4),
    _hf("Wav2Vec2BertModel", 4 * 2, {**_TEXT, "apply_spec_augment": False}, _features(160, 20),
        Wav2Vec2BertEncoderLayer=4),
    _hf("ASTModel", 2 * 2, {**_SIZES, "num_mel_bins": 32, "max_length": 48},
        lambda: {"input_values": torch.randn(2, 48, 32)}, ASTLayer=2),
    _hf("WhisperModel", 2 * 2 + 2 * 3, {**_PAIR, "max_source_positions": 30, "num_mel_bins": 80},
        lambda: {"input_features": torch.randn(2, 80, 60), "decoder_input_ids": torch.randint(3, 90, (2, 6))},
        WhisperEncoderLayer=2, WhisperDecoderLayer=3),
    _hf("Speech2TextModel", 2 * 2 + 2 * 3, {**_PAIR, "max_source_positions": 60},
        lambda: {"input_features": torch.randn(2, 40, 80), "decoder_input_ids": torch.randint(3, 90, (2, 6))},
        Speech2TextEncoderLayer=2, Speech2TextDecoderLayer=3),
    _hf("MoonshineModel", 2 * 2 + 2 * 3, {
        **_IDS, "hidden_size": 32, "intermediate_size": 64, "encoder_num_hidden_layers": 2,
        "decoder_num_hidden_layers": 2, "encoder_num_attention_heads": 2, "decoder_num_attention_heads": 2,
        "decoder_start_token_id": 1},
        lambda: {"input_values": torch.randn(2, 8000), "decoder_input_ids": torch.randint(3, 90, (2, 6))},
        MoonshineEncoderLayer=2, MoonshineDecoderLayer=3),
    # several kinds of input
    _hf("CLIPModel", 2 * 2 + 2 * 2, _pair_of("clip", 32), _pixels_and_ids, CLIPEncoderLayer=2),
    _hf("SiglipModel", 2 * 2 + 2 * 2 + 1, {key: value for key, value in _pair_of("siglip", 32).items()
        if key != "projection_dim"}, _pixels_and_ids, SiglipEncoderLayer=2, SiglipMultiheadAttentionPoolingHead=1),
    _hf("ViltModel", 2 * 2, {**_TEXT, **_IMAGE, "max_image_length": -1},
        lambda: {**_pixels_and_ids(), "pixel_mask": torch.ones(2, 32, 32, dtype=torch.long)}, ViltLayer=1,
        ViltOutput=1),
    _hf("GitModel", 2 * 2 + 2 * 2, {**_TEXT, "vision_config": _IMAGE}, _pixels_and_ids,
        GitSelfOutput=1, GitOutput=1, GitVisionEncoderLayer=2),
    _hf("TimeSeriesTransformerModel", 2 * 2 + 2 * 3, {
        "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "prediction_length": 4, "context_length": 8,
        "lags_sequence": [1, 2], "num_time_features": 1},
        lambda: {
            "past_values": torch.randn(2, 10), "past_time_features": torch.randn(2, 10, 1),
            "past_observed_mask": torch.ones(2, 10), "future_values": torch.randn(2, 4),
            "future_time_features": torch.randn(2, 4, 1)},
        TimeSeriesTransformerEncoderLayer=2, TimeSeriesTransformerDecoderLayer=3),
    _hf("PatchTSTModel", 2 * 2, {
        "d_model": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32, "context_length": 16,
        "patch_length": 4, "patch_stride": 4}, lambda: {"past_values": torch.randn(2, 16, 1)}, PatchTSTEncoderLayer=2),
)  # fmt: skip

CASES = (*TIMM, *TORCHVISION, *TRANSFORMERS)

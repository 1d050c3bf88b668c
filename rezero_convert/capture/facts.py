"""What a module or a function is, as far as residual blocks are concerned: tables of torch's own vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from torch import nn

from ..plan import NormKind

Kind = Literal[
    "linear",  # affine in its input, with a matrix or kernel as weight
    "recurrent",
    "attention",
    "embedding",
    "norm",
    "activation",
    "dropout",
    "pool",
    "pad",
    "layout",  # moves values, computes nothing: flatten, fold, shuffle, identity
    "upsample",
    "parameter",  # a get_attr node
    "unseen",  # a get_attr node: a tensor of this run that no recorded operation made
    "input",
    "other",
]


@dataclass(frozen=True, slots=True)
class Facts:
    """What the detector may know of a node or a call without looking inside."""

    kind: Kind = "other"
    type: str = ""
    """Short class name for modules, the operation's plain name for functions ("add", "layer_norm")."""
    norm: NormKind | None = None
    fused: bool = False
    """A norm that also applies an activation (timm's `BatchNormAct2d`)."""
    weight: bool = False
    """Holds a matrix or convolution weight."""
    inplace: bool = False
    """Overwrites its first tensor argument."""
    optional: bool = False
    """Static route: the module may be an identity, by a condition in `__init__`."""


_MODULES: tuple[tuple[type[nn.Module], Kind, NormKind | None], ...] = (
    (nn.LayerNorm, "norm", "layer"),
    (nn.RMSNorm, "norm", "layer"),
    (nn.modules.instancenorm._InstanceNorm, "norm", "instance"),  # derives from _NormBase, not _BatchNorm
    (nn.modules.batchnorm._BatchNorm, "norm", "batch"),
    (nn.GroupNorm, "norm", "group"),
    (nn.LocalResponseNorm, "norm", "layer"),
    (nn.Linear, "linear", None),
    (nn.Bilinear, "linear", None),
    (nn.modules.conv._ConvNd, "linear", None),
    (nn.RNNBase, "recurrent", None),
    (nn.modules.rnn.RNNCellBase, "recurrent", None),
    (nn.MultiheadAttention, "attention", None),
    (nn.Embedding, "embedding", None),
    (nn.EmbeddingBag, "embedding", None),
    (nn.modules.dropout._DropoutNd, "dropout", None),
    (nn.Identity, "layout", None),
    (nn.Flatten, "layout", None),
    (nn.Unflatten, "layout", None),
    (nn.Fold, "layout", None),
    (nn.Unfold, "layout", None),
    (nn.PixelUnshuffle, "layout", None),
    (nn.ChannelShuffle, "layout", None),
    (nn.PixelShuffle, "upsample", None),
    (nn.Upsample, "upsample", None),
)

_NAMESPACES: tuple[tuple[str, Kind], ...] = (
    ("torch.nn.modules.activation", "activation"),
    ("torch.nn.modules.pooling", "pool"),
    ("torch.nn.modules.padding", "pad"),
)


def of_class(cls: type[nn.Module]) -> Facts:
    """Facts of a module class by inheritance from torch.nn; kind "other" for anything else."""
    for base, kind, norm in _MODULES:
        if issubclass(cls, base):
            weight = kind in ("linear", "recurrent", "attention")
            return Facts(kind, cls.__name__, norm=norm, weight=weight)
    for base in cls.__mro__:
        for namespace, kind in _NAMESPACES:
            if base.__module__ == namespace:
                return Facts(kind, cls.__name__)
    return Facts("other", cls.__name__)


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_BLOCKS = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)


def is_leaf(cls: type[nn.Module]) -> bool:
    """Whether a module of this class is one node: its `forward` is torch.nn's own and holds no block."""
    home = cls.forward.__module__ or ""  # of code made by `exec` it may be None
    return home.startswith("torch.nn.") and not issubclass(cls, _CONTAINERS + _BLOCKS)


_FUNCTIONS: dict[str, Kind] = {
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d"), "linear"),
    **dict.fromkeys(("conv_transpose3d", "convolution", "addmm", "baddbmm", "bilinear"), "linear"),
    **dict.fromkeys(("embedding", "embedding_bag"), "embedding"),
    **dict.fromkeys(("multi_head_attention_forward", "scaled_dot_product_attention"), "attention"),
    **dict.fromkeys(("layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm"), "norm"),
    **dict.fromkeys(("native_layer_norm", "native_batch_norm", "native_group_norm", "local_response_norm"), "norm"),
    **dict.fromkeys(("_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "_fused_rms_norm"), "norm"),
    **dict.fromkeys(("_native_batch_norm_legit_functional", "_batch_norm_with_update", "cudnn_batch_norm"), "norm"),
    **dict.fromkeys(("relu", "relu6", "gelu", "silu", "mish", "elu", "selu", "celu", "leaky_relu"), "activation"),
    **dict.fromkeys(("hardswish", "hardsigmoid", "hardtanh", "softplus", "softsign", "tanh"), "activation"),
    **dict.fromkeys(("sigmoid", "logsigmoid", "softmax", "log_softmax", "prelu", "rrelu", "threshold"), "activation"),
    **dict.fromkeys(("glu", "tanhshrink", "softshrink", "hardshrink", "softmin"), "activation"),
    **dict.fromkeys(("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout"), "dropout"),
    **dict.fromkeys(("feature_alpha_dropout", "native_dropout", "bernoulli"), "dropout"),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d"), "pool"),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "lp_pool2d"), "pool"),
    **dict.fromkeys(("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"), "pool"),
    **dict.fromkeys(("pad", "constant_pad_nd"), "pad"),
    **dict.fromkeys(("interpolate", "upsample", "pixel_shuffle", "grid_sample"), "upsample"),
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "permute", "transpose", "contiguous"), "layout"),
    **dict.fromkeys(("squeeze", "unsqueeze", "expand", "expand_as", "view_as", "reshape_as", "movedim"), "layout"),
    **dict.fromkeys(("clone", "to", "type_as", "float", "half", "bfloat16", "double", "swapaxes"), "layout"),
    **dict.fromkeys(("t", "mT", "T", "alias", "_unsafe_view", "_to_copy", "pixel_unshuffle", "roll"), "layout"),
    **dict.fromkeys(("chunk", "split", "unbind", "narrow", "select", "getitem", "slice", "tensor_split"), "layout"),
    **dict.fromkeys(("moveaxis", "swapdims", "flip", "requires_grad", "type", "identity", "view_as_real"), "layout"),
}

_FUNCTION_NORMS: dict[str, NormKind] = {
    "layer_norm": "layer",
    "native_layer_norm": "layer",
    "rms_norm": "layer",
    "local_response_norm": "layer",
    "batch_norm": "batch",
    "native_batch_norm": "batch",
    "_native_batch_norm_legit": "batch",
    "_native_batch_norm_legit_no_training": "batch",
    "_native_batch_norm_legit_functional": "batch",
    "_batch_norm_with_update": "batch",
    "cudnn_batch_norm": "batch",
    "_fused_rms_norm": "layer",
    "group_norm": "group",
    "native_group_norm": "group",
    "instance_norm": "instance",
}


@lru_cache(maxsize=4096)
def operation(target: Any) -> str:
    """The plain name of a function or method: `torch.add`, `operator.iadd`, `"add_"`, `aten.add.Tensor` are "add"."""
    name = target if isinstance(target, str) else getattr(target, "_opname", None) or getattr(target, "__name__", "")
    name = str(name).strip("_") if str(name).startswith("__") else str(name)
    name = {"iadd": "add", "radd": "add", "isub": "sub", "rsub": "rsub", "imul": "mul", "rmul": "mul"}.get(name, name)
    name = {"subtract": "sub", "multiply": "mul", "truediv": "div", "true_divide": "div", "divide": "div"}.get(
        name, name
    )
    return name[:-1] if name.endswith("_") and not name.startswith("_") else name


def of_function(target: Any) -> Facts:
    """Facts of a torch function, tensor method or operator by its plain name."""
    name = operation(target)
    kind = _FUNCTIONS.get(name, "other")
    spelled = target if isinstance(target, str) else getattr(target, "__name__", "")
    inplace = (spelled.endswith("_") and not spelled.endswith("__")) or spelled in ("iadd", "isub", "imul", "setitem")
    weight = kind == "linear" or name == "multi_head_attention_forward"
    return Facts(kind, name, norm=_FUNCTION_NORMS.get(name), weight=weight, inplace=inplace)

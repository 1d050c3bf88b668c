"""Knowledge of particular classes, where structure alone cannot tell: one row each, with its reason."""

from __future__ import annotations

import inspect

from torch import nn

FAST_PATHS: tuple[tuple[type[nn.Module], str, str], ...] = (
    # In eval mode without gradients both call fused kernels with the raw weights of norms and layers, past every
    # rewritten line. The flag is the first condition they test, so the norms' attributes are not read either.
    (nn.TransformerEncoderLayer, "torch.backends.mha.get_fastpath_enabled()", "False"),
    (nn.TransformerEncoder, "torch.backends.mha.get_fastpath_enabled()", "False"),
)
"""(class, expression in its `forward`, what a converted instance has in its place)."""

SWITCHES: tuple[tuple[type[nn.Module], str, object], ...] = (
    # `nn.TransformerEncoder` tests this of a layer that it is to clone; 0 says that there is no fast path, and it does
    # not go on to compare the norms' `eps`.
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
)
"""(class, attribute, what a converted instance has in it)."""


def reads_are_dead(cls: type) -> bool:
    """Whether a class reads its norms' attributes only on a fast path that conversion switches off."""
    return issubclass(cls, tuple(row[0] for row in FAST_PATHS))


def text_is_of_torch(file: str, qualname: str) -> bool:
    """Whether a class read from text is one of those."""
    return any(inspect.getsourcefile(row[0]) == file and row[0].__qualname__ == qualname for row in FAST_PATHS)


DEPTH = "num_hidden_layers"
"""Where a transformers configuration keeps the number of layers: its `attribute_map` leads other names (`n_layer`) to
it. Caches are made, and some lists of layers cut, by it."""

PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Where a transformers configuration keeps lists with an entry for each layer; caches and masks are chosen by them."""

LAYER_INDEX = "layer_idx"
"""Where a transformers layer keeps its position, by which it finds its cache."""

RESETS = ("reset_parameters", "_reset_parameters")
"""What torch.nn calls the method that initializes a module's own parameters anew; `nn.MultiheadAttention` has the
second."""

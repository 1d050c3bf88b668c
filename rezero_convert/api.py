"""The public verbs: audit, convert, and their counterparts for source text. Each is the pipeline, readable in a row."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch._guards import active_fake_mode

from . import file_plan, sources
from .capture import capture
from .capture.guard import uncollected
from .capture.recorded import one_line
from .codes import BLOCKS_LEFT
from .detect import detect
from .errors import ConversionError, NoEffectWarning
from .listing import number
from .methods import METHODS
from .options import options as make_options
from .plan import Options, Plan
from .report import Report
from .rewrite import modules, restore
from .rewrite.changes import rejoined
from .rewrite.graphs import completed
from .rewrite.marker import marker
from .validation import validate


def audit(model: nn.Module, example_inputs: Any = None, **options: Any) -> Report:
    """Say for every add of a model what it is and what `convert` would do; nothing is changed.

    Args:
        model: any `nn.Module`; it is run once on fake tensors, never on its own weights if that can be avoided.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; None to have them inferred.
        **options: as for `convert`.

    Returns:
        The report: `print` it, or take `.to_dict()`. For a converted model without `example_inputs`, what was done,
        with today's alphas.

    Raises:
        ConversionError: the model cannot be captured, or an option is not valid.

    Example:
        >>> import torch, rezero_convert as rz
        >>> layer, x = torch.nn.TransformerEncoderLayer(16, 2, 32), torch.randn(5, 2, 16)
        >>> for site in rz.audit(layer, x).plan.converted:
        ...     print(site.text, "|", site.form)
        x | identity skip, post-norm
        x = self.norm2(x + self._ff_block(x)) | identity skip, post-norm
    """
    settings = make_options(**options)
    done = modules.record(model)
    if done is not None and example_inputs is None:
        return Report(done, title=_title(model), alphas=_values(model), converted=True)
    _warn_of_marker(model)
    plan = detect(capture(model, example_inputs), settings)
    return Report(plan, title=_title(model), alphas=_values(model), converted=done is not None)


def convert(
    model: nn.Module, example_inputs: Any = None, *, inplace: bool = False, verify: bool = True, **options: Any
) -> nn.Module:
    """Rewrite the residual blocks of a model into ReZero form: `x + F(x)` becomes `x + alpha * F(x)`, alpha 0.

    The result is the user's model still: instances keep their class (as a subclass), methods, hooks, state-dict keys
    and control flow. Source: Bachlechner et al., "ReZero is All You Need", UAI 2021, eq. 1.

    Args:
        model: any `nn.Module`.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments; None to have them inferred
            (transformers, timm), the model traced symbolically, or its source read with its instances' attributes.
        inplace: convert the given object, not a copy.
        verify: check the result (identity with the gates at 0, every alpha read and alive, the form of the method);
            on meta only the structure.
        **options: `method`, `alpha_init`, `drop_norm`, `activation`, `include`, `exclude`, `share`, `long_skips`,
            `norm_types`, `granularity`; see `plan.Options`. `method` names a relative of ReZero, `methods.METHODS`
            with their sources; the other options' defaults follow it.

    Returns:
        The converted model.

    Raises:
        ConversionError: the model cannot be captured or rewritten, or the result is not what the plan says. The given
            model is then as it was.

    Example:
        >>> import torch, rezero_convert as rz
        >>> layer, x = torch.nn.TransformerEncoderLayer(16, 2, 32), torch.randn(5, 2, 16)
        >>> converted = rz.convert(layer, x)
        >>> [name for name, _ in rz.alphas(converted)]
        ['alpha_self_attn', 'alpha_linear2']
        >>> torch.equal(converted(x), x)  # the identity, until the gates open
        True
        >>> isinstance(converted, torch.nn.TransformerEncoderLayer)
        True
    """
    settings = make_options(**options)
    if isinstance(model, fx.GraphModule) and active_fake_mode() is not None:
        raise ConversionError(
            "GraphModule: it is being compiled on fake tensors (AOTAutograd), where new gates would be fake and in no "
            "backward graph: convert the model, or the graph that torch.compile gives its backend"
        )
    _warn_of_marker(model)
    plan = detect(capture(model, example_inputs), settings)
    result = model if inplace else copied(model)
    if not plan.converted:
        warnings.warn(_nothing(plan), NoEffectWarning, stacklevel=2)
        if plan.of("gated") and not restore.is_converted(result):
            modules.rewrite(result, plan)  # enters the gates that are there, for `alphas` and `validate`
        return result
    with modules.rewrite(result, plan) as undo:
        if verify:
            check = validate(result, example_inputs)
            if not check.ok:
                raise ConversionError(f"{_title(model)}: the conversion does not hold: {check.failures[0]}")
        undo.pop_all()
    return result


def unconvert(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Undo `convert`: the original classes, adds and names; the weights are those of today.

    Warns of what is not as before the conversion: norms that had been dropped are made anew at their start values,
    biases that stand in for a norm's stay if they were trained, gates that had been there before keep their present
    values, and zero initializations that were undone stay so.

    Args:
        model: a converted model, or one that holds converted modules.
        inplace: restore the given object, not a copy.

    Returns:
        The unconverted model.

    Raises:
        ConversionError: a class was derived from a converted one. The given model is then as it was.

    Example:
        >>> import torch, rezero_convert as rz
        >>> layer, x = torch.nn.TransformerEncoderLayer(16, 2, 32), torch.randn(5, 2, 16)
        >>> converted = rz.convert(layer, x, alpha_init="preserve")
        >>> type(rz.unconvert(converted)) is torch.nn.TransformerEncoderLayer
        True
    """
    result = model if inplace else copied(model)
    if not restore.is_converted(result):
        warnings.warn("nothing to undo: no module of the model is converted", NoEffectWarning, stacklevel=2)
    left = restore.restore(result)
    if left:
        warnings.warn(f"not as before the conversion: {'; '.join(left)}", UserWarning, stacklevel=2)
    return result


@uncollected()
def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy; `memo` says what is not to be copied.

    Raises:
        ConversionError: the model cannot be copied.
    """
    try:
        return completed(rejoined(copy.deepcopy(model, memo), model), model)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        name = type(model).__qualname__
        raise ConversionError(f"{name} cannot be copied ({one_line(error)}); pass inplace=True") from error


@dataclass(frozen=True, slots=True)
class SourceResult:
    """A file's new text and the report on it."""

    text: str
    report: Report
    notes: tuple[str, ...] = ()
    """What became unused by the rewriting, and what was left as it is."""


@uncollected()
def convert_source(
    text: str, *, file: str = "<source>", model: nn.Module | None = None, example_inputs: Any = None, **options: Any
) -> SourceResult:
    """Rewrite the residual blocks in the text of a file; writes nothing, and executes nothing unless `model` is given.

    Args:
        text: the content of the file.
        file: its name, for the report; with `model`, the path that it was imported from.
        model: an instance of the file's classes: decides by a recorded run what the text alone leaves open.
        example_inputs: for `model`; as for `convert`.
        **options: as for `convert`.

    Raises:
        ConversionError: the text has a syntax error, the model cannot be captured, or the rewritten text does not
            compile or would be changed by a second run.

    Example:
        >>> import rezero_convert as rz
        >>> text = '''
        ... from torch import nn
        ... class Block(nn.Module):
        ...     def __init__(self, width):
        ...         super().__init__()
        ...         self.fc = nn.Linear(width, width)
        ...     def forward(self, x):
        ...         return x + self.fc(x).relu()
        ... '''
        >>> print(rz.convert_source(text).text.strip())
        import torch
        from torch import nn
        class Block(nn.Module):
            def __init__(self, width):
                super().__init__()
                self.fc = nn.Linear(width, width)
                self.alpha = nn.Parameter(torch.zeros(1))
            def forward(self, x):
                return x + self.alpha * self.fc(x).relu()
    """
    settings = make_options(**options)
    with sources.registered(file, text):
        plan = _source_plan(text, file, model, example_inputs, settings)
        plan, made = file_plan.carried_out(text, plan, file)
        if made.text != text:
            file_plan.recheck(text, made.text, file, settings, again=model is None)
    return SourceResult(made.text, Report(plan, title=file), made.notes)


@uncollected()
def audit_source(
    text: str, *, file: str = "<source>", model: nn.Module | None = None, example_inputs: Any = None, **options: Any
) -> Report:
    """What `convert_source` would do, and why not elsewhere.

    Args:
        text, file, model, example_inputs, options: as for `convert_source`.

    Raises:
        ConversionError: as `convert_source`.

    Example:
        >>> import rezero_convert as rz
        >>> text = '''
        ... from torch import nn
        ... class Sum(nn.Module):
        ...     def forward(self, x, y):
        ...         return x + y
        ... '''
        >>> for site in rz.audit_source(text, file="sum.py").plan.sites:
        ...     print(f"{site.shown}: {site.verdict} {site.code}: {site.reason}")
        sum.py:5:16: refused RZ901: the operands are independent: they come from different inputs
    """
    with sources.registered(file, text):
        plan = _source_plan(text, file, model, example_inputs, make_options(**options))
        return Report(file_plan.carried_out(text, plan, file)[0], title=file)


def _source_plan(text: str, file: str, model: nn.Module | None, example_inputs: Any, options: Options) -> Plan:
    if model is None:
        return file_plan.written(text, file, options)
    return file_plan.recorded(text, file, model, example_inputs, options)


def _warn_of_marker(model: nn.Module) -> None:
    for module in model.modules() if isinstance(model, nn.Module) else ():  # `capture` refuses other things
        found = marker(module)
        if found is not None and not restore.is_converted(module):
            name = type(module).__qualname__
            warnings.warn(
                f"the configuration of this {name} is that of a converted model (gates: {found.get('gates')}), and the "
                f"model is not: weights that were loaded into it run ungated; rezero_convert.from_pretrained({name}, "
                "path) loads both",
                UserWarning,
                stacklevel=3,
            )
            return


def _nothing(plan: Plan) -> str:
    gated = len(plan.of("gated"))
    if gated:
        done = "with the norm at its place" if METHODS[plan.options.method].placement else "gated already"
        return f"nothing was rewritten: {number(gated, 'residual block')} {done}"
    left = [site for site in plan.of("refused") if site.code in BLOCKS_LEFT]
    if left:
        others = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        return f"nothing was rewritten: {left[0].path or 'the model'}: {left[0].reason}{others}"
    return f"nothing was rewritten: no residual block among {number(len(plan.sites), 'add')} (audit() says why)"


def _title(model: nn.Module) -> str:
    return "GraphModule" if isinstance(model, fx.GraphModule) else type(model).__qualname__


def _values(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(modules.alphas(model))

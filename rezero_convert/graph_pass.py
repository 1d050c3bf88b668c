"""The rewriting as a pass of torch.fx pipelines."""

from __future__ import annotations

import warnings
from typing import Any

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from .api import audit, convert
from .capture.graphs import graph_modules, text_of
from .errors import ConversionError, NoEffectWarning
from .plan import Plan
from .rewrite.graphs import homes
from .rewrite.modules import alphas, record


class ReZeroPass(PassBase):
    """`convert` as a torch.fx pass: takes a graph module, gives one whose residual blocks are gated.

    Composes in a `torch.fx.passes.infra.pass_manager.PassManager`. Works on graphs of torch functions and leaf modules
    (`symbolic_trace`) and of ATen operators (`torch.export`, `make_fx`). Source of the rewriting: Bachlechner et al.,
    UAI 2021, eq. 1.

    Args:
        example_inputs: as for `convert`; None to take shapes and dtypes from what an earlier pass or the tracer has
            noted at the placeholders (`ShapeProp`, `torch.export`), else to trace without.
        annotate_only: change nothing; `node.meta["rezero"]` of every add tells its verdict, code, reason, path and
            alphas.
        inplace: rewrite the given graph module, not a copy of it.
        verify: check the result, as `convert` does.
        **options: as for `convert`.

    Example:
        >>> import torch, rezero_convert as rz
        >>> from torch.fx.passes.infra.pass_manager import PassManager
        >>> class Block(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc = torch.nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return x + self.fc(x).relu()
        >>> result = PassManager(passes=[rz.ReZeroPass(torch.randn(2, 4))])(torch.fx.symbolic_trace(Block()))
        >>> result.modified, [name for name, _ in rz.alphas(result.graph_module)]
        (True, ['alpha'])
    """

    def __init__(
        self,
        example_inputs: Any = None,
        *,
        annotate_only: bool = False,
        inplace: bool = False,
        verify: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self.example_inputs = example_inputs
        self.annotate_only = annotate_only
        self.inplace = inplace
        self.verify = verify
        self.options = options

    def __call__(self, graph_module: fx.GraphModule) -> PassResult:
        """Run the checks and the pass; the check after it is of the result, which may be a copy."""
        self.requires(graph_module)
        result = self.call(graph_module)
        self.ensures(result.graph_module)
        return result

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Check what is given.

        Raises:
            ConversionError: it is no graph module, or its graph or code is broken.
        """
        if not isinstance(graph_module, fx.GraphModule):
            raise ConversionError(f"a torch.fx pass takes a GraphModule, got a {type(graph_module).__name__}")
        _lint(graph_module)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Rewrite, or annotate.

        Raises:
            ConversionError: as for `convert`.
        """
        if self.annotate_only:
            annotate(graph_module, audit(graph_module, self.example_inputs, **self.options).plan)
            return PassResult(graph_module, False)
        before = _edits(graph_module)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoEffectWarning)  # `modified` says it
            result = convert(
                graph_module, self.example_inputs, inplace=self.inplace, verify=self.verify, **self.options
            )
        assert isinstance(result, fx.GraphModule)
        return PassResult(result, _edits(result) > before)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        """Check the result.

        Raises:
            ConversionError: the graph or its code is broken, or a gate is read by no node.
        """
        _lint(graph_module)
        if self.annotate_only:
            return
        inside = graph_modules(graph_module)
        read = {
            f"{path}.{node.target}" if path else str(node.target)
            for path, module in inside.items()
            for node in module.graph.nodes
            if node.op == "get_attr" and node.users
        }
        for name, _ in alphas(graph_module):
            holder = name.rpartition(".")[0]
            known = holder in inside or type(graph_module.get_submodule(holder)).forward is nn.Module.forward
            if known and name not in read:
                raise ConversionError(f"no node of the graph reads the gate {name}")


def _edits(graph_module: fx.GraphModule) -> int:
    plan = record(graph_module)
    return len(plan.edited) if plan is not None else 0


def annotate(graph_module: fx.GraphModule, plan: Plan) -> None:
    """Write the plan's verdicts to the nodes of the adds, as `node.meta["rezero"]`."""
    nodes = {path: text_of(module) for path, module in graph_modules(graph_module).items()}
    home = homes(graph_module)
    for site in plan.sites:
        path = home(site.place, site.path) if site.place is not None else None
        node = nodes[path].nodes.get(site.span.line) if path is not None and site.span is not None else None
        if node is not None:
            node.meta["rezero"] = {
                "verdict": site.verdict,
                "code": site.code,
                "reason": site.reason,
                "path": site.path,
                "alphas": tuple(gate.alpha for gate in site.gates),
            }


def _lint(graph_module: fx.GraphModule) -> None:
    try:
        graph_module.graph.lint()
    except (RuntimeError, AttributeError) as error:
        raise ConversionError(f"the graph of {type(graph_module).__name__} is broken: {error}") from error

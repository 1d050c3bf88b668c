"""Faults in the instruments: groups, tracker, isometry, growing, races."""

from __future__ import annotations

from .fault import Fault

GROUPS, TRACKER, WATCHING = "instruments/groups.py", "instruments/tracker.py", "instruments/watching.py"
SPECTRUM, STREAM = "instruments/spectrum.py", "instruments/stream.py"
GROWING = "instruments/growing.py"

FAULTS = (
    Fault(
        "gates are decayed by the optimizer's default",
        GROUPS,
        '{"params": gates, "weight_decay": 0.0}',
        '{"params": gates}',
        "test_groups.py::test_gates_without_gradient_are_not_decayed_and_others_are",
    ),
    Fault(
        "gates have the weights' rate",
        GROUPS,
        "alpha_lr = lr * _times(optimizer)",
        "alpha_lr = lr",
        "test_groups.py::test_the_gates_rate_follows_the_family_unless_it_is_given",
    ),
    Fault(
        "frozen gates are in the optimizer",
        GROUPS,
        "gates = [alpha for _, alpha in alphas(model) if alpha.requires_grad]",
        "gates = [alpha for _, alpha in alphas(model)]",
        "test_methods.py::test_frozen_gates_are_constants",
    ),
    Fault(
        "a gate stays at 0 after its ablation",
        TRACKER,
        "saved = gate.detach().clone()",
        "saved = gate.detach()",
        "test_tracker.py::test_the_effect_predicts_the_ablation_and_gates_are_put_back",
    ),
    Fault(
        "a loss that raises leaves a gate at 0",
        TRACKER,
        "                finally:\n                    gate.copy_(saved)",
        "                except ZeroDivisionError:\n                    pass\n                gate.copy_(saved)",
        "test_tracker.py::test_gates_are_put_back_when_the_loss_raises",
    ),
    Fault(
        "the first step has no row",
        TRACKER,
        "return step == 1 or step % self.every == 0",
        "return step % self.every == 0",
        "test_tracker.py::test_rows_come_at_the_first_step_and_every_so_many",
    ),
    Fault(
        "an ablation leaves the model in eval mode",
        TRACKER,
        "            module.training = flag\n",
        "            pass\n",
        "test_tracker.py::test_the_effect_predicts_the_ablation_and_gates_are_put_back",
    ),
    Fault(
        "a forward that raises leaves the mode on",
        TRACKER,
        "register_forward_hook(after, always_call=True)",
        "register_forward_hook(after)",
        "test_tracker.py::test_a_forward_that_raises_leaves_no_mode_behind",
    ),
    Fault(
        "the effect has the other sign",
        TRACKER,
        "-float((value * grad).sum())",
        "float((value * grad).sum())",
        "test_tracker.py::test_ratio_and_effect_are_those_taken_by_hand",
    ),
    Fault(
        "parallel branches are weighed against each other's sums",
        WATCHING,
        "return gate != other and self._blocks[gate] is not None and self._blocks[gate] == self._blocks[other]",
        "return gate != other and self._blocks[gate] is None",
        "test_tracker.py::test_parallel_branches_are_weighed_against_the_same_skip",
    ),
    Fault(
        "Lanczos weighs by components, not by their squares",
        SPECTRUM,
        "return Sample(values, vectors[:, 0].square())",
        "return Sample(values, vectors[:, 0].abs())",
        "test_isometry.py::test_lanczos_agrees_with_the_whole_spectrum_within_its_error_bars",
    ),
    Fault(
        "Lanczos does not orthogonalize again",
        SPECTRUM,
        "    for _ in range(2 if basis else 0):\n",
        "    for _ in range(0 if basis else 0):\n",
        "test_isometry.py::test_lanczos_agrees_with_the_whole_spectrum_within_its_error_bars",
    ),
    Fault(
        "a branch's share is its ratio to the skip",
        STREAM,
        "share = added / (added + carried) if added + carried else 0.0",
        "share = added / carried if carried else 0.0",
        "test_isometry.py::test_share_and_variances_are_those_of_the_tensors",
    ),
    Fault(
        "blocks that grew and do not hold are given out",
        GROWING,
        "    if not before or not all(identical(one, other) for one, other in zip(before, after, strict=True)):",
        "    if not before:",
        "test_growing.py::test_blocks_with_more_than_gated_branches_are_refused_by_their_outputs",
    ),
    Fault(
        "new blocks that do not run are given out",
        GROWING,
        "    check = validate(model, example_inputs)\n    if not check.ok:",
        "    check = validate(model, example_inputs)\n    if not check.blocks:",
        "test_growing.py::test_new_blocks_that_do_not_run_are_refused_and_nothing_is_left",
    ),
    Fault(
        "new parameters are in the first group",
        GROWING,
        "        joined = groups.get(id(source))\n",
        "        joined = groups.get(id(source)) and optimizer.param_groups[0]\n",
        "test_growing.py::test_an_optimizer_goes_on",
    ),
)

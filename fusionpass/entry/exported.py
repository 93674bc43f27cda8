"""Exported programs: a rewritten graph in a program whose signatures name the new nodes.

A program may keep the call signatures of modules (`preserve_module_call_signature`), and `torch.export.unflatten` builds
modules from these again. Nodes that they name must stay. And an op inside such a module may read from outside only what goes
into the module.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch.export import ExportedProgram
from torch.fx import Node

from fusionpass.engine import run
from fusionpass.graph.copying import editable
from fusionpass.graph.gradients import as_in_training
from fusionpass.graph.nodes import is_reshape
from fusionpass.graph.refusal import Refusal
from fusionpass.options import Options
from fusionpass.report.records import Outcome
from fusionpass.rules.site import Site


def rewrite_exported(program: ExportedProgram, options: Options) -> tuple[ExportedProgram, Outcome]:
    """A new program around the rewritten graph. Its signatures have the new names of renamed values."""
    graph_module = editable(program.graph_module)
    boundaries = Boundaries(program)
    with as_in_training(graph_module):
        outcome = run(graph_module, options, keeps=boundaries.crossed if boundaries.modules else None)
    signature, calls = program.graph_signature, list(program.module_call_graph)
    if outcome.renamed:
        signature, calls = copy.deepcopy(signature), copy.deepcopy(calls)
        for spec in signature.output_specs:
            _rename(spec.arg, outcome.renamed)
        for call in calls:
            for argument in (*call.signature.inputs, *call.signature.outputs) if call.signature is not None else ():
                _rename(argument, outcome.renamed)
    new_program = ExportedProgram(
        root=graph_module,
        graph=graph_module.graph,
        graph_signature=signature,
        state_dict=program.state_dict,
        range_constraints=dict(program.range_constraints),
        module_call_graph=calls,
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )
    return new_program, outcome


def _rename(argument: Any, renamed: dict[str, str]) -> None:
    """Let an argument of a signature name the node that now computes its value."""
    name = getattr(argument, "name", None)  # a constant has none
    if name in renamed:
        argument.name = renamed[name]


class Boundaries:
    """The calls of modules whose signatures a program keeps, and what crosses them.

    Attributes:
        modules: a call's name (`block`, for its second call `block@1`) -> the names of what goes in and what comes out.
    """

    def __init__(self, program: ExportedProgram):
        self.modules: dict[str, tuple[set[str], set[str]]] = {}
        self._handed_in = set(program.graph_signature.user_inputs)
        for call in program.module_call_graph:
            if call.signature is not None and call.fqn:
                given, results = call.signature.inputs, call.signature.outputs
                self.modules[call.fqn] = _names(given), _names(results)

    def crossed(self, site: Site, renamed: dict[str, str]) -> Refusal | None:
        """Why the site, as far as it has grown, may not be one op; None if every boundary stays as it is."""
        before = {new: old for old, new in renamed.items()}
        results = site.results
        reads = [operand.value for operand in site.operands.values() if isinstance(operand.value, Node)]
        gone = list(_taken(site, {*results, *reads}))
        for node in (*gone, *(results if site.op.several else ())):
            for module, (given, out) in self.modules.items():
                if node.name in given or node.name in out:
                    template = _RETURNED if node.name in out else _GIVEN
                    return Refusal("kept-module", template + ("" if node in gone else _ELEMENT), node, module)
        inside = self._around(site.end)
        for other in results[1:]:
            for module in inside ^ self._around(other):
                return Refusal("kept-module", _PARTED, site.end, other, module)
        for node in reads:
            if node.op == "placeholder" and node.name not in self._handed_in:  # a parameter: every module can reach it
                continue
            name = before.get(node.name, node.name)
            for module in inside - self._around(node):
                if name not in self.modules[module][0]:
                    return Refusal("kept-module", _NOT_GIVEN, site.end, module, node)
            for module in self._around(node) - inside:
                if name not in self.modules[module][1]:
                    return Refusal("kept-module", _NOT_RETURNED, module, node, site.end)
        return None

    def _around(self, node: Node) -> set[str]:
        """The kept modules that the node is computed in."""
        stack = node.meta.get("nn_module_stack") or {}
        return {_call(key, path) for key, (path, _) in stack.items()} & self.modules.keys()


_GIVEN = "{} goes into module {}, whose call signature the program keeps"
_RETURNED = "{} is what module {} returns, and the program keeps the module's call signature"
_ELEMENT = ", which names no element of an op's results"
_PARTED = "{} and {}: one lies inside module {}, one outside, and the program keeps the module's call signature"
_NOT_GIVEN = "{} lies in module {}, whose call signature the program keeps, and {} does not go into that module"
_NOT_RETURNED = "module {}, whose call signature the program keeps, does not return {}, which {} needs"


def _call(key: str, path: str) -> str:
    """The name of a module's call, as in the module call graph: the second call of `block` is `block@1`."""
    return f"{path}@{key.rpartition('@')[2]}" if "@" in key else path


def _names(arguments: list[Any]) -> set[str]:
    return {argument.name for argument in arguments if getattr(argument, "name", None)}


def _taken(site: Site, kept: set[Node]) -> Iterator[Node]:
    """The nodes that may go with the site: its own, and the views that only they read."""
    for part in site.parts:
        for node in (part, *part.all_input_nodes):
            while node not in kept and (node is part or is_reshape(node)):
                yield node
                if not (is_reshape(node) and node.all_input_nodes):
                    break
                node = node.all_input_nodes[0]

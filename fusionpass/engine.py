"""The pass over one captured graph and its child graphs: find, grow, judge, replace, record."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Container, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fusionpass import ops  # noqa: F401  registers torch.ops.fusionpass
from fusionpass.copying import child_graphs
from fusionpass.cost import left_to_inner
from fusionpass.effects import Effects
from fusionpass.guards import judge, one_dtype
from fusionpass.match import Refusal, Site
from fusionpass.nodes import readers
from fusionpass.options import Options
from fusionpass.pattern import ANCHORS, find
from fusionpass.provenance import module_of, source_of
from fusionpass.records import Miss, Rewrite
from fusionpass.replace import insert, take_over
from fusionpass.stages import STAGES
from fusionpass.stages.common import narrow_to, narrowed
from fusionpass.statements import redirect, restore
from fusionpass.tensors import PLAIN_TYPES, dtype_text, tensor_of
from fusionpass.traffic import counted_against, fused, kept, unfused
from fusionpass.validate import validate
from fusionpass.vocabulary import Vocabulary

log = logging.getLogger(__name__)


@dataclass
class Outcome:
    """What the pass did to one captured graph, child graphs included; `graph` indices are for the report to set."""

    nodes: int = 0
    rewrites: list[Rewrite] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)  # outermost graph: a value's old node -> its new one, by name
    switched_off: bool = False  # PyTorch's tools kept the pass from running


def run(
    graph_module: GraphModule,
    options: Options,
    *,
    foreign: str = "",
    tuned: bool = False,
    keeps: Callable[[Site, dict[str, str]], Refusal | None] | None = None,
    among: Container[Node] | None = None,
) -> Outcome:
    """Rewrite `graph_module` in place and say what was done.

    Args:
        foreign: when not empty, why no site may be rewritten: the type of a tensor subclass among the graph's inputs.
            Dynamo's graph shows plain tensors in its place, so the inputs themselves have to be asked.
        tuned: the inner compiler is Inductor in a mode that tunes its kernels.
        keeps: says of a site of the outermost graph, after each step of its growth, why what owns the graph needs nodes of
            it to stay; it is given what was renamed so far.
        among: when given, only sums that are in it are looked at; what a site grows over may lie outside.

    Raises:
        VerificationFailed: under `options.verify`, for a site that gives other values; the graph is then of no use.
    """
    outcome = Outcome()
    _Pass(options, foreign, tuned, outcome, graph_module, keeps, among).over(graph_module, inside_functorch=False)
    if not log.isEnabledFor(logging.INFO):
        return outcome
    for miss in outcome.misses:
        log.info("%s: missed %s: %s [%s/%s]", miss.source, miss.node, miss.reason, miss.rule, miss.code)
    for rewrite in outcome.rewrites:
        log.info("%s: %s -> %s %s", rewrite.source, ", ".join(rewrite.nodes), rewrite.replacement, rewrite.module)
    return outcome


@dataclass
class _Pass:
    """One run, over a graph and the graphs within it."""

    options: Options
    foreign: str
    tuned: bool
    outcome: Outcome
    root: GraphModule
    keeps: Callable[[Site, dict[str, str]], Refusal | None] | None = None
    among: Container[Node] | None = None
    seen: set[int] = field(default_factory=set)

    def over(self, gm: GraphModule, inside_functorch: bool) -> None:
        if id(gm) in self.seen:  # a child that several higher-order calls share
            return
        self.seen.add(id(gm))
        words = Vocabulary(gm)
        self.outcome.nodes += len(gm.graph.nodes)
        operations = [(node, words.operation(node)) for node in gm.graph.nodes]
        sums = [node for node, operation in operations if operation in ANCHORS and self.asked(node)]
        in_place = [node for node, operation in operations if operation is not None and operation.endswith("_")]
        redirected = redirect(gm.graph, in_place, words)
        effects: Effects | None = None
        gone: set[str] = set()  # names of nodes that a site before has taken in
        for add in sums:
            readings = [] if add.name in gone else list(find(words, add))
            if not readings:
                continue
            effects = effects or Effects(gm, inside_functorch)
            site, refusal = self.judged(readings, words, effects, self.kept if gm is self.root else None)
            if refusal is not None:
                self.outcome.misses.append(_miss(add, refusal))
                continue
            self.outcome.rewrites.append(self.replace(gm, site, words, effects))
            gone.update(self.outcome.rewrites[-1].nodes)
        restore(gm.graph, redirected)
        if gone:
            gm.recompile()
        children = child_graphs(gm)
        if children:  # asked once, not once per child: a model may have one per layer
            inside = _inside_functorch(gm, children, effects or Effects(gm, inside_functorch))
        for path, child in children.items():
            self.over(child, path in inside)

    def asked(self, node: Node) -> bool:
        return self.among is None or node in self.among

    def kept(self, site: Site) -> Refusal | None:
        return self.keeps(site, self.outcome.renamed) if self.keeps is not None else None

    def judged(self, readings, words: Vocabulary, effects: Effects, kept) -> tuple[Site | None, Refusal | None]:
        """The site to replace, grown as far as it goes; or the one that comes nearest, and why it is left alone."""
        site, refusal = _choose(readings, effects, self.foreign)
        refusal = refusal or one_dtype(site, self.options)
        if refusal is None and kept is not None:
            refusal = kept(site)
        if refusal is not None:
            return site, refusal
        _grow(site, words, effects, self.options, kept)
        if self.options.profitable_only:
            refusal = left_to_inner(site, effects, self.options, tuned=self.tuned)
        return site, refusal

    def replace(self, gm: GraphModule, site: Site, words: Vocabulary, effects: Effects) -> Rewrite:
        total = tensor_of(site.end)
        inner = self.options.inner
        kernels_before, bytes_before = unfused(site, words, inner, self.tuned)
        kernels_fused, bytes_fused = fused(site, words, inner, self.tuned)
        module, source = module_of(site.add), source_of(site.add)
        stopped = [{"stage": name, "code": refusal.code, "reason": refusal.reason} for name, refusal in site.stopped]
        inserted = insert(gm.graph, site, self.options)
        verified = validate(gm, site, inserted, self.options) if self.options.verify else None
        new, gone, renamed = take_over(gm.graph, site, inserted, effects)
        kernels_kept, bytes_kept = kept([part for part in site.parts if part.name not in gone], words, inner)
        if gm is self.root:  # names of a child graph's nodes say nothing outside it
            self.outcome.renamed |= renamed
        return Rewrite(
            rule="gated_add",
            stages=list(site.stages),
            nodes=gone,
            replacement=new.name,
            module=module,
            source=source,
            shape=[size if isinstance(size, int) else str(size) for size in total.shape],
            dtype=dtype_text(total.dtype),
            kernels_before=kernels_before,
            kernels_after=kernels_fused + kernels_kept,
            bytes_before=bytes_before,
            bytes_after=None if None in (bytes_fused, bytes_kept) else bytes_fused + bytes_kept,
            graph=0,
            stopped=stopped,
            verified=verified,
            against=counted_against(inner),
        )


def _choose(readings: list[tuple[Site, Refusal | None]], effects: Effects, foreign: str) -> tuple[Site, Refusal | None]:
    """The first reading every guard accepts; else the one whose nodes stand closest together, with its refusal."""
    refused: list[tuple[Site, Refusal]] = []
    for site, obstacle in readings:
        refusal = obstacle or judge(site, effects)
        if refusal is None and foreign:
            refusal = Refusal("subclass", "an input of the graph is a {}", foreign)
        if refusal is None:
            return site, None
        refused.append((site, refusal))
    direct = [(site, refusal) for (site, refusal), (_, obstacle) in zip(refused, readings, strict=True) if not obstacle]
    return (direct or refused)[0]


def _inside_functorch(gm: GraphModule, children: Collection[str], effects: Effects) -> set[str]:
    """Paths of the child graphs that run inside a level of torch.func."""
    found = set()
    for node in gm.graph.nodes if effects.has_levels else ():
        child = node.op in ("get_attr", "call_module") and node.target in children
        if child and any(effects.inside_functorch(caller, caller) for caller in (*node.users, node)):
            found.add(str(node.target))
    return found


def _grow(site: Site, words: Vocabulary, effects: Effects, options: Options, kept) -> None:
    for stage in STAGES:
        name = stage.INFO.name
        if not options.allows(name):
            refusal = Refusal("not-allowed", "option 'rules' leaves out {}", name)
        else:
            before = {key: list(value) if isinstance(value, list) else value for key, value in vars(site).items()}
            refusal = stage.grow(site, words, effects, options)
            if refusal is None and kept is not None and (refusal := kept(site)) is not None:
                vars(site).update(before)
        if refusal is not None:
            site.stopped.append((name, refusal))
    cast = narrowed(site.end) if options.numerics == "fp32" and not site.residual_written else None
    if cast is not None and readers(site.end) == [cast] and effects.state_change_between(site.end, cast) is None:
        before = site.end, list(site.parts)
        narrow_to(site, cast)
        if kept is not None and kept(site) is not None:
            site.end, site.parts = before


def _miss(add: Node, refusal: Refusal) -> Miss:
    return Miss(add.name, "gated_add", refusal.code, refusal.reason, module_of(add), source_of(add), graph=0)


def foreign_type(values: Iterable[Any] | None) -> str:
    """Name of the first tensor subclass among a graph's inputs that tracers show as a plain tensor, "" when there is none.

    Wrapper subclasses (DTensor, quantised weights) keep their type in the graph, so each site's own operands decide.
    """
    for value in values or ():
        if not isinstance(value, torch.Tensor) or is_traceable_wrapper_subclass(value):
            continue
        if type(value) not in PLAIN_TYPES:
            return type(value).__name__
    return ""

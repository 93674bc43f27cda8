"""The pass over one captured graph and its child graphs: find, grow, judge, replace, record."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Container, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fusionpass.graph.copying import child_graphs
from fusionpass.graph.effects import Effects
from fusionpass.graph.identity import torch_name
from fusionpass.graph.nodes import readers
from fusionpass.graph.provenance import module_of, source_of
from fusionpass.graph.refusal import Refusal
from fusionpass.graph.statements import redirect, restore
from fusionpass.graph.tensors import PLAIN_TYPES, dtype_text, tensor_of
from fusionpass.graph.vocabulary import Vocabulary
from fusionpass.options import Options
from fusionpass.report.records import Miss, Outcome, Rewrite
from fusionpass.rules import Chosen, chosen
from fusionpass.rules.cost import left_to_inner
from fusionpass.rules.replace import insert, take_over
from fusionpass.rules.rule import Reading, Rule
from fusionpass.rules.same_results import same_shape
from fusionpass.rules.site import Site
from fusionpass.rules.stages.common import narrowed
from fusionpass.rules.traffic import counted_against, fused, kept, unfused
from fusionpass.rules.verify import validate

log = logging.getLogger(__name__)


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
        foreign: the type of a tensor subclass among the graph's inputs, or empty. If it is not empty, no site may be
            rewritten. Dynamo's graph shows plain tensors in its place, so the inputs themselves have to be asked.
        tuned: the inner compiler is Inductor in a mode that tunes its kernels.
        keeps: called with a site of the outermost graph, after each step of its growth, and with what was renamed so far.
            It says why the graph's owner needs nodes of the site to stay.
        among: if given, only sums in it are looked at. The nodes that a site grows over may lie outside.

    Raises:
        VerificationFailed: under `options.verify`, for a site that gives other values. The graph must not be used then.
    """
    outcome = Outcome(absent=tuple(rule.absent for rule, *_ in chosen(options.rules)))
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
    """One run, over a graph and its child graphs."""

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
        graph = _OneGraph(gm, inside_functorch, self)
        self.outcome.nodes += len(gm.graph.nodes)
        graph.rewrite()
        children = child_graphs(gm)
        if children:  # asked once, not once per child: a model may have one per layer
            inside = _inside_functorch(gm, children, graph.effects)
        for path, child in children.items():
            self.over(child, path in inside)

    def asked(self, node: Node) -> bool:
        return self.among is None or node in self.among

    def kept(self, gm: GraphModule, site: Site) -> Refusal | None:
        """Why the graph's owner needs nodes of the site to stay. Only the outermost graph has such an owner."""
        if self.keeps is None or gm is not self.root:
            return None
        return self.keeps(site, self.outcome.renamed)


class _OneGraph:
    """The pass over one graph, without its child graphs."""

    def __init__(self, gm: GraphModule, inside_functorch: bool, whole: _Pass):
        self.gm = gm
        self.whole = whole
        self.options, self.outcome = whole.options, whole.outcome
        self.words = Vocabulary(gm)
        self._inside_functorch = inside_functorch

    @cached_property
    def effects(self) -> Effects:
        """Built only if there is a reading, since it takes longer than finding out that there is none."""
        return Effects(self.gm, self._inside_functorch)

    def rewrite(self) -> None:
        graph, words = self.gm.graph, self.words
        operations = [(node, words.operation(node)) for node in graph.nodes]
        rules = chosen(self.options.rules)
        beginnings = [(rule, self._anchored(rule.rule, operations)) for rule in rules]
        in_place = [node for node, operation in operations if operation is not None and operation.endswith("_")]
        redirected = redirect(graph, in_place, words)
        gone: set[str] = set()  # names of nodes that an earlier site has taken in
        for rule, anchors in beginnings:
            for anchor in anchors:
                readings = [] if anchor.name in gone else list(rule.rule.find(words, anchor))
                if not readings:
                    continue
                site, refusal = self.judged(rule, readings)
                if refusal is not None:
                    self.outcome.misses.append(_miss(anchor, rule.rule, refusal))
                    continue
                self.outcome.rewrites.append(self.replace(rule.rule, site))
                gone.update(self.outcome.rewrites[-1].nodes)
        restore(graph, redirected)
        if gone:
            self.gm.recompile()

    def _anchored(self, rule: Rule, operations: Sequence[tuple[Node, str | None]]) -> list[Node]:
        """The nodes at which a reading of the rule may begin."""
        begins, asked = rule.begins_at, self.whole.asked
        found = [node for node, operation in operations if operation in begins and asked(node)]
        if rule.has_other_words:
            others = (node for node, operation in operations if operation is None and torch_name(node) in begins)
            position = {node: index for index, (node, _) in enumerate(operations)}
            found = sorted((*found, *filter(asked, others)), key=position.__getitem__)
        return found

    def judged(self, rule: Chosen, readings: Sequence[Reading]) -> tuple[Site, Refusal | None]:
        """The site to replace, grown as far as possible; or the nearest one, and why it is left alone."""
        site, refusal = _choose(rule.rule, readings, self.effects, self.options.numerics, self.whole.foreign)
        if refusal is None and self.options.numerics == "eager":
            refusal = rule.rule.bits(site)
        refusal = refusal or self.whole.kept(self.gm, site)
        if refusal is not None:
            return site, refusal
        site = self.grown(rule, site)
        if self.options.profitable_only:
            tuned = self.whole.tuned
            joined = (stage for stage in rule.stages if stage.name in site.stages)
            saved = sum(each.saves(site, tuned) for each in (rule.rule, *joined))
            refusal = left_to_inner(site, self.effects, self.options.inner, saved, tuned)
        return site, refusal

    def grown(self, rule: Chosen, site: Site) -> Site:
        stopped: list[tuple[str, Refusal]] = []
        yielded: dict[str, Site] = {}  # the site to which the stage had nothing to add
        before: list[Site] = []
        for stage in rule.stages:
            if stage.name in rule.left_out:
                larger = Refusal("not-allowed", "option 'rules' leaves out {}", stage.name)
            else:
                larger = stage.grow(site, self.words, self.effects)
            refusal = self.whole.kept(self.gm, larger) if isinstance(larger, Site) else larger
            if refusal is None:
                before.append(site)
                site = larger
            else:
                stopped.append((stage.name, refusal))
                if refusal.code in stage.yields:
                    yielded[stage.name] = site
        while before and (refusal := same_shape(site)) is not None:
            smaller = before.pop()
            (dropped,) = set(site.stages) - set(smaller.stages)
            stopped.append((dropped, refusal))
            site = smaller
        why = [(name, _settled(no, yielded[name], site) if name in yielded else no) for name, no in stopped]
        return self.narrowed(site).changed(stopped=why)

    def narrowed(self, site: Site) -> Site:
        """The site with the cast of its float32 sum, if nothing else reads the sum: the op then stores the cast's result."""
        if self.options.numerics != "fp32" or site.written_back is not None or not site.op.stores:
            return site
        end = site.end
        cast = narrowed(end)
        if cast is None or readers(end) != [cast] or self.effects.state_change_between(end, cast) is not None:
            return site
        narrow = site.changed(results=[cast, *site.results[1:]], parts=[*site.parts, cast])
        return site if self.whole.kept(self.gm, narrow) is not None else narrow

    def replace(self, rule: Rule, site: Site) -> Rewrite:
        total = tensor_of(site.end)
        inner, words, tuned, graph = self.options.inner, self.words, self.whole.tuned, self.gm.graph
        kernels_before, bytes_before = unfused(site, words, inner, tuned)
        kernels_fused, bytes_fused = fused(site, words, inner, tuned)
        module, source = module_of(site.anchor), source_of(site.anchor)
        stopped = [{"stage": name, "code": refusal.code, "reason": refusal.reason} for name, refusal in site.stopped]
        inserted = insert(graph, site)
        verified = validate(self.gm, site, inserted) if self.options.verify else None
        new, gone, renamed = take_over(graph, site, inserted, self.effects)
        kernels_kept, bytes_kept = kept([part for part in site.parts if part.name not in gone], words, inner)
        if self.gm is self.whole.root:  # names of a child graph's nodes say nothing outside it
            self.outcome.renamed |= renamed
        return Rewrite(
            rule=rule.name,
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


def _choose(
    rule: Rule, readings: Sequence[Reading], effects: Effects, numerics: str, foreign: str
) -> tuple[Site | None, Refusal | None]:
    """The first reading that every guard accepts. If there is none: the one with the closest nodes, and its refusal."""
    refused: list[tuple[Site | None, Refusal]] = []
    for found, obstacle in readings:
        site, refusal = found, obstacle
        if refusal is None:
            site = found.changed(op=rule.op, stages=[rule.name])
            refusal = next((no for guard in rule.guards if (no := guard(site, effects)) is not None), None)
        if refusal is None and foreign:
            refusal = Refusal("subclass", "an input of the graph is a {}", foreign)
        if refusal is None:
            # Whether the op can be called with these numerics is asked later, by `bits`. The guards ask the op without them.
            return site.changed(numbers={**site.numbers, "numerics": numerics}), None
        refused.append((site, refusal))
    direct = [(site, refusal) for (site, refusal), (_, obstacle) in zip(refused, readings, strict=True) if not obstacle]
    return (direct or refused)[0]


def _settled(refusal: Refusal, then: Site, now: Site) -> Refusal:
    """The refusal, or another one if a later stage took what the stage did not find: a residual the add, say."""
    taken = set(now.parts).difference(then.parts)
    named = [argument for argument in refusal.args if isinstance(argument, Node)] or [then.end]
    if any(node in taken or taken.issuperset(readers(node) or [node]) for node in named):
        return Refusal("not-there", "what follows {} belongs to a later stage", then.end)
    return refusal


def _inside_functorch(gm: GraphModule, children: Collection[str], effects: Effects) -> set[str]:
    """Paths of the child graphs that run inside a level of torch.func."""
    found = set()
    for node in gm.graph.nodes if effects.has_levels else ():
        child = node.op in ("get_attr", "call_module") and node.target in children
        if child and any(effects.inside_functorch(caller, caller) for caller in (*node.users, node)):
            found.add(str(node.target))
    return found


def _miss(anchor: Node, rule: Rule, refusal: Refusal) -> Miss:
    return Miss(anchor.name, rule.name, refusal.code, refusal.reason, module_of(anchor), source_of(anchor), graph=0)


def foreign_type(values: Iterable[Any] | None) -> str:
    """Name of the first tensor subclass among a graph's inputs that tracers show as a plain tensor, "" if there is none.

    Wrapper subclasses (DTensor, quantised weights) keep their type in the graph, so the operands of each site decide.
    """
    for value in values or ():
        if not isinstance(value, torch.Tensor) or is_traceable_wrapper_subclass(value):
            continue
        if type(value) not in PLAIN_TYPES:
            return type(value).__name__
    return ""

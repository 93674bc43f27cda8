"""A fused function inside somebody's `torch.compile`: the graph is theirs, so the pass goes in front of their backend.

While Dynamo reads a fused function, it calls `enter` and `leave` (PyTorch's `comptime`). Once per graph, these put a
`Reached` in the place of the backend that will get the graph. They mark the nodes recorded in between. The sums among
the marked nodes are rewritten. The nodes that a site grows over may lie outside. If fused functions are nested, the
outermost one counts.

A graph break within the function ends the marking. Dynamo then starts again, calls the function from Python, and would
compile its pieces separately. So the function is called through its own `torch.compile`, whose backend `Late` does what
`Reached` does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from fusionpass.engine import foreign_type, run
from fusionpass.entry import backend, collecting, nothing_rewritten
from fusionpass.entry.cache_key import in_cache_keys
from fusionpass.entry.calls import noting
from fusionpass.entry.compiled_function import Place, place_of
from fusionpass.entry.inner_compiler import Compiled, layout_kept, tunes
from fusionpass.errors import NothingRewritten, VerificationFailed
from fusionpass.graph.copying import child_graphs
from fusionpass.operators.functions import call_directly
from fusionpass.operators.in_inductor import ops_opened
from fusionpass.options import Options
from fusionpass.report.records import Outcome

_MARK = "fusionpass_target"  # in a node's meta, until the pass has read it


@dataclass(eq=False)
class Target:
    """One fused function, as the graphs of others know it."""

    name: str
    options: Options
    compiler: Callable[..., Any] | None = None  # the backend of the last compilation that read the function
    said: set[str] = field(default_factory=set)

    def aside(self, who: str) -> None:
        """Say once that the function is recorded as it is written. Under `strict`, raise this each time."""
        if who not in self.said or self.options.strict:
            self.said.add(who)
            nothing_rewritten.nothing(_ASIDE[who].format(name=self.name, who=who), self.options)

    def unreached(self) -> None:
        """The same if the graph is somebody's and the pass cannot get into it."""
        if "unreached" not in self.said or self.options.strict:
            self.said.add("unreached")
            nothing_rewritten.nothing(_UNREACHED.format(name=self.name, torch=torch.__version__), self.options)


_UNREACHED = (
    "0 rewritten: in torch {torch} the fused {name} cannot reach the backend of the torch.compile around it; "
    'write torch.compile(model, backend="fusionpass", options={{"inner": "inductor"}}) there, with your backend for inner'
)
_AS_WRITTEN = "0 rewritten: {who} records the fused {name} as it is written"
_ASIDE = {
    "torch.export": f"{_AS_WRITTEN}; call fusionpass.rewrite(exported_program) on what it returns",
    "make_fx": f"{_AS_WRITTEN}; call fusionpass.rewrite(graph_module) on what it returns",
    "torch.fx.symbolic_trace": f"{_AS_WRITTEN}; call fusionpass.rewrite(graph_module, example_inputs) on what it returns",
    "torch.jit.trace": f"{_AS_WRITTEN}, and TorchScript is not rewritten; use torch.export and fusionpass.rewrite",
    "a torch.func transform": "0 rewritten: under {who} the fused {name} runs as it is written",
}


def comptime_hooks(target: Target) -> tuple[Callable[[Any], None], Callable[[Any], None]]:
    """`enter` and `leave`, for `comptime` at the two ends of the function."""

    def enter(context: Any) -> None:
        output = _output(context)
        if output is None:
            _through_dynamo(target.unreached)
            return
        if output.export or torch.compiler.is_exporting():
            _through_dynamo(lambda: target.aside("torch.export"))
            return
        if not isinstance(output.compiler_fn, Reached):
            target.compiler = output.compiler_fn
            if Outer.of(output.compiler_fn).ours:
                return
            output.compiler_fn = Reached(output.compiler_fn)
        target.compiler = output.compiler_fn.compiler
        output.compiler_fn.enter(target, output.current_tracer.graph)

    def leave(context: Any) -> None:
        output = _output(context)
        if output is not None and isinstance(output.compiler_fn, Reached):
            output.compiler_fn.leave(target, output.current_tracer.graph)

    return enter, leave


def _output(context: Any) -> Any:
    """Dynamo's OutputGraph of the frame that is being read; None if this torch does not have what is needed."""
    reader = getattr(context, "_i_will_not_complain_if_bc_breaks_InstructionTranslator", None)
    output = None if reader is None else reader().output
    return output if all(hasattr(output, name) for name in ("export", "compiler_fn", "current_tracer")) else None


class Reached:
    """The backend of one graph, with the pass in front of it for the fused functions that the graph holds."""

    def __init__(self, compiler: Callable[..., Any]):
        self.compiler = compiler
        self.__name__ = getattr(compiler, "__name__", type(compiler).__name__)  # Dynamo's messages name it
        self._open: list[tuple[Target, Graph, Node | None]] = []

    def enter(self, target: Target, graph: Graph) -> None:
        self._open.append((target, graph, next(iter(reversed(graph.nodes)), None)))

    def leave(self, target: Target, graph: Graph) -> None:
        """Mark the nodes since `enter`. An `enter` without a `leave` belongs to a function that raised."""
        while self._open:
            entered, its_graph, last = self._open.pop()
            if entered is target and its_graph is graph:
                for node in reversed(graph.nodes):
                    if node is last:
                        break
                    node.meta[_MARK] = target
                return

    def __call__(self, graph_module: GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Compiled:
        sums = _marked(graph_module)
        compiler = functools.partial(self.compiler, **kwargs) if kwargs else self.compiler
        # The graph holds the whole fused function, even if it is a piece of something else.
        place = Place(place_of(graph_module).function, piece=False)
        return compile_reached(graph_module, example_inputs, compiler, sums, place)


def _marked(graph_module: GraphModule) -> dict[Target, set[Node]]:
    """The nodes of each fused function, in the graph and in its child graphs. The marks are removed."""
    found: dict[Target, set[Node]] = {}
    for node, target in _marks(graph_module, None):
        found.setdefault(target, set()).add(node)
    return found


def _marks(graph_module: GraphModule, of_all: Target | None) -> Iterator[tuple[Node, Target]]:
    called = {}
    for node in graph_module.graph.nodes:
        target = node.meta.pop(_MARK, None)
        target = of_all or target  # a child graph belongs as a whole to the outermost function that calls it
        if target is not None:
            yield node, target
            if node.op in ("get_attr", "call_module"):
                called[str(node.target)] = target
    for path, child in child_graphs(graph_module).items():
        yield from _marks(child, called.get(path))


class Late:
    """The backend for the pieces of a fused function in which a graph breaks. `Reached` is the one for a whole function.

    The pieces are compiled once, for the compilation that met the break first. A later compilation of the same function with
    another backend uses them as they are.
    """

    def __init__(self, target: Target):
        self.target = target
        self.__name__ = "fusionpass"

    def __call__(self, graph_module: GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Compiled:
        compiler = self.target.compiler
        if Outer.of(compiler).ours:
            return compiler(graph_module, example_inputs)
        place = place_of(graph_module)
        return compile_reached(graph_module, example_inputs, compiler, {self.target: None}, place)


def compile_reached(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    compiler: Callable[..., Any],
    sums: dict[Target, set[Node] | None],
    place: Place,
) -> Compiled:
    """The graph, rewritten for each fused function with that function's options, then compiled by `compiler`.

    sums: for each function, the nodes that are looked at; None means all.
    """
    if not sums:
        return compiler(graph_module, example_inputs)
    outer = Outer.of(compiler)
    outcomes: dict[Target, Outcome] = {}
    foreign = foreign_type(example_inputs)

    def work(gm: GraphModule) -> Outcome:
        for target, among in sums.items():
            options = replace(target.options, inner=outer.inner, mode=None, inductor={})
            outcomes[target] = run(gm, options, foreign=foreign, tuned=outer.tuned, among=among)
        return _together(outcomes.values())

    outcome, ran = _through_dynamo(lambda: backend.passed_over(graph_module, work))
    for target in sums:
        own = outcomes.get(target, outcome)  # the whole outcome if PyTorch's tools switched the pass off
        _through_dynamo(lambda own=own, target=target: nothing_rewritten.after_graph(own, target.options, place))
    if outer.inner == "eager" and outcome.rewrites:
        call_directly(graph_module)
    with (
        ops_opened(outer.inner == "inductor"),
        outer.settings(graph_module, bool(outcome.rewrites)),
        in_cache_keys() if outcome.rewrites else nullcontext(),
    ):
        compiled = compiler(graph_module, example_inputs)
    return collecting.counted(noting(compiled, outcome), ran)


def _together(outcomes: Sequence[Outcome]) -> Outcome:
    first, *rest = outcomes
    whole = replace(first, rewrites=list(first.rewrites), misses=list(first.misses), renamed=dict(first.renamed))
    for outcome in rest:
        whole.rewrites += outcome.rewrites
        whole.misses += outcome.misses
        whole.renamed |= outcome.renamed
    return whole


@dataclass(frozen=True)
class Outer:
    """What is known of somebody's backend."""

    inner: str | Callable[..., Any]  # as in the option `inner`
    config: dict[str, Any]  # Inductor's settings, if it is the backend
    ours: bool  # it runs the pass by itself

    @classmethod
    def of(cls, compiler: Any) -> Outer:
        found = _innermost(compiler)
        if found is backend.fusionpass or isinstance(found, (backend.Backend, Late, Reached)):
            return cls(found, {}, ours=True)
        if getattr(found, "compiler_name", None) == "inductor":  # torch.compile's own object for it
            return cls("inductor", dict(getattr(found, "config", {})), ours=False)
        return cls(_registered(found), {}, ours=False)

    @property
    def tuned(self) -> bool:
        return self.inner == "inductor" and tunes(self.config)

    def settings(self, graph_module: GraphModule, rewritten: bool) -> Any:
        """The settings of Inductor for a rewritten graph, unless the user chose others; see `layout_kept`."""
        if self.inner != "inductor" or not rewritten or "layout_optimization" in self.config:
            return nullcontext()
        from fusionpass.private import config

        return config.patch(layout_kept(graph_module))


def _innermost(compiler: Any) -> Any:
    """The backend within torch.compile's own wrappings and that of DistributedDataParallel."""
    while True:
        within = getattr(compiler, "_torchdynamo_orig_backend", None) or getattr(compiler, "compiler_fn", None)
        within = within or getattr(getattr(compiler, "__self__", None), "backend_compile_fn", None)
        if within is None:
            return compiler
        compiler = within


def _registered(compiler: Callable[..., Any]) -> str | Callable[..., Any]:
    """The name of the backend, if it is one that the pass treats in its own way; else the callable itself."""
    from fusionpass.private import lookup_backend

    return next((name for name in ("eager", "aot_eager", "inductor") if lookup_backend(name) is compiler), compiler)


def _through_dynamo(work: Callable[[], Any]) -> Any:
    """Run `work` so that its refusals come out of Dynamo unchanged. Dynamo wraps all exceptions except those of this
    kind."""
    from fusionpass.private import ShortenTraceback

    try:
        return work()
    except (NothingRewritten, VerificationFailed) as error:
        kind = type(error)
        passing = type(kind.__name__, (kind, ShortenTraceback), {"__module__": kind.__module__})
        raise passing(str(error), first_useful_frame=None) from None

"""Run a program's text with the pass and without, and compare. Each check is a function of the text alone."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from fuzz_compare import assert_equal_state, assert_same, streams
from fuzz_modules import Tracer, of_program
from fuzz_run import Run, Skipped, attempted, built, called, inputs
from programs import DEVICE
from torch import Tensor
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import fusionpass
from fusionpass.entry.backend import fusionpass as backend
from fusionpass.private import lookup_backend


def as_it_is(graph_module: GraphModule) -> GraphModule:
    """A copy with child graphs of its own, made without the package's help."""
    copied = GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    for name, child in graph_module.named_children():
        if isinstance(child, GraphModule):
            setattr(copied, name, as_it_is(child))
    return copied


class Both:
    """A backend for Dynamo that compiles its graph twice, as it is and with the pass, so that one capture serves both."""

    def __init__(self, inner: str, numerics: str):
        self.inner, self.numerics = inner, numerics
        self.fused = False
        self.sites = 0
        self.error: Exception | None = None  # of the pass; Dynamo wraps it, and a plain run would be skipped for it

    def __call__(self, graph_module: GraphModule, example_inputs: list[Any]) -> Callable:
        options = {"inner": self.inner, "verify": False, "numerics": self.numerics, "profitable_only": False}
        plain = lookup_backend(self.inner)(as_it_is(graph_module), example_inputs)
        try:
            with fusionpass.collect() as report:
                fused = backend(graph_module, example_inputs, options=options)
        except Exception as error:
            self.error = error
            raise
        self.sites += len(report.rewrites)
        return lambda *args: (fused if self.fused else plain)(*args)


@contextlib.contextmanager
def with_the_pass(both: Both):
    if both.error is not None:
        raise both.error
    both.fused = True
    try:
        yield
    finally:
        both.fused = False
    if both.error is not None:
        raise both.error


def check_fused(source: str) -> int:
    scope = built(source)
    plain = torch.compile(scope.program, backend=scope.INNER)
    options = {"inner": scope.INNER, "numerics": scope.NUMERICS, "verify": False, "profitable_only": False}
    fused = fusionpass.fuse(scope.program, **options)
    with fusionpass.collect() as report:
        for share in (scope.first, scope.second):
            want = attempted(called, plain, share, scope)
            wanted = [t.clone() if t is scope.P else t for t in want.values()]
            got = called(fused, share, scope)
            assert_equal_state(got, want)
            assert_same(got.values(), wanted, lambda share=share: called(scope.program, share, scope).values())
    return len(report.rewrites)


def check_compiled(source: str) -> int:
    """The number of sites rewritten, as every check returns."""
    scope = built(source)
    both = Both(scope.INNER, scope.NUMERICS)
    compiled = torch.compile(scope.program, backend=both)
    try:
        return compiled_twice(scope, both, compiled)
    except Exception as error:
        # AOTAutograd cannot always be asked twice in one capture, such as where inputs share memory and sizes are symbols:
        # then each has a capture of its own, which tells whether there is anything amiss.
        if isinstance(error, AssertionError) or scope.INNER == "eager":
            raise
        torch._dynamo.reset()
        return check_fused(source)


def compiled_twice(scope: SimpleNamespace, both: Both, compiled: Callable) -> int:
    for share in (scope.first, scope.second):
        again = lambda share=share: called(scope.program, share, scope).values()  # noqa: E731
        try:
            want = attempted(called, compiled, share, scope)
        except Skipped:
            if both.error is not None:
                raise both.error from None
            raise
        wanted = want.values()
        with with_the_pass(both):
            got = called(compiled, share, scope)
        assert_equal_state(got, want)
        assert_same(got.values(), wanted, again)
    return both.sites


def traced(scope: SimpleNamespace, program: Callable, args: list[Tensor]) -> GraphModule:
    torch.manual_seed(0)  # what does not depend on an input is drawn now, once for all calls of the graph
    if scope.TRACER == "symbolic_trace":
        return torch.fx.symbolic_trace(program)
    return make_fx(program, tracing_mode=scope.TRACER, _allow_non_fake_inputs=True)(*args)


def layouts(args: list[Tensor]) -> list[tuple]:
    return [(arg.shape, arg.stride()) for arg in args]


def check_recorded(source: str) -> int:
    scope = built(source)
    attempted(called, scope.program, scope.first, scope)
    with torch.no_grad():
        args = scope.first(*inputs(scope.DTYPE))
        scope.P.copy_(scope.P0)
        graph = attempted(traced, scope, scope.program, args)
        given = scope.first(*inputs(scope.DTYPE)) if scope.TRACER == "symbolic_trace" else None
        options = {"numerics": scope.NUMERICS, "verify": False}
        rewritten, report = fusionpass.rewrite(graph, given, **options)
    for share in (scope.first, scope.second):
        if given is not None and layouts(share(*inputs(scope.DTYPE))) != layouts(given):
            continue  # a graph of symbolic_trace is rewritten for the layouts of its example inputs
        try:
            want = attempted(called, graph, share, scope)
        except Skipped:
            continue
        wanted = want.values()
        got = called(rewritten, share, scope)
        assert_equal_state(got, want)
        assert_same(got.values(), wanted, lambda share=share: called(graph, share, scope).values())
    return len(report.rewrites)


def differentiated(function: Callable, scope: SimpleNamespace, between: Callable) -> tuple[Run, list[Tensor] | str]:
    """A forward and what it has left; then gradients, or which error backward raises."""
    args = inputs(scope.DTYPE, True)
    with torch.no_grad():
        scope.P.copy_(scope.P0)
    torch.manual_seed(0)
    outputs = list(function(*args))
    forward = Run(outputs, [*outputs, *args, scope.P], streams())
    values = Run(outputs, [t.detach().clone() for t in forward.tensors], forward.streams)
    between(args, outputs)
    differentiable = [t for t in outputs if t.requires_grad]
    if not differentiable:
        return forward, values.tensors
    try:
        # cotangents of one's own: a loss would save the outputs
        torch.autograd.backward(
            differentiable, [t.detach().double().cos().to(t.dtype) for t in values_of(differentiable)]
        )
    except RuntimeError as error:
        return forward, f"{type(error).__name__}: {error}"
    gradients = [torch.zeros(()) if t.grad is None else t.grad for t in args if t.is_floating_point()]
    return forward, values.tensors + gradients


def nothing(args: list[Tensor], outputs: list[Tensor]) -> None:
    """The caller writes nothing between forward and backward."""


def of_copies(scope: SimpleNamespace) -> list[Tensor] | str:
    """The program's own results and gradients, of copies of what it saves: later writes do no harm."""
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda saved: saved):
        return differentiated(scope.program, scope, nothing)[1]


def assert_right_where_eager_raises(fused: Callable, scope: SimpleNamespace, error: str) -> None:
    """The op saves less than the nodes do, so a write to what they alone save (the sigmoid) does no harm. The gradients then
    have to be those of the values that forward has read: of a run that saves copies."""

    want = of_copies(scope)
    got = differentiated(fused, scope, nothing)[1]
    assert not isinstance(want, str), f"without the pass backward raises {error}"
    assert not isinstance(got, str), f"with the pass backward raises {got}"
    assert_same(got, want, lambda: of_copies(scope))


def values_of(tensors: list[Tensor]) -> list[Tensor]:
    """Numbers that depend on shapes and positions alone."""
    return [torch.arange(t.numel(), device=t.device, dtype=t.dtype).reshape(t.shape) for t in tensors]


def check_trained(source: str) -> int:
    scope = built(source)
    attempted(scope.program, *inputs(scope.DTYPE, True))
    both = Both(scope.INNER, scope.NUMERICS)
    compiled = torch.compile(scope.program, backend=both)
    # What AOTAutograd saves, and what it computes again from inputs, is its own choice: it keeps no promise to a caller who
    # writes to them in between, with the pass or without.
    between = scope.between if scope.INNER == "eager" else nothing
    try:
        forward, want = attempted(differentiated, compiled, scope, between)
    except Skipped:
        if both.error is not None:
            raise both.error from None
        raise
    with with_the_pass(both):
        fused_forward, got = differentiated(compiled, scope, between)
    assert_equal_state(fused_forward, forward)
    if isinstance(want, str):
        # A write through .data that nobody is told of reaches what is saved by reference, and not the copies.
        if not isinstance(got, str) and ".data" not in source.partition("def between")[0]:
            with with_the_pass(both):
                assert_right_where_eager_raises(compiled, scope, want)
        return both.sites
    assert not isinstance(got, str), f"with the pass backward raises {got}"

    def again() -> list[Tensor] | None:
        values = of_copies(scope)
        return None if isinstance(values, str) else values

    assert [t.shape for t in got] == [t.shape for t in want]
    assert_same(got, want, again)
    return both.sites


def recorded_module(model: torch.nn.Module) -> Graph:
    torch.manual_seed(0)  # what does not depend on an input is drawn while the graph is recorded
    return Tracer().trace(model)


def check_modules(source: str) -> int:
    scope = built(source)
    handles = scope.hook()
    try:
        models = [of_program(scope.program, scope.prepare).to(DEVICE) for _ in range(3)]
        args = [inputs(scope.DTYPE, scope.GRADIENTS) for _ in models]
        with torch.set_grad_enabled(scope.GRADIENTS):
            attempted(run_module, models[2], args[2], scope)
            plain, graph = (GraphModule(model, attempted(recorded_module, model)) for model in models[:2])
            rewritten, report = fusionpass.rewrite(graph, inputs(scope.DTYPE), numerics=scope.NUMERICS, verify=False)
            want = attempted(run_module, plain, args[0], scope)
            got = run_module(rewritten, args[1], scope)

        def again() -> list[Tensor]:
            model = of_program(scope.program, scope.prepare).to(DEVICE)
            with torch.set_grad_enabled(scope.GRADIENTS):
                tracked = GraphModule(model, recorded_module(model))
                return run_module(tracked, inputs(scope.DTYPE, scope.GRADIENTS), scope).values()

        assert_equal_state(got, want)
        assert_same(got.values(), want.values(), again)
    finally:
        for handle in handles:
            handle.remove()
    return len(report.rewrites)


def run_module(module: torch.nn.Module, args: list[Tensor], scope: SimpleNamespace) -> Run:
    """Results, inputs, parameters, buffers and gradients after one call and a backward."""
    with torch.no_grad():
        scope.P.copy_(scope.P0)
    torch.manual_seed(0)
    outputs = list(module(*args))
    state = [
        tensor for _, tensor in sorted([*module.named_parameters(), *module.named_buffers()]) if tensor is not scope.P
    ]
    differentiable = [t for t in outputs if t.requires_grad]
    if differentiable:
        torch.autograd.backward(differentiable, values_of(differentiable))
    gradients = [torch.zeros(1) if t.grad is None else t.grad for t in (*args, *state)]
    return Run(outputs, [*outputs, *args, *state, *gradients], streams())


CHECKS = {
    "fused": check_fused,
    "compiled": check_compiled,
    "recorded": check_recorded,
    "trained": check_trained,
    "of_modules": check_modules,
}

"""Is something recording this call? Then a fused function lets the original function be recorded instead."""

from __future__ import annotations

import torch

from fusionpass.private import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _symbolic_trace,
    get_proxy_mode,
)

is_dynamo_compiling = torch.compiler.is_dynamo_compiling


def recorder() -> str | None:
    """Who records the calls of this thread, by the name that users know; None if nobody does.

    Dynamo is not asked here but by `is_dynamo_compiling`: this is true while Dynamo reads the caller's code, and
    Dynamo's graph can be rewritten. The flags "someone compiles" and "FX traces" belong to the process. They only say
    that the state of the thread has to be asked. FX's tracer has no such state, and while it runs, `torch.compile`
    refuses to run in any thread.
    """
    if _get_tracing_state() is not None:
        return "torch.jit.trace"
    if _are_functorch_transforms_active():
        return "a torch.func transform"
    if not (_symbolic_trace._is_fx_tracing_flag or _len_torch_dispatch_stack()):
        return None
    if get_proxy_mode() is not None:
        return "torch.export" if torch.compiler.is_exporting() else "make_fx"
    return "torch.fx.symbolic_trace" if _symbolic_trace.is_fx_symbolic_tracing() else None

"""Every private name of torch that the package uses, in one place: `from fusionpass.private import FakeTensor`.

Checked on torch 2.11.0 with CUDA, 2.13.0 and 2.14.1. If a release has moved a name, the error comes from here and says
which, instead of an AttributeError in the middle of a compilation. (`kernels/` looks up three names by itself, and can
do without.)
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

CHECKED = "2.11.0, 2.13.0 and 2.14.1"
WHERE = {
    # what a tracer records
    "FakeTensor": "torch._subclasses.fake_tensor",
    "FakeTensorMode": "torch._subclasses.fake_tensor",
    "FakeCopyMode": "torch._subclasses.fake_tensor",
    "DataDependentOutputException": "torch._subclasses.fake_tensor",
    "DynamicOutputShapeException": "torch._subclasses.fake_tensor",
    "UnsupportedFakeTensorException": "torch._subclasses.fake_tensor",
    "UnsupportedOperatorException": "torch._subclasses.fake_tensor",
    "unset_fake_temporarily": "torch._subclasses.fake_tensor",
    "get_proxy_mode": "torch.fx.experimental.proxy_tensor",
    "_symbolic_trace": "torch.fx",
    "HigherOrderOperator": "torch._ops",
    "OpOverload": "torch._ops",
    "OpOverloadPacket": "torch._ops",
    # modules
    "_has_any_global_hook": "torch.nn.modules.module",
    "_WrappedHook": "torch.nn.modules.module",
    # compilers
    "list_backends": "torch._dynamo",
    "lookup_backend": "torch._dynamo.backends.registry",
    "comptime": "torch._dynamo.comptime",
    "ShortenTraceback": "torch._dynamo.exc",
    "reset": "torch._dynamo",
    "innermost_fn": "torch._dynamo.eval_frame",
    "_stance": "torch._dynamo.eval_frame",
    "_LazyGraphModule": "torch.fx._lazy_graph_module",
    "_debug_get_cache_entry_list": "torch._C._dynamo.eval_frame",
    "counters": "torch._dynamo.utils",
    "compilation_time_metrics": "torch._dynamo.utils",
    "list_mode_options": "torch._inductor",
    "config": "torch._inductor",
    "CustomGraphPass": "torch._inductor.custom_graph_pass",
    "FunctionalTensorMode": "torch._subclasses.functional_tensor",
    "triton_ops_to_kernels": "torch._library.triton",
    "trace_structured": "torch._logging",
    # whether anything listens between a call and its kernel
    "_len_torch_dispatch_stack": "torch._C",
    "_len_torch_function_stack": "torch._C",
    "_are_functorch_transforms_active": "torch._C",
    "_get_tracing_state": "torch._C",
    "_after_autograd_keyset": "torch._C",
    "_AutoDispatchBelowAutograd": "torch._C",
    "_DisableAutocast": "torch._C",
    "_is_any_autocast_enabled": "torch._C",
    "DispatchKey": "torch._C",
    "DispatchKeySet": "torch._C",
}


def __getattr__(name: str) -> Any:
    if name not in WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(WHERE[name]), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"fusionpass needs {WHERE[name]}.{name}, which torch {torch.__version__} does not have; "
            f"it was checked on torch {CHECKED}: install one of these, or report the release"
        ) from error

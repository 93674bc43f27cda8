"""Compiles the ops' expressions through Inductor on a CPU and prints, as JSON, what the graphs it was given hold.

A program of its own, run by test_inductor.py: Triton's interpreter must be off here, and the second half takes the place of
a CUDA driver, so that Triton analyses the kernel as it does beside one. Nothing is launched.
"""

from __future__ import annotations

import contextlib
import json

import torch
import torch._inductor.config
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import fusionpass
from fusionpass.bench.cases import OPS, Case, draw
from fusionpass.entry import backend
from fusionpass.operators import gate_projected_add, moe_combine

torch._inductor.config.force_disable_caches = True


class Driver:
    """A Hopper GPU as far as compiling goes."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


def nodes_of(name: str, dynamic: bool = False) -> dict:
    """The post-grad graph's calls, and the error against the expression where the code could run.

    dynamic: for any number of rows; a model's hidden size is always one number, that of its parameters.
    """
    seen: list[str] = []
    torch._inductor.config.post_grad_custom_post_pass = lambda graph: seen.extend(
        str(node.target) for node in graph.nodes if node.op == "call_function"
    )
    torch._dynamo.reset()
    inputs = draw(Case(name, 4, 256, "bf16"), torch.Generator("cpu").manual_seed(0)).inputs
    found = {"name": name, "dynamic": dynamic}
    for tensor in inputs:
        if dynamic and tensor.shape[0] == 4:
            torch._dynamo.mark_dynamic(tensor, 0)
    with torch.no_grad():
        compiled = torch.compile(OPS[name].eager, backend=backend.fusionpass)
        try:
            got, want = compiled(*inputs), OPS[name].eager(*inputs)
            pairs = zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]
            found["error"] = max(float((g.double() - w.double()).norm() / w.double().norm()) for g, w in pairs)
        except torch._inductor.exc.InductorError as error:
            found["raised"] = type(error).__name__
    return {**found, "calls": seen}


def routed(x, mix, gate_weight, shared):
    """A site with a weighted sum whose rows are as many as x has, times two, in an order of their own."""
    y = x.repeat_interleave(2, 0) @ mix
    inverse = y[:, 0].argsort()
    a = (y * x[:, :2].softmax(-1).reshape(-1, 1))[inverse].view(-1, 2, x.shape[1]).sum(1)
    return a + torch.sigmoid(torch.nn.functional.linear(x, gate_weight)) * (x @ shared)


def routed_calls() -> list[str]:
    """The post-grad graph's calls of `routed`, for any number of rows."""
    seen: list[str] = []
    torch._inductor.config.post_grad_custom_post_pass = lambda graph: seen.extend(
        str(node.target) for node in graph.nodes if node.op == "call_function"
    )
    torch._dynamo.reset()
    x, mix, shared = torch.randn(5, 16), torch.randn(16, 16), torch.randn(16, 16)
    torch._dynamo.mark_dynamic(x, 0)
    no_gpu_to_compile_for = contextlib.suppress(torch._inductor.exc.InductorError)
    with torch.no_grad(), no_gpu_to_compile_for:
        torch.compile(routed, backend=backend.fusionpass)(x, mix, torch.randn(1, 16), shared)
    return seen


def gradient_error() -> float:
    """Largest relative difference from eager's gradients, of a step that Inductor compiles with the ops opened."""
    torch._inductor.config.post_grad_custom_post_pass = None
    torch._dynamo.reset()
    name = "gate_projected_add"
    inputs = draw(Case(name, 4, 256, "fp32"), torch.Generator("cpu").manual_seed(0)).inputs
    gradients = []
    for function in (OPS[name].eager, torch.compile(OPS[name].eager, backend=backend.fusionpass)):
        given = [tensor.clone().requires_grad_() for tensor in inputs]
        gradients.append(torch.autograd.grad(function(*given).square().sum(), given))
    return max(float((g - w).norm() / w.norm()) for w, g in zip(*gradients, strict=True))


def eagers_bits() -> dict[str, int]:
    """Of a graph with numerics "eager": elements that are not eager's, and calls of the op that are left in it."""
    seen: list[str] = []
    torch._inductor.config.post_grad_custom_post_pass = lambda graph: seen.extend(
        str(node.target) for node in graph.nodes if node.op == "call_function"
    )
    torch._dynamo.reset()
    inputs = draw(Case("gated_add", 64, 256, "bf16"), torch.Generator("cpu").manual_seed(0)).inputs
    function = OPS["gated_add"].eager
    with torch.no_grad():
        got = fusionpass.fuse(lambda *given: function(*given), inner="inductor", numerics="eager")(*inputs)
    return {"differ": int((got != function(*inputs)).sum()), "ops": sum("fusionpass" in call for call in seen)}


def recorded_combine_error() -> float:
    """Largest relative difference of moe_combine's results and gradients under Inductor from those without it."""
    torch._inductor.config.post_grad_custom_post_pass = None
    torch._dynamo.reset()
    generator = torch.Generator("cpu").manual_seed(0)
    shapes = (5, 64), (1, 64), (1,), (5, 32), (5, 32), (5, 32)
    *inputs, seed = (torch.randn(shape, generator=generator) for shape in shapes)

    def combine(x, weight, bias, a, b):
        options = {"x": x, "gate_weight": weight, "gate_bias": bias, "residual": a, "eps": 1e-6}
        return torch.ops.fusionpass.moe_combine(a, b.bfloat16(), **options, dtype=torch.float32)[1]

    found = []
    for function in (combine, torch.compile(combine, backend=backend.fusionpass)):
        given = [tensor.clone().requires_grad_() for tensor in inputs]
        y = function(*given)
        found.append((y.detach(), *torch.autograd.grad((y * seed).sum(), given)))
    return max(float((g - w).norm() / w.norm()) for w, g in zip(*found, strict=True))


def main() -> None:
    forward = [name for name, op in OPS.items() if not op.backward]
    expressions = [nodes_of(name) for name in forward]
    training = gradient_error()
    exact = {"eager's bits": eagers_bits(), "combine error": recorded_combine_error()}
    driver.set_active(Driver())
    for module in (gate_projected_add, moe_combine):
        module.kernels_take = lambda *tensors, dtype=None: True
    kernels = [nodes_of(name) for name in forward if name != "gated_add" and OPS[name].found]
    kernels += [nodes_of(name, dynamic=True) for name in ("gate_projected_add", "moe_combine")]
    found = {
        "expressions": expressions,
        "kernels": kernels,
        "gradient error": training,
        "routed": routed_calls(),
        **exact,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()

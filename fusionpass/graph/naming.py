"""A node in words, for sentences: its name and what it does, `to_3, a cast to float32`. The same for every tracer."""

from __future__ import annotations

import torch
from torch.fx import Node

from fusionpass.graph.identity import torch_name
from fusionpass.graph.nodes import gather_of, is_cast, is_view
from fusionpass.graph.tensors import dtype_text, tensor_of
from fusionpass.graph.vocabulary import Vocabulary
from fusionpass.private import HigherOrderOperator, OpOverload

# operation of the vocabulary -> what its result is called
WORDS = {
    "add": "a sum of two",
    "shift": "a sum with a number",
    "mul": "a product",
    "sigmoid": "a sigmoid",
    "addcmul": "a product added up",
    "linear": "a linear",
    "matmul": "a matrix product",
    "addmm": "a matrix product with a bias",
    "rms_norm": "an RMSNorm",
    "sum": "a sum over dims",
    "mean": "a mean over dims",
    "pow": "a power",
    "square": "a square",
    "rsqrt": "a reciprocal square root",
    "masked_fill": "a masked fill",
    "lerp": "a lerp",
    "index_add": "an index_add",
    "glu": "a glu",
    "dropout": "a dropout",
}
# Views whose bare name reads badly after "a".
VIEWS = {
    "getitem": "an item",
    "T": "a transpose",
    "mT": "a transpose",
    "t": "a transpose",
    "unsqueeze": "an unsqueeze",
    "unflatten": "an unflatten",
    "unbind": "an unbind",
    "alias": "an alias",
    "expand": "an expand",
    "_unsafe_view": "a view",
}
KINDS = {"placeholder": "an input of the graph", "get_attr": "a parameter or buffer", "output": "the graph's result"}


def describe(node: Node, words: Vocabulary | None = None) -> str:
    """The node's name and its operation, as `view_2, a view`. With the vocabulary of its graph, modules are named by class.

    It never raises: a sentence about a graph must not fail on an unforeseen kind of node.
    """
    return f"{node.name}, {operation_of(node, words)}"


def operation_of(node: Node, words: Vocabulary | None = None) -> str:
    """What the node does, with its article: "a view", "a cast to bfloat16", "torch.ops.aten.cumsum.default"."""
    if node.op in KINDS:
        return KINDS[node.op]
    if node.op == "call_module":
        return _of_module(node, words)
    if is_cast(node):
        return _cast(node)
    if gather_of(node) is not None:
        return "a gather of rows"
    known = (words or Vocabulary(torch.nn.Module())).operation(node)  # needs no submodules: `call_module` is done above
    if known is not None:
        word = WORDS.get(known.removesuffix("_"), _article(known.removesuffix("_")))
        return f"{word} written in place" if known.endswith("_") else word
    if is_view(node):
        name = torch_name(node)
        return VIEWS.get(name, _article(name.strip("_")))
    return spelled(node)


def spelled(node: Node) -> str:
    """What the node calls, as in code: "torch.ops.c10d.all_reduce_.default", "Tensor.cumsum", "torch.topk"."""
    target = node.target
    if isinstance(target, OpOverload):
        return f"torch.ops.{target}"
    if isinstance(target, HigherOrderOperator):
        return f"torch.ops.higher_order.{target.name()}"
    if node.op == "call_method":
        return f"Tensor.{target}" if torch_name(node) else f"the method {target}"
    module = (getattr(target, "__module__", None) or "").removeprefix("_")
    name = getattr(target, "__qualname__", None) or getattr(target, "__name__", None) or type(target).__name__
    if module.startswith("torch._C") or module == "_VariableFunctions":
        module = "torch"
    if name.startswith("_VariableFunctionsClass."):
        module, name = "torch", name.partition(".")[2]
    return f"{module}.{name}" if module and module != "builtins" else name


def _of_module(node: Node, words: Vocabulary | None) -> str:
    """The module's class, or its path where nobody knows the module."""
    try:
        module = words.module(node) if words is not None else node.graph.owning_module.get_submodule(str(node.target))
    except AttributeError:  # no owner, or no such module
        return f"the module {node.target}"
    return _article(type(module).__name__)


def _cast(node: Node) -> str:
    after, before = tensor_of(node), tensor_of(node.all_input_nodes[0]) if node.all_input_nodes else None
    if after is None:
        return "a cast"
    if before is not None and before.dtype == after.dtype:
        return f"a cast to the dtype it has, {dtype_text(after.dtype)}" if before.device == after.device else "a copy"
    return f"a cast to {dtype_text(after.dtype)}"


def _article(noun: str) -> str:
    return f"{'an' if noun[:1] in 'aeiouAEIO' else 'a'} {noun}"

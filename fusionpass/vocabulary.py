"""The only place that knows spellings: which nodes mean add, multiply, sigmoid, linear, a cast, a view.

`meaning(node)` gives the operation and its operands in the formula's order, whatever the spelling: torch function, Tensor
method, `operator`, in-place form, aten overload, `nn.Module`. Targets are compared exactly; names alone would confuse
sigmoid with hardsigmoid, or a user's method `mul` with torch's.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from fusionpass.match import Refusal
from fusionpass.tensors import tensor_of
from fusionpass.writes import call_name, has_hooks

aten = torch.ops.aten

# operation -> parameters, each with the names it goes by
PARAMETERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "add": (("input", "self"), ("other",)),
    "mul": (("input", "self"), ("other",)),
    "sigmoid": (("input", "self"),),
    "addcmul": (("input", "self"), ("tensor1",), ("tensor2",)),
    "linear": (("input",), ("weight",), ("bias",)),
    "matmul": (("input", "self"), ("other", "mat2", "vec", "tensor2")),
    "addmm": (("input", "self"), ("mat1",), ("mat2",)),
}
OPTIONAL = {("linear", 2)}  # a bias may be left out
# Keyword -> the only value under which the operation is the plain formula.
NEUTRAL = {"alpha": 1, "value": 1, "beta": 1, "out": None, "inplace": False}

FUNCTIONS: dict[Any, str] = {
    operator.add: "add",
    operator.iadd: "add_",
    torch.add: "add",
    aten.add.Tensor: "add",
    aten.add_.Tensor: "add_",
    aten.add.out: "add",
    operator.mul: "mul",
    operator.imul: "mul_",
    torch.mul: "mul",
    torch.multiply: "mul",
    aten.mul.Tensor: "mul",
    aten.mul_.Tensor: "mul_",
    aten.multiply.Tensor: "mul",
    torch.sigmoid: "sigmoid",
    torch.sigmoid_: "sigmoid_",
    F.sigmoid: "sigmoid",
    torch.special.expit: "sigmoid",
    aten.sigmoid.default: "sigmoid",
    aten.sigmoid_.default: "sigmoid_",
    aten.special_expit.default: "sigmoid",
    torch.addcmul: "addcmul",
    aten.addcmul.default: "addcmul",
    aten.addcmul_.default: "addcmul_",
    F.linear: "linear",
    aten.linear.default: "linear",
    operator.matmul: "matmul",
    torch.matmul: "matmul",
    torch.mm: "matmul",
    torch.mv: "matmul",
    aten.matmul.default: "matmul",
    aten.mm.default: "matmul",
    aten.mv.default: "matmul",
    torch.addmm: "addmm",
    aten.addmm.default: "addmm",
}
METHODS: dict[str, str] = {
    "add": "add",
    "__add__": "add",
    "__radd__": "add",
    "add_": "add_",
    "__iadd__": "add_",
    "mul": "mul",
    "multiply": "mul",
    "__mul__": "mul",
    "__rmul__": "mul",
    "mul_": "mul_",
    "multiply_": "mul_",
    "__imul__": "mul_",
    "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid_",
    "addcmul": "addcmul",
    "addcmul_": "addcmul_",
    "matmul": "matmul",
    "__matmul__": "matmul",
    "mm": "matmul",
    "mv": "matmul",
    "addmm": "addmm",
}
MODULES: dict[type, str] = {torch.nn.Sigmoid: "sigmoid", torch.nn.Linear: "linear"}

CASTS = frozenset("to type type_as float half bfloat16 double _to_copy convert_element_type".split())
# Reorder or drop nothing: with one value per row, the rows come out in the order they went in.
RESHAPES = frozenset(
    "view reshape view_as reshape_as _unsafe_view unsqueeze squeeze flatten unflatten alias contiguous".split()
)
VIEWS = RESHAPES | frozenset(
    "getitem select narrow chunk split tensor_split unbind slice transpose t permute movedim swapaxes swapdims expand "
    "expand_as broadcast_to detach clone ravel mT T".split()
)


@dataclass(frozen=True)
class Meaning:
    """One operation of the formula: `op` names it, `operands` are in the formula's order."""

    op: str
    operands: tuple[Any, ...]
    in_place: bool = False  # the result lands in the first operand's memory
    oddity: Refusal | None = None  # spelled with an argument that makes it another formula


class Vocabulary:
    """Reads the nodes of one graph; knows its submodules, for `call_module` nodes."""

    def __init__(self, owner: torch.nn.Module):
        self._owner = owner

    def module(self, node: Node) -> torch.nn.Module:
        return self._owner.get_submodule(str(node.target))

    def tensor(self, operand: object) -> torch.Tensor | None:
        """The tensor of an operand: a node's recorded value, or the parameter an attribute path names."""
        if isinstance(operand, str):
            module, _, name = operand.rpartition(".")
            return getattr(self._owner.get_submodule(module), name)
        return tensor_of(operand)

    def operation(self, node: object) -> str | None:
        """The operation's name, in-place forms with a trailing underscore; None for any other node. Constant time."""
        if not isinstance(node, Node):
            return None
        if node.op == "call_function":
            return FUNCTIONS.get(node.target)
        if node.op == "call_method":
            return METHODS.get(str(node.target))
        if node.op == "call_module":
            return MODULES.get(type(self.module(node)))
        return None

    def meaning(self, node: object) -> Meaning | None:
        """What the node computes, None for anything outside the formula."""
        name = self.operation(node)
        if name is None or not isinstance(node, Node):
            return None
        op = name.removesuffix("_")
        if node.op == "call_module":
            return self._module_meaning(node, op)
        operands, oddity = _bind(node, op)
        return Meaning(op, operands, name != op, oddity)

    def _module_meaning(self, node: Node, op: str) -> Meaning:
        module = self.module(node)
        oddity = Refusal("module-hook", "module {} has hooks, which run code of their own", node.target)
        operands: tuple[Any, ...] = tuple(node.args)
        if op == "linear":
            bias = f"{node.target}.bias" if module.bias is not None else None
            operands = (*operands, f"{node.target}.weight", bias)
        return Meaning(op, operands, oddity=oddity if has_hooks(module) or node.kwargs else None)


def _bind(node: Node, op: str) -> tuple[tuple[Any, ...], Refusal | None]:
    """The operands by parameter, and what in the call makes it more than the plain operation."""
    parameters = PARAMETERS[op]
    operands = list(node.args[: len(parameters)])
    rest = dict(node.kwargs)
    for index in range(len(operands), len(parameters)):
        given = [name for name in parameters[index] if name in rest]
        if given:
            operands.append(rest.pop(given[0]))
        elif (op, index) in OPTIONAL:
            operands.append(None)
    if len(operands) != len(parameters) or len(node.args) > len(parameters):
        return tuple(operands), Refusal("odd-call", "{} is called with {} arguments", node.name, len(node.args))
    for name, value in rest.items():
        if name == "out" and value is not None:
            return tuple(operands), Refusal("out-argument", "{} writes its result into out={}", node.name, value)
        if name not in NEUTRAL or value != NEUTRAL[name]:
            return tuple(operands), Refusal("scaled", "{} is called with {}={}", node.name, name, value)
    return tuple(operands), None


def is_cast(node: Node) -> bool:
    return node.op in ("call_function", "call_method") and call_name(node) in CASTS


def is_view(node: Node) -> bool:
    return node.op in ("call_function", "call_method") and call_name(node) in VIEWS


def is_reshape(node: Node) -> bool:
    return node.op in ("call_function", "call_method") and call_name(node) in RESHAPES

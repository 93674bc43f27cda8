"""The only module that knows spellings: which nodes mean add, multiply, sigmoid, linear, a cast, a view.

`meaning(node)` gives the operation and its operands in the formula's order, for every spelling: torch function, Tensor
method, `operator`, in-place form, aten overload, `nn.Module`. Targets are compared exactly. By name alone, sigmoid could be
taken for hardsigmoid, or a user's method `mul` for torch's.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from fusionpass.graph.identity import method_name, torch_name
from fusionpass.graph.leaf_modules import has_hooks, is_plain
from fusionpass.graph.refusal import Refusal
from fusionpass.graph.tensors import settled, tensor_of
from fusionpass.private import OpOverload

aten = torch.ops.aten

# operation -> parameters, each with its possible names
PARAMETERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "add": (("input", "self"), ("other",)),
    "mul": (("input", "self"), ("other",)),
    "sigmoid": (("input", "self"),),
    "addcmul": (("input", "self"), ("tensor1",), ("tensor2",)),
    "linear": (("input",), ("weight",), ("bias",)),
    "matmul": (("input", "self"), ("other", "mat2", "vec", "tensor2")),
    "addmm": (("input", "self"), ("mat1",), ("mat2",)),
    "rms_norm": (("input",), ("normalized_shape",), ("weight",), ("eps",)),
    "sum": (("input", "self"), ("dim", "axis"), ("keepdim",), ("dtype",)),
    "mean": (("input", "self"), ("dim", "axis"), ("keepdim",), ("dtype",)),
    "pow": (("input", "self"), ("exponent",)),
    "square": (("input", "self"),),
    "shift": (("self",), ("other",)),
    "rsqrt": (("input", "self"),),
    "masked_fill": (("input", "self"), ("mask",), ("value",)),
    "dropout": (("input", "self"), ("p",), ("training", "train"), ("inplace",)),
}
# What may be left out, and is then None: a bias, a norm's weight and eps, the dims of a reduction.
OPTIONAL = {("linear", 2), ("rms_norm", 2), ("rms_norm", 3)}
OPTIONAL |= {(op, i) for op in ("sum", "mean", "dropout") for i in (1, 2, 3)}
# Keyword -> the only value under which the operation is the plain formula.
NEUTRAL = {"alpha": 1, "value": 1, "beta": 1, "out": None, "inplace": False}

FUNCTIONS: dict[Any, str] = {
    operator.add: "add",
    operator.iadd: "add_",
    torch.add: "add",
    aten.add.Tensor: "add",
    aten.add_.Tensor: "add_",
    aten.add.out: "add",
    aten.add.Scalar: "shift",
    aten.add_.Scalar: "shift_",
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
    F.rms_norm: "rms_norm",
    torch.rms_norm: "rms_norm",
    aten.rms_norm.default: "rms_norm",
    aten._fused_rms_norm.default: "rms_norm",  # its form on CUDA below autograd, with 1 / rms as a second result
    torch.sum: "sum",
    aten.sum.dim_IntList: "sum",
    torch.mean: "mean",
    aten.mean.dim: "mean",
    torch.pow: "pow",
    operator.pow: "pow",
    aten.pow.Tensor_Scalar: "pow",
    torch.square: "square",
    aten.square.default: "square",
    torch.rsqrt: "rsqrt",
    aten.rsqrt.default: "rsqrt",
    F.dropout: "dropout",
    torch.dropout: "dropout",
    aten.dropout.default: "dropout",
    aten.native_dropout.default: "dropout",  # its form on CUDA below autograd, with the mask as a second result
    torch.masked_fill: "masked_fill",
    aten.masked_fill.Scalar: "masked_fill",
}
# Read only as near misses: they compute the formula, or something like it, in one node.
FUNCTIONS |= {
    torch.lerp: "lerp",
    aten.lerp.Tensor: "lerp",
    torch.index_add: "index_add",
    aten.index_add.default: "index_add",
    F.glu: "glu",
    aten.glu.default: "glu",
}
EINSUMS = (torch.einsum, torch.functional.einsum, aten.einsum.default)
FUNCTIONS |= dict.fromkeys(EINSUMS, "einsum")  # see `Vocabulary.einsum`
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
    "sum": "sum",
    "mean": "mean",
    "pow": "pow",
    "__pow__": "pow",
    "square": "square",
    "rsqrt": "rsqrt",
    "masked_fill": "masked_fill",
    "lerp": "lerp",
    "lerp_": "lerp",
    "index_add": "index_add",
    "index_add_": "index_add",
}
OPS_BY_HAND = METHODS | {"linear": "linear", "rms_norm": "rms_norm", "dropout": "dropout"}
MODULES: dict[type, str] = {
    torch.nn.Sigmoid: "sigmoid",
    torch.nn.Linear: "linear",
    torch.nn.RMSNorm: "rms_norm",
    torch.nn.Dropout: "dropout",
    torch.nn.GLU: "glu",
}
# Every word that `Vocabulary.operation` may return.
OPERATIONS = frozenset((*FUNCTIONS.values(), *METHODS.values(), *MODULES.values()))


@dataclass(frozen=True)
class Meaning:
    """One operation of the formula: `op` names it, `operands` are in the formula's order."""

    op: str
    operands: tuple[Any, ...]
    in_place: bool = False  # the result lands in the first operand's memory
    oddity: Refusal | None = None  # the call has an argument that makes it another formula


class Vocabulary:
    """Reads the nodes of one graph. It knows the graph's submodules, for `call_module` nodes."""

    def __init__(self, owner: torch.nn.Module):
        self._owner = owner

    def module(self, node: Node) -> torch.nn.Module:
        return self._owner.get_submodule(str(node.target))

    def tensor(self, operand: object) -> torch.Tensor | None:
        """The tensor of an operand: a node's recorded value, or the parameter that an attribute path names."""
        if isinstance(operand, str):
            module, _, name = operand.rpartition(".")
            return getattr(self._owner.get_submodule(module), name)
        return tensor_of(operand)

    def operation(self, node: object) -> str | None:
        """The operation's name, in-place forms with a trailing underscore; None for any other node. Constant time."""
        if not isinstance(node, Node):
            return None
        if node.op == "call_function":
            target = node.target
            found = FUNCTIONS.get(target)
            return found if found or isinstance(target, OpOverload) else OPS_BY_HAND.get(method_name(target))
        if node.op == "call_method":
            return METHODS.get(torch_name(node))
        if node.op == "call_module":
            return MODULES.get(type(self.module(node)))
        return None

    def meaning(self, node: object) -> Meaning | None:
        """What the node computes, None for anything outside the formula."""
        name = self.operation(node)
        op = name.removesuffix("_") if name is not None else ""
        if op not in PARAMETERS or not isinstance(node, Node):
            return None
        if node.op == "call_module":
            return self._module_meaning(node, op)
        operands, oddity = _bind(node, op)
        return Meaning(op, operands, name != op, oddity)

    def operands(self, node: object, op: str) -> tuple[Any, ...] | None:
        """The operands when the node is a plain `op`, out of place or in place."""
        if self.operation(node) not in (op, f"{op}_"):
            return None
        meaning = self.meaning(node)
        return meaning.operands if meaning is not None and meaning.oddity is None else None

    def plain(self, node: object, op: str) -> tuple[Any, ...] | None:
        """The operands when the node is a plain, out-of-place `op`."""
        if self.operation(node) != op:
            return None
        meaning = self.meaning(node)
        return meaning.operands if meaning is not None and meaning.oddity is None else None

    def reduces(self, node: Node, dim: int, *, keepdim: bool) -> bool:
        """Whether the node is a sum or mean over this dim only, which keeps the dtype of its input."""
        operands = self.plain(node, "sum") or self.plain(node, "mean")
        if operands is None or tensor_of(operands[0]) is None:
            return False
        source, dims, kept, dtype = operands
        dims = settled(dims)
        dims = (dims,) if isinstance(dims, int) else tuple(dims or ())
        if not all(isinstance(d, int) for d in dims):
            return False
        rank = tensor_of(source).dim()
        return [d % rank for d in dims] == [dim] and bool(kept) == keepdim and dtype in (None, tensor_of(node).dtype)

    def squares(self, node: Node, source: Node) -> bool:
        """Whether the node is source ** 2, in any spelling."""
        power = self.plain(node, "pow")
        if power is not None:
            return power[0] is source and settled(power[1]) == 2
        return self.plain(node, "square") == (source,) or self.plain(node, "mul") == (source, source)

    def drops_nothing(self, node: Node) -> bool:
        """Whether a dropout is known to return its input: it is not in training, or p is 0. A module's may change later."""
        operands = self.plain(node, "dropout") if node.op != "call_module" else None
        return operands is not None and (operands[2] is False or operands[1] == 0)

    def einsum(self, node: Node) -> tuple[str, tuple[Any, ...]] | None:
        """(equation, operands) of an einsum."""
        if node.op != "call_function" or node.target not in EINSUMS or not isinstance(node.args[0], str):
            return None
        rest = node.args[1:]
        return node.args[0], tuple(rest[0] if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else rest)

    def _module_meaning(self, node: Node, op: str) -> Meaning:
        module = self.module(node)
        operands, oddity = _module_operands(node)
        if has_hooks(module):
            oddity = Refusal("module-hook", "module {} has hooks, which run code of their own", node.target)
        elif not is_plain(module):
            oddity = Refusal("module-forward", "module {} runs a forward that is not torch's own", node.target)
        if op == "linear":
            bias = f"{node.target}.bias" if module.bias is not None else None
            operands = (*operands, f"{node.target}.weight", bias)
        if op == "rms_norm":
            weight = None if module.weight is None else f"{node.target}.weight"
            operands = (*operands, module.normalized_shape, weight, module.eps)
        return Meaning(op, operands, oddity=oddity)


def _module_operands(node: Node) -> tuple[tuple[Any, ...], Refusal | None]:
    """The arguments of the module's call: one tensor, by position or by the name that torch's modules use."""
    given = (*node.args, *(value for name, value in node.kwargs.items() if name in ("input", "x")))
    if len(given) == len(node.args) + len(node.kwargs) == 1:
        return given, None
    return given, Refusal("odd-call", "module {} is called with {}", node.target, [*node.args, *node.kwargs])


def _bind(node: Node, op: str) -> tuple[tuple[Any, ...], Refusal | None]:
    """The operands, parameter by parameter, and what makes the call more than the plain operation."""
    parameters = PARAMETERS[op]
    if not node.kwargs and len(node.args) == len(parameters):
        return node.args, None
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

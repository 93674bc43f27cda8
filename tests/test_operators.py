"""The declarations of the ops: their schemas, and that names meet names where a kernel is launched."""

import ast
import typing
from pathlib import Path

import pytest
import torch
from ops_helpers import DEVICE

import fusionpass
from fusionpass.bench import cases
from fusionpass.kernels import launching, moe_combine
from fusionpass.kernels.launching import Calls, Launch, in_order
from fusionpass.kernels.moe_combine_aten import TENSORS, Arguments
from fusionpass.operators import OPS, functions, in_inductor

SCHEMAS = """
fusionpass::gated_add(Tensor a, Tensor gate, Tensor b, *, str numerics="fp32", ScalarType? dtype=None) -> Tensor
fusionpass::_gated_add_out(Tensor a, Tensor gate, Tensor b, Tensor(a!) out) -> ()
fusionpass::_gated_add_backward(Tensor dy, Tensor gate, Tensor b) -> (Tensor, Tensor)
fusionpass::gate_projected_add(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, *, ScalarType? dtype=None) -> Tensor
fusionpass::_gate_projected_add_and_logit(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, *, ScalarType? dtype=None) -> (Tensor, Tensor)
fusionpass::_gate_projected_add_backward(Tensor dy, Tensor? x, Tensor weight, Tensor logit, Tensor b, SymInt[] rows, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor)
fusionpass::moe_combine(Tensor a, Tensor? b=None, *, Tensor? gate=None, Tensor? x=None, Tensor? gate_weight=None, Tensor? gate_bias=None, Tensor? topk_weights=None, Tensor? inverse=None, Tensor? masked=None, Tensor? residual=None, Tensor? norm_weight=None, Tensor? post_norm_weight=None, int top_k=0, bool permuted=False, float? eps=None, float offset=0., ScalarType? dtype=None, float routed_scale=1., float scale=1., float? post_eps=None, float post_offset=0.) -> (Tensor, Tensor)
""".strip().splitlines()  # fmt: skip  # noqa: E501


def test_schemas():
    """Exported programs and graphs of users hold these."""
    assert [str(op.overload._schema) for op in OPS] == SCHEMAS


def test_the_tensors_of_moe_combine_come_first():
    kinds = list(typing.get_type_hints(Arguments).values())
    assert all(kind in (torch.Tensor, torch.Tensor | None) for kind in kinds[:TENSORS])
    assert not any(kind in (torch.Tensor, torch.Tensor | None) for kind in kinds[TENSORS:])


def test_every_op_for_people_is_whole():
    whole = [op for op in OPS if not op.name.startswith("_")]
    for op in whole:
        assert op.autograd and op.autocast and op.inductor and op.direct and op.bench, op.name
        assert functions.FUNCTIONS[op.overload] is op.direct
        assert torch._C._dispatch_has_kernel_for_dispatch_key(op.overload.name(), "Autograd")
    assert set(in_inductor._launches) == {op.overload for op in whole if op.launches}
    assert list(cases.OPS) == [
        "gated_add", "gate_projected_add", "moe_combine", "moe_combine_top_10", "finalize_top_8",
        "finalize_top_8_batched", "finalize_top_8_shared", "gated_add_backward", "gate_projected_add_backward",
    ]  # fmt: skip


def test_ops_are_declared_in_their_own_modules_alone():
    """What registers, opens or calls the ops knows none of them by name: a new op is no change there."""
    folder = Path(fusionpass.__file__).parent / "operators"
    shared = "in_inductor functions implementations declaration dispatch autocast"
    for path in [folder / f"{name}.py" for name in shared.split()]:
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        assert not names & {op.name for op in OPS}, path


# Names of kernels' arguments.

NUMBERS = {
    name: 0 for name in moe_combine.moe_combine_kernel.arg_names[len(moe_combine.OPERANDS) + len(moe_combine.RESULTS) :]
}
POINTERS = (*moe_combine.OPERANDS, *moe_combine.RESULTS)


def test_numbers_are_put_in_the_order_of_the_signature():
    given = {name: i for i, name in enumerate(reversed(NUMBERS))}
    assert in_order(moe_combine.moe_combine_kernel, POINTERS, given) == tuple(reversed(range(len(NUMBERS))))


@pytest.mark.parametrize(
    ("pointers", "numbers"),
    [
        (POINTERS, {name: 0 for name in NUMBERS if name != "TOP_K"}),
        (POINTERS, NUMBERS | {"TOP": 0}),
        (POINTERS[1:], NUMBERS),
        ((POINTERS[1], POINTERS[0], *POINTERS[2:]), NUMBERS),
    ],
    ids=["one too few", "one too many", "a pointer too few", "pointers in another order"],
)
def test_names_that_are_not_the_kernels_are_refused(pointers, numbers):
    with pytest.raises(TypeError, match="takes A, WEIGHTS, INVERSE, .*given: "):
        in_order(moe_combine.moe_combine_kernel, pointers, numbers)


def test_the_pointers_of_moe_combine_are_its_tensors():
    assert sorted(moe_combine.OPERANDS.values()) == sorted(Arguments._fields[:TENSORS])


def test_variants_have_a_limit(monkeypatch):
    """Where every call has a layout of its own, memory does not grow without end, and what is kept still works."""
    monkeypatch.setattr(Calls, "LIMIT", 8)
    monkeypatch.setattr(moe_combine, "_known", Calls())
    monkeypatch.setattr(launching, "_variants", Calls())
    first = None
    for columns in range(1, 40):
        a = torch.ones(2, columns, device=DEVICE)
        total, _ = moe_combine.moe_combine(Arguments(a, a, gate=a[:, :1]))
        torch.testing.assert_close(total, a + torch.sigmoid(a[:, :1]) * a)
        (*_, prepared) = moe_combine._known.values()
        first = first or prepared._launch
        assert len(launching._variants) <= 8
    assert not any(variants is first._variants for variants in launching._variants.values())
    again = Launch(first._kernel, first._device, 2, first._arguments, ("as", "ever"))
    same = Launch(first._kernel, first._device, 3, first._arguments, ("as", "ever"))
    assert again._variants is same._variants

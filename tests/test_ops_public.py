"""The public function `ops.gated_add`: shapes of the gate, refusals, `out=`, and what its import costs."""

import doctest
import os
import subprocess
import sys

import ops_operands
import pytest
import torch
from ops_helpers import DEVICE, gated_expression
from ops_operands import F32, I64, dtypes, gated_add_op, gated_operands, normal

from fusionpass import ops

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")  # NumPy, of inf and nan
implementation = ops_operands.implementation


@dtypes
@pytest.mark.parametrize("shape", [(4, 8), (8, 8), (2, 4, 8), (8,), (0, 8), (4, 1), (1, 1)], ids=str)
def test_public_gate_shapes(implementation, dtype, shape):
    """[...] and [..., 1] are one logit per row also where the number of rows equals H."""
    a, gate, b = gated_operands(dtype, shape, shape)
    per_row = gate[..., :1]
    expected = gated_add_op(a, per_row, b)
    assert torch.equal(ops.gated_add(a, per_row, b), expected)
    assert torch.equal(ops.gated_add(a, per_row.squeeze(-1), b), expected)
    assert torch.equal(ops.gated_add(a, gate, b), gated_add_op(a, gate, b))
    if shape == (8, 8):
        assert not torch.equal(expected, gated_expression(a, per_row.squeeze(-1), b))


def ones(*shape, dtype=F32):
    return torch.ones(shape, dtype=dtype, device=DEVICE)


PUBLIC_REFUSALS = {
    "gate [H]": (
        lambda: (ones(4, 8), ones(8), ones(4, 8)),
        ValueError,
        r"gate is \[8\], allowed: \[4\] or \[4, 1\] or",
    ),
    "gate [1, 1]": (lambda: (ones(4, 8), ones(1, 1), ones(4, 8)), ValueError, r"gate is \[1, 1\]"),
    "gate [1, H]": (lambda: (ones(4, 8), ones(1, 8), ones(4, 8)), ValueError, r"gate is \[1, 8\]"),
    "gate 0-d": (lambda: (ones(4, 8), ones(), ones(4, 8)), ValueError, r"gate is \[\]"),
    "gate's rows": (lambda: (ones(4, 8), ones(3, 1), ones(4, 8)), ValueError, r"gate is \[3, 1\]"),
    "gate's dims": (lambda: (ones(4, 8), ones(1, 4, 8), ones(4, 8)), ValueError, r"gate is \[1, 4, 8\]"),
    "b's shape": (lambda: (ones(4, 8), ones(4, 1), ones(4, 7)), ValueError, r"b is \[4, 7\], allowed: \[4, 8\]"),
    "b's dims": (lambda: (ones(4, 8), ones(4, 1), ones(1, 4, 8)), ValueError, r"b is \[1, 4, 8\]"),
    "a 0-d": (lambda: (ones(), ones(), ones()), ValueError, "a has no dims"),
    "a number": (lambda: (1.0, ones(4, 1), ones(4, 8)), TypeError, "a is float, allowed: torch.Tensor"),
    "None": (lambda: (ones(4, 8), None, ones(4, 8)), TypeError, "gate is NoneType"),
    "float64": (lambda: (ones(4, 8, dtype=torch.float64),) * 3, ValueError, "a is torch.float64, allowed: bfloat16"),
    "int": (lambda: (ones(4, 8), ones(4, 1), ones(4, 8, dtype=I64)), ValueError, "b is torch.int64"),
    "complex": (lambda: (ones(4, 8, dtype=torch.complex64),) * 3, ValueError, "a is torch.complex64"),
    "mixed": (
        lambda: (ones(4, 8), ones(4, 1).half(), ones(4, 8)),
        ValueError,
        "gate is torch.float16, allowed: torch.fl",
    ),
    "sparse": (lambda: (ones(4, 8), ones(4, 1), ones(4, 8).to_sparse()), ValueError, "b has layout torch.sparse_coo"),
    "meta": (lambda: (ones(4, 8), ones(4, 1), ones(4, 8).to("meta")), ValueError, "b is on meta, allowed: "),
}


@pytest.mark.parametrize(("operands", "error", "message"), PUBLIC_REFUSALS.values(), ids=PUBLIC_REFUSALS)
def test_public_refuses(operands, error, message):
    out = torch.full((4, 8), 77.0, device=DEVICE)
    for options in ({}, {"out": out}):
        with pytest.raises(error, match="gated_add: " + message):
            ops.gated_add(*operands(), **options)
    assert (out == 77.0).all()


def test_docstring_example():
    assert doctest.testmod(ops).failed == 0


def parts(width=8, rows=4):
    """One buffer with columns for a, b, a full gate and more."""
    buffer = normal()((rows, 4 * width))
    return buffer, *buffer.split(width, 1)


OUTS = {
    "new": lambda a, gate, b: torch.full_like(a, float("nan")),
    "a": lambda a, gate, b: a,
    "b": lambda a, gate, b: b,
    "padded rows": lambda a, gate, b: torch.full((4, 11), float("nan"), device=DEVICE)[:, :8],
    "transposed": lambda a, gate, b: torch.full((8, 4), float("nan"), device=DEVICE).t(),
    "every second column": lambda a, gate, b: torch.full((4, 16), float("nan"), device=DEVICE)[:, 1::2],
}


@pytest.mark.parametrize("gate", [(4,), (4, 1), (4, 8)], ids=str)
@pytest.mark.parametrize("name", OUTS)
def test_out(implementation, name, gate):
    a, gate, b = gated_operands(gate=gate)
    expected = ops.gated_add(a, gate, b)
    out = OUTS[name](a, gate, b)
    before = out._version, out.data_ptr(), out.stride()
    assert ops.gated_add(a, gate, b, out=out) is out
    assert torch.equal(out, expected)
    assert (out.data_ptr(), out.stride()) == before[1:]
    assert out._version > before[0]


SHARED_OUTS = {
    "halves of one buffer": lambda buffer, a, b, gate, rest: (a, gate, b, rest),
    "the full gate itself": lambda buffer, a, b, gate, rest: (a, gate, b, gate),
    "gate is a column beside out": lambda buffer, a, b, gate, rest: (a, gate[:, :1], b, rest),
    "interleaved with a": lambda buffer, a, b, gate, rest: (buffer[:, 0:7], rest[:, :1], rest[:, :7], buffer[:, 7:14]),
    "other rows": lambda buffer, a, b, gate, rest: (
        buffer[:2],
        buffer[:2, 3:4].clone(),
        buffer[:2].clone(),
        buffer[2:],
    ),
    "a and b are one": lambda buffer, a, b, gate, rest: (a, gate, a, a),
    "3-d halves": lambda buffer, a, b, gate, rest: tuple(t.unflatten(0, (2, 2)) for t in (a, gate, b, rest)),
}


@pytest.mark.parametrize("name", SHARED_OUTS)
def test_out_may_share_a_buffer_without_common_elements(implementation, name):
    a, gate, b, out = SHARED_OUTS[name](*parts())
    expected = ops.gated_add(a, gate, b)
    assert torch.equal(ops.gated_add(a, gate, b, out=out), expected)


OVERLAPPING_OUTS = {
    "gate is a column of out": (
        lambda buffer, a, b, gate, rest: (a, rest[:, 3:4], b, rest),
        "out shares memory with gate",
    ),
    "shifted columns of a": (lambda buffer, a, b, gate, rest: (buffer[:, :8], gate, b, buffer[:, 1:9]), "with a"),
    "shifted rows of b": (lambda buffer, a, b, gate, rest: (a[1:], gate[1:], b[1:], b[:-1]), "with b"),
    "transposed a": (lambda buffer, *_: (buffer[:, :4], buffer[:, 8:9], buffer[:, 4:8], buffer[:, :4].t()), "with a"),
    "expanded": (lambda buffer, a, b, gate, rest: (a, gate, b, rest[:1].expand(4, 8)), "out has shape .* and strides"),
    "rows that overlap": (
        lambda buffer, a, b, gate, rest: (a, gate, b, torch.zeros(64, device=DEVICE).as_strided((4, 8), (4, 1))),
        "out has shape .* and strides",
    ),
    "dtype": (
        lambda buffer, a, b, gate, rest: (a, gate, b, rest.half()),
        "out is torch.float16, allowed: torch.float32",
    ),
    "shape": (lambda buffer, a, b, gate, rest: (a, gate, b, rest[:, :7]), r"out is \[4, 7\], allowed: \[4, 8\]"),
    "broadcast": (lambda buffer, a, b, gate, rest: (a, gate, b, rest[None]), r"out is \[1, 4, 8\], allowed: \[4, 8\]"),
    "device": (lambda buffer, a, b, gate, rest: (a, gate, b, rest.to("meta")), "out is on meta"),
}


@pytest.mark.parametrize(("operands", "message"), OVERLAPPING_OUTS.values(), ids=OVERLAPPING_OUTS)
def test_out_refused(operands, message):
    buffer, *rest = parts()
    before = buffer.clone()
    a, gate, b, out = operands(buffer, *rest)
    with pytest.raises(ValueError, match="gated_add: .*" + message):
        ops.gated_add(a, gate, b, out=out)
    assert torch.equal(buffer, before)


def test_out_is_not_a_tensor():
    with pytest.raises(TypeError, match="out is list"):
        ops.gated_add(*gated_operands(), out=[])


def test_out_and_autograd(implementation):
    a, gate, b = gated_operands()
    b.requires_grad_()
    out = torch.zeros_like(a)
    with pytest.raises(ValueError, match="use out=None"):
        ops.gated_add(a, gate, b, out=out)
    with pytest.raises(ValueError, match="use out=None"):
        ops.gated_add(a, gate, b.detach(), out=torch.zeros_like(a).requires_grad_())
    assert (out == 0).all()
    with torch.no_grad():
        assert ops.gated_add(a, gate, b, out=out) is out
    with torch.inference_mode():
        made = torch.zeros_like(a)
        assert ops.gated_add(a, gate, b, out=made) is made


def test_out_invalidates_what_autograd_saved(implementation):
    a, gate, b = gated_operands()
    leaf = torch.ones_like(a).requires_grad_()
    saved = leaf * 1.0
    y = saved.exp()  # saves its result
    with torch.no_grad():
        ops.gated_add(a, gate, b, out=y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_out_refuses_transforms(implementation):
    a, gate, b = gated_operands()
    out = torch.zeros_like(a)
    with pytest.raises(ValueError, match="forward-mode"):
        torch.func.jvp(lambda a: ops.gated_add(a, gate, b, out=out), (a,), (b,))


def test_import_loads_neither_triton_nor_transformers():
    code = (
        "import sys, torch, fusionpass;"
        "a = torch.ones(2, 3); fusionpass.ops.gated_add(a, a[:, :1], a);"
        "print(sorted({'triton', 'transformers', 'kernels'} & set(sys.modules)))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"

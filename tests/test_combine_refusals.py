"""Calls of `moe_combine` that are refused, in the same words whichever way they come."""

from typing import NamedTuple

import combine_helpers
import pytest
import torch
from combine_helpers import F16, F32, F64, I32, I64, op
from ops_helpers import DEVICE, DIRECT
from torch._subclasses.fake_tensor import FakeTensorMode

from fusionpass.operators import implementations

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")  # NumPy, of inf and nan
forgotten = combine_helpers.forgotten


class Of(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype = F32
    device: str | None = None


PLAIN = {"a": Of((4, 8)), "b": Of((4, 8)), "gate": Of((4, 1))}
TOP_K = PLAIN | {"a": Of((8, 8)), "topk_weights": Of((4, 2)), "top_k": 2}
INDEXED = TOP_K | {"inverse": Of((8,), I64)}
PROJECTED = PLAIN | {"gate": None, "x": Of((4, 6)), "gate_weight": Of((1, 6))}
REFUSALS = {
    "float64": (PLAIN | {"b": Of((4, 8), F64)}, "b is torch.float64, allowed: bfloat16"),
    "a's dtype": (PLAIN | {"a": Of((4, 8), F64)}, "a is torch.float64, allowed: bfloat16, float16 or float32"),
    "gate's dtype": (PLAIN | {"gate": Of((4,), I64)}, "gate is torch.int64, allowed: bfloat16"),
    "bias's dtype": (PROJECTED | {"gate_bias": Of((1,), F16)}, "gate_bias is torch.float16, allowed: torch.float32"),
    "residual's dtype": (PLAIN | {"residual": Of((4, 8), F64)}, "residual is torch.float64, allowed: bfloat16"),
    "top-k weights' dtype": (TOP_K | {"topk_weights": Of((8,), F64)}, "topk_weights is torch.float64, allowed: bfloat16"),
    "norm weight's dtype": (PLAIN | {"eps": 0.1, "norm_weight": Of((8,), F64)}, "norm_weight is torch.float64"),
    "inverse's dtype": (INDEXED | {"inverse": Of((8,), torch.int16)}, "inverse is torch.int16, allowed: torch.int32 or"),
    "mask's dtype": (TOP_K | {"masked": Of((8,), I32)}, "masked is torch.int32, allowed: torch.bool"),
    "a's device": (PLAIN | {"a": Of((4, 8), F32, "meta")}, "a is on meta, allowed: "),
    "inverse's device": (INDEXED | {"inverse": Of((8,), I64, "meta")}, "inverse is on meta, allowed: "),
    "no columns": (PLAIN | {"a": Of((4, 0)), "b": Of((4, 0))}, "b has 0 columns, allowed: 1 to 16384"),
    "many columns": (PLAIN | {"a": Of((4, 16385)), "b": Of((4, 16385))}, "b has 16385 columns"),
    "top_k -1": (TOP_K | {"top_k": -1}, "top_k is -1, allowed: 1 to 32 with topk_weights"),
    "top_k 33": (TOP_K | {"top_k": 33, "a": Of((132, 8)), "topk_weights": Of((132,))}, "top_k is 33"),
    "top_k without weights": (TOP_K | {"topk_weights": None}, "top_k is 2, allowed"),
    "weights without top_k": (TOP_K | {"top_k": 0}, "top_k is 0, allowed"),
    "inverse without top_k": (PLAIN | {"inverse": Of((4,), I64)}, "inverse, .*permuted is given and top_k is 0"),
    "mask without top_k": (PLAIN | {"masked": Of((4,), torch.bool)}, "inverse, .*permuted is given and top_k is 0"),
    "permuted without top_k": (PLAIN | {"permuted": True}, "inverse, .*permuted is given and top_k is 0"),
    "permuted without inverse": (TOP_K | {"permuted": True}, "permuted is True, allowed: with inverse"),
    "a gate without b": (PLAIN | {"b": None}, "a gate is given without b, which it gates"),
    "both gates": (PROJECTED | {"gate": Of((4,))}, "allowed: either gate, or x and gate_weight"),
    "x alone": (PROJECTED | {"gate_weight": None}, "allowed: either gate, or x and gate_weight"),
    "gate and its weight": (PLAIN | {"gate_weight": Of((1, 8))}, "allowed: either gate, or x and gate_weight"),
    "a's rows": (PLAIN | {"a": Of((5, 8))}, r"a is \[5, 8\], allowed: 32 elements for b \[4, 8\]"),
    "a's slots": (TOP_K | {"a": Of((4, 8))}, r"a is \[4, 8\], allowed: 64 elements"),
    "top-k weights": (TOP_K | {"topk_weights": Of((4,))}, r"topk_weights is \[4\], allowed: 8 elements"),
    "inverse": (INDEXED | {"inverse": Of((4,), I64)}, r"inverse is \[4\], allowed: 8 elements"),
    "masked": (TOP_K | {"masked": Of((4, 2, 8), torch.bool)}, r"masked is \[4, 2, 8\], allowed: 8 elements"),
    "gate": (PLAIN | {"gate": Of((4, 8))}, r"gate is \[4, 8\], allowed: 4 elements"),
    "residual": (PLAIN | {"residual": Of((8,))}, r"residual is \[8\], allowed: 32 elements"),
    "norm weight": (PLAIN | {"eps": 0.1, "norm_weight": Of((1,))}, r"norm_weight is \[1\], allowed: 8 elements"),
    "bias without x": (PLAIN | {"gate_bias": Of((1,))}, "gate_bias is given without x"),
    "bias": (PROJECTED | {"gate_bias": Of((2,))}, r"gate_bias is \[2\], allowed: 1 elements"),
    "a's columns": (PLAIN | {"a": Of((8, 4))}, r"a is \[8, 4\], allowed: 8 columns as b"),
    "residual's columns": (PLAIN | {"residual": Of((8, 4))}, r"residual is \[8, 4\], allowed: 8 columns as b"),
    "x's rows": (PROJECTED | {"x": Of((3, 6))}, r"x is \[3, 6\], allowed: as many rows as b, which is \[4, 8\]"),
    "gate weight": (PROJECTED | {"gate_weight": Of((2, 6))}, r"gate_weight is \[2, 6\], allowed: \[1, 6\], \[6, 1\] or"),
    "gate weight's K": (PROJECTED | {"gate_weight": Of((8,))}, r"gate_weight is \[8\]"),
    "norm weight without eps": (PLAIN | {"norm_weight": Of((8,))}, "norm_weight is given without eps"),
    "0-d b": (PLAIN | {"a": Of(()), "b": Of(()), "gate": Of(())}, "b "),
    "0-d a": (PLAIN | {"a": Of(()), "b": Of((1,)), "gate": Of((1,))}, "a "),
    "0-d residual": ({"a": Of((1,)), "b": Of((1,)), "gate": Of((1,)), "residual": Of(())}, "residual "),
    "0-d x": ({"a": Of((1,)), "b": Of((1,)), "x": Of(()), "gate_weight": Of((1,))}, "x "),
}  # fmt: skip


def tensors(arguments, device):
    """Ones in place of every description; of the device it names, or `device`."""
    return {k: torch.ones(v.shape, dtype=v.dtype, device=v.device or device) if isinstance(v, Of) else v
            for k, v in arguments.items()}  # fmt: skip


@pytest.mark.parametrize("valid", [PLAIN, TOP_K, INDEXED, PROJECTED], ids=["plain", "top-k", "indexed", "projected"])
def test_what_the_refused_calls_are_made_of_is_valid(valid):
    assert op(**tensors(valid, DEVICE))[0].shape == (4, 8)


@pytest.mark.parametrize("way", ["op", "recorded", "aten", "direct", "meta", "fake"])
@pytest.mark.parametrize(("arguments", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(monkeypatch, forgotten, way, arguments, message):
    if way in ("meta", "fake") and "on meta" in message:
        pytest.skip("fake tensors of two devices are refused before the op")
    with FakeTensorMode() if way == "fake" else torch.enable_grad():
        arguments = tensors(arguments, {"meta": "meta", "aten": "cpu"}.get(way, DEVICE))
        if way == "recorded":
            arguments = {k: v.requires_grad_(v.is_floating_point()) if isinstance(v, torch.Tensor) else v
                         for k, v in arguments.items()}  # fmt: skip
        if way == "aten":
            monkeypatch.setattr(implementations, "interpreted", lambda: False)
        with pytest.raises(RuntimeError, match="fusionpass::moe_combine: " + message):
            (DIRECT.moe_combine if way == "direct" else op)(**arguments)

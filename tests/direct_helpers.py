"""Two ops and the same as plain functions, and which calls of these went on to the ops."""

import pytest
import torch

from fusionpass.operators import gate_projected_add, gated_add

OPS = {
    "gated_add": torch.ops.fusionpass.gated_add.default,
    "gate_projected_add": torch.ops.fusionpass.gate_projected_add.default,
}
DECLARED = {"gated_add": gated_add.OP, "gate_projected_add": gate_projected_add.OP}
DIRECT = {name: op.direct for name, op in DECLARED.items()}


@pytest.fixture
def through_op(monkeypatch):
    """The calls that went on to the ops: their names."""
    calls = []

    class Counting:
        def __init__(self, name):
            self.name, self.redispatch = name, OPS[name].redispatch

        def __call__(self, *args, **kwargs):
            calls.append(self.name)
            return OPS[self.name](*args, **kwargs)

    for name, op in DECLARED.items():
        monkeypatch.setattr(op, "overload", Counting(name))
    return calls


def targets_of(graph):
    return [node.target for node in graph.nodes if node.op == "call_function"]


def assert_same_bits(got, expected):
    got, expected = ((t,) if isinstance(t, torch.Tensor) else tuple(t) for t in (got, expected))
    assert len(got) == len(expected)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == theirs.dtype and mine.stride() == theirs.stride()
        assert torch.equal(mine, theirs)

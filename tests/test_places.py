"""Every place of transformers that holds the formula, and the near misses: how many rewrites, which refusals, same results.

Where a count or a code does not follow from the line of the formula alone, the row says why.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import models_other as other
import pytest
import torch
from programs import (
    ALONE,
    SCATTER,
    WHOLE,
    assert_no_less_exact,
    assert_only_sites_changed,
    relative_error,
    stops,
    tensors,
    true_outputs,
    unfused,
)
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule

import fusionpass
import fusionpass.operators.implementations

BF16 = torch.bfloat16
CORE = ["gated_add"]
GROWN = ["gate_projection", "gated_add"]
ROUTED = ["finalize", *GROWN]


@dataclass
class Graph:
    """What the pass said of one captured graph, and how often that ran."""

    report: fusionpass.Report
    calls: int = 0


@dataclass
class Capture:
    """A compiler that hands each graph to `rewrite` and runs the result.

    Every graph it sees must keep its other nodes, and under numerics "eager" give the very bits and strides it gave before.
    """

    graphs: list[Graph] = field(default_factory=list)

    def __call__(self, graph_module: GraphModule, example_inputs) -> Callable:
        after, report = fusionpass.rewrite(graph_module)
        assert_only_sites_changed(graph_module, after, report)
        exact = fusionpass.rewrite(graph_module, numerics="eager")
        mixed = [miss for miss in exact.report.misses if miss.code == "mixed-dtype"]  # no bits of eager's to give
        assert [r.stages for r in exact.report.rewrites] == [CORE] * (len(report.rewrites) - len(mixed))
        self.graphs.append(graph := Graph(report))

        def run(*args):
            graph.calls += 1
            want = tensors(graph_module(*args))
            with pytest.MonkeyPatch.context() as patch:
                # A CPU's exp is ATen's: Triton's interpreter takes numpy's, which rounds some float32 otherwise.
                patch.setattr(fusionpass.operators.implementations, "interpreted", lambda: False)
                got = tensors(exact.graph_module(*args))
            assert [g.stride() for g in got] == [w.stride() for w in want]
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
            return after(*args)

        return run

    @property
    def stages(self) -> list[list[str]]:
        return [rewrite.stages for graph in self.graphs for rewrite in graph.report.rewrites]

    @property
    def stopped(self) -> list[str]:
        """Why the gate's producer stayed outside, per rewrite where it did."""
        return [found["gate_projection"] for found in self.all_stops if "gate_projection" in found]

    @property
    def all_stops(self) -> list[dict[str, str]]:
        return [stops(rewrite) for graph in self.graphs for rewrite in graph.report.rewrites]

    @property
    def misses(self) -> list[str]:
        return sorted(miss.code for graph in self.graphs for miss in graph.report.misses)

    @property
    def executed(self) -> int:
        return sum(graph.calls * len(graph.report.rewrites) for graph in self.graphs)


class Place(NamedTuple):
    build: Callable[[], other.Built]
    stages: list[list[str]]  # of each rewrite
    misses: Sequence[str] = ()
    stopped: Sequence[str] = ()  # why the gate's producer stayed outside, per rewrite
    around: Mapping[str, str] = MappingProxyType(
        dict.fromkeys(ALONE, "gate-columns")
    )  # why the other stages stayed outside
    aot: bool = False  # captured below AOTAutograd: at Dynamo's level a cell is one opaque call


def bf16(build: Callable) -> Callable:
    return functools.partial(build, BF16)


COLUMNS, OTHER = "gate-columns", "not-a-projection"
PLACES = {
    # adaLN's b is float32 on purpose: where the rest is bfloat16, the sum is promoted
    "esmfold2 diffusion layer": Place(other.esmfold2_diffusion, [CORE] * 4, stopped=[COLUMNS] * 4),
    "esmfold2 diffusion layer, bf16": Place(bf16(other.esmfold2_diffusion), [CORE] * 4, stopped=[COLUMNS] * 4),
    # the product comes back from a submodule; the gate is [B, N, N, C]
    "esmfold2 pair update": Place(other.esmfold2_pair, [CORE] * 2, stopped=[COLUMNS] * 2),
    "esmfold2 pair update, bf16": Place(bf16(other.esmfold2_pair), [CORE] * 2, stopped=[COLUMNS] * 2),
    "rwkv": Place(other.rwkv, [CORE], stopped=[COLUMNS]),
    "rwkv, bf16": Place(bf16(other.rwkv), [CORE], stopped=[COLUMNS]),
    # the gate is [B, C, 1] from a convolution: its rows are channels
    "qwen2_5_omni squeeze-excite": Place(other.qwen2_5_omni_se, [CORE], stopped=[OTHER], around=ALONE),
    "qwen2_5_omni squeeze-excite, bf16": Place(bf16(other.qwen2_5_omni_se), [CORE], stopped=[OTHER], around=ALONE),
    # gate and b are channels-last slices; a is contiguous and comes first, so the sum is contiguous
    "univnet": Place(other.univnet, [CORE], stopped=[OTHER]),
    # the gate is a parameter [H]; alpha reads the sigmoid too, so the sigmoid stays
    "muse_spark": Place(other.muse_spark, [CORE], stopped=[OTHER]),
    "muse_spark, bf16": Place(bf16(other.muse_spark), [CORE], stopped=[OTHER]),
    # both addends are products with a chunk of one sigmoid
    "d_fine": Place(other.d_fine, [], ["view-between"]),
    "deimv2": Place(other.deimv2, [], ["view-between"]),
    # 2 * h * s + 2 * r * (1 - s): the left addend is the product, b = 2 * h, and s is read twice
    "clap": Place(other.clap, [CORE], stopped=[OTHER]),
    "glpn": Place(other.glpn, [], ["view-between"]),
    "qwen4_exp per-layer embedding": Place(other.qwen4_exp_ple, [], ["view-between"]),
    # a multiply by the mask, of other rows, comes between: no longer the formula at all
    "qwen4_exp per-layer embedding, masked": Place(functools.partial(other.qwen4_exp_ple, masked=True), []),
    # s * c + s * tanh: one sum, of which both addends match
    "LSTMCell": Place(other.lstm_cell, [CORE], stopped=[OTHER], aot=True),
    # n + r * h and new + z * (h - new)
    "GRUCell": Place(other.gru_cell, [CORE] * 2, stopped=[OTHER] * 2, aot=True),
    "slanet's GRUCell": Place(other.slanet, [CORE] * 2, stopped=[OTHER] * 2, aot=True),
}
NEAR_MISSES = {
    # p * l + (1 - p) * (1 - l) is the formula to the letter, with a = (1 - p) * (1 - l); p has other readers and stays
    "maskformer's focal loss": Place(other.maskformer_loss, [CORE], stopped=[OTHER]),
    # magnitude * sigmoid + eps; the product with the hidden states goes into a reduction
    "hy_v4": Place(other.hy_v4, [], ["scalar-operand"]),
    "deepseek_v4": Place(other.deepseek_v4, [], ["scaled"]),
    "glm5_next": Place(other.glm5_next, [], ["scaled"]),
    # hyper-connections of attention and MLP, a flattened product each, beside the shared expert, whose sum goes into one
    "qwen4_exp decoder layer": Place(
        other.qwen4_exp_layer, [ROUTED], ["scaled"] * 2, around=ALONE | {"finalize": "joined"}
    ),
    # (x * g) * mask
    "esm v1": Place(other.esmfold, [], ["scaled"] * 2),
    "patchtst": Place(other.patchtst, [], ["scalar-operand"]),
    "patchtsmixer": Place(other.patchtsmixer, [], ["scalar-operand"]),
    # a chunk of the sigmoid, and 2.0 added: the view is named first
    "wavlm": Place(other.wavlm, [], ["view-between"]),
    # (16 * sigmoid).unsqueeze(0)
    "swinv2": Place(other.swinv2, [], ["scalar-operand"]),
    "gated delta rule": Place(other.qwen3_next_recurrent, []),
    "pp_ocrv5": Place(other.pp_ocrv5, []),
    "efficientnet": Place(other.efficientnet, []),
    "emu3": Place(other.emu3, []),
    "mllama's tanh gate": Place(other.mllama, []),
}
ALL = PLACES | NEAR_MISSES


def built(place: Place) -> other.Built:
    torch.manual_seed(0)
    return place.build()


@pytest.mark.parametrize("place", ALL.values(), ids=ALL)
def test_place(place):
    module, args = built(place)
    capture = Capture()
    backend = aot_autograd(fw_compiler=capture) if place.aot else capture
    with torch.no_grad():
        eager = tensors(module(*args))
        truth = true_outputs(module, args, {})
        got = tensors(torch.compile(module, backend=backend)(*args))

    assert capture.stages == place.stages, [graph.report.misses for graph in capture.graphs]
    assert capture.misses == list(place.misses)
    assert capture.stopped == list(place.stopped)
    outside = [{stage: found.get(stage, "joined") for stage in ALONE} for found in capture.all_stops]
    assert outside == [dict(place.around)] * len(place.stages)
    assert capture.executed == len(place.stages)
    if place.stages:
        assert_no_less_exact(got, eager, truth)
    else:
        torch.testing.assert_close(got, eager, rtol=0, atol=0)


# qwen4_exp takes 7 s a capture; its decoder layer above runs batched_mm.
CASES = [("qwen3_omni_moe", "grouped_mm"), ("qwen3_omni_moe", "batched_mm"), ("qwen3_omni_moe", "eager")]
CASES += [("qwen4_exp", "grouped_mm"), ("qwen4_exp", "eager")]


@pytest.mark.parametrize(("family", "experts"), CASES)
def test_family(family, experts):
    """Graph breaks, by experts or by qwen4_exp's indexer, leave every site of both layers to be found."""
    model, inputs = other.FAMILIES[family](experts)
    truth_model = copy.deepcopy(model)
    truth_model.set_experts_implementation("batched_mm")  # grouped_mm has no float64
    capture = Capture()
    with torch.no_grad():
        eager = tensors(unfused(model)(**inputs))
        truth = true_outputs(truth_model, (), inputs)
        got = tensors(torch.compile(model, backend=capture)(**inputs))

    captured = 1 if experts == "eager" else 2  # layers share the pieces that eager experts split them into
    # In pieces, the graph of the formula begins with the experts' sum and ends with the block; qwen4_exp has no residual
    # add, its hyper-connection multiplies the sum.
    joined = GROWN if experts == "eager" else WHOLE if family == "qwen3_omni_moe" else ROUTED
    assert capture.stages == [joined] * captured
    assert capture.all_stops == [{stage: code for stage, code in ALONE.items() if stage not in joined}] * captured
    assert capture.executed == 2
    sources = [rewrite.source for graph in capture.graphs for rewrite in graph.report.rewrites]
    assert [source.split(":")[0] for source in sources] == [f"modeling_{family}.py"] * captured
    if family == "qwen3_omni_moe":
        assert capture.misses == []
        assert (len(capture.graphs) == 1) == (experts != "eager")
    else:
        # Of the two hyper-connections per layer, those whose sigmoid and sum a graph break has not put apart.
        assert capture.misses == ["scaled"] * (1 if experts == "eager" else 3)
        assert len(capture.graphs) > 1
    assert [o.stride() for o in got] == [o.stride() for o in eager]
    assert relative_error(got, truth) <= SCATTER * relative_error(eager, truth)


def test_explain_counts_the_runs_of_shared_pieces():
    """The report itself: one captured site, two executed."""
    model, inputs = other.talker("eager")
    with torch.no_grad():
        report = fusionpass.explain(model)(**inputs)
    assert [rewrite.stages for rewrite in report.rewrites] == [GROWN]
    assert report.executed == 2
    assert report.graph_breaks

"""Real models: exact counts, outputs and gradients no further from float64 than eager's own, no other node changed."""

from __future__ import annotations

import copy

import models
import pytest
import torch
from programs import ALONE, DEVICE, SCATTER, WHOLE, assert_only_sites_changed, relative_error, stops, unfused
from torch.fx import GraphModule, Interpreter
from torch.fx.experimental.proxy_tensor import make_fx

import fusionpass
from fusionpass.entry.backend import Backend
from fusionpass.options import Options

EXPERTS = ("grouped_mm", "batched_mm", "eager")
LAYERS = 2
GROWN = ["gate_projection", "gated_add"]
ROUTED = ["finalize", *GROWN]


def compiled(model, *, dynamic: bool | None = None):
    return torch.compile(model, backend=Backend(Options()), dynamic=dynamic)


def loss(model, inputs) -> torch.Tensor:
    return model(**inputs).logits.double().square().mean()


def gradients(model) -> list[torch.Tensor]:
    return [p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None]


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_dynamo(family, experts, dynamic, training):
    if dynamic and experts == "eager" and family != "qwen2_moe":
        pytest.skip(
            "Dynamo takes minutes to unroll the delta rule in pieces with dynamic shapes; qwen2_moe covers the pass"
        )
    model, inputs = models.build(family, experts=experts)
    truth, eager = copy.deepcopy(model).double(), copy.deepcopy(model)
    truth.set_experts_implementation("batched_mm")  # grouped_mm has no float64
    with torch.set_grad_enabled(training), fusionpass.collect() as report:
        outputs = []
        for each in (truth, unfused(eager, dynamic=dynamic), compiled(model, dynamic=dynamic)):
            outputs.append(each(**inputs).logits)
            if training:
                outputs[-1].double().square().mean().backward()

    captured = 1 if experts == "eager" else LAYERS  # eager experts split each layer; the pieces are shared by layers
    # The last layer's sum goes into the model's own norm. In pieces, the graph of the formula begins with the experts' sum
    # and ends with the block.
    joined, outside = (WHOLE, {}) if experts != "eager" else (GROWN, ALONE)
    if training:
        joined, outside = GROWN, dict.fromkeys(ALONE, "needs-grad")
    assert [r.stages for r in report.rewrites] == [joined] * captured
    assert [stops(r) for r in report.rewrites] == [outside] * captured
    assert report.executed == LAYERS
    assert report.misses == []
    assert [r.source.split(":")[0] for r in report.rewrites] == [f"modeling_{family}.py"] * captured
    if experts != "eager":
        assert [r.module for r in report.rewrites] == ["model.layers.0.mlp", "model.layers.1.mlp"]
        assert report.graph_breaks == []

    want, eager_out, got = (o.detach() for o in outputs)
    assert got.stride() == eager_out.stride()
    assert relative_error([got], [want]) <= SCATTER * relative_error([eager_out], [want])
    if training:
        want, eager_grads, got = gradients(truth), gradients(eager), gradients(model)
        assert len(want) == len(eager_grads) == len(got)
        assert relative_error(got, want) <= SCATTER * relative_error(eager_grads, want)


def test_no_bias_over_many_draws():
    """Over 8 draws of the weights the scatter shrinks: the errors' ratio is 1 within a fifth, as a geometric mean."""
    model, inputs = models.build("qwen2_moe", experts="batched_mm")
    twin = copy.deepcopy(model)
    fused, baseline, ratio = compiled(model), unfused(twin), 1.0
    for seed in range(8):
        drawn, _ = models.build("qwen2_moe", experts="batched_mm", seed=seed)
        truth = copy.deepcopy(drawn).double()
        for each in (model, twin):
            each.load_state_dict(drawn.state_dict())
            each.zero_grad()
        for each in (truth, baseline, fused):
            loss(each, inputs).backward()
        want = gradients(truth)
        ratio *= relative_error(gradients(model), want) / relative_error(gradients(twin), want)
    assert ratio ** (1 / 8) <= 1.2


class Recorder(Interpreter):
    """Runs a rewritten graph and keeps the operands of each of our ops."""

    def __init__(self, graph_module: GraphModule):
        super().__init__(graph_module)
        self.sites: list[tuple] = []

    def call_function(self, target, args, kwargs):
        if getattr(target, "namespace", "") == "fusionpass":
            assert target is torch.ops.fusionpass.moe_combine.default
            self.sites.append((args, kwargs))
        return super().call_function(target, args, kwargs)


def as_written(family: str, dtype: torch.dtype, y, b, **given) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's sum and its norm, node by node as transformers writes them, in `dtype`; in float64 the truth."""
    assert given.pop("offset", 0.0) == (0.0 if family == "qwen2_moe" else 1.0)
    top_k, eps, permuted = given.pop("top_k"), given.pop("eps"), given.pop("permuted", False)
    inverse = given.pop("inverse", None)
    assert permuted == (inverse is not None)  # grouped_mm weighs the experts' outputs where they lie
    if dtype is torch.float64:
        y, b = y.double(), b.double()
        given = {name: t if t.dtype is torch.bool else t.double() for name, t in given.items()}
    wide = torch.promote_types(dtype, torch.float32)
    masked = given.pop("masked", None)
    if masked is not None:  # transformers up to 5.17 hide the rows of experts that live elsewhere
        y = y.masked_fill(masked.reshape(-1, 1), 0)
    weights = given.pop("topk_weights").to(dtype)  # the op is given what the router had before it rounded
    weighted = y.reshape(-1, y.shape[-1]) * weights.reshape(-1, 1)
    if inverse is not None:
        weighted = weighted[inverse]
    routed = weighted.view(b.shape[0], top_k, -1).sum(dim=1).to(dtype)
    logit = torch.nn.functional.linear(given.pop("x"), given.pop("gate_weight"))
    residual, weight = given.pop("residual"), given.pop("norm_weight")
    assert not given
    total = residual + (routed + torch.sigmoid(logit) * b).reshape(residual.shape)
    normed = total.to(wide)
    normed = normed * torch.rsqrt(normed.pow(2).mean(-1, keepdim=True) + eps)
    return total, weight * normed.to(dtype) if family == "qwen2_moe" else (normed * (1.0 + weight.to(wide))).to(dtype)


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_site_itself(family, dtype, experts):
    """On the very operands the model feeds it, each result's largest error is no larger than that of eager's kernels."""
    model, inputs = models.build(family, dtype=dtype, experts=experts, layers=1)
    recorders = []

    def inner(graph_module, example_inputs):
        recorders.append(Recorder(graph_module))
        return recorders[-1].run

    with torch.no_grad():
        fusionpass.fuse(model, inner=inner)(**inputs)
        sites = [site for recorder in recorders for site in recorder.sites]
        assert len(sites) == 1
        for args, kwargs in sites:
            results = torch.ops.fusionpass.moe_combine(*args, **kwargs)
            written = as_written(family, dtype, *args, **kwargs)
            truths = as_written(family, torch.float64, *args, **kwargs)
            for got, eager, truth in zip(results, written, truths, strict=True):
                assert (got.dtype, got.shape, got.stride()) == (eager.dtype, eager.shape, eager.stride())
                # float32 has nothing to gain: there both sides round alike and only the order of the sums differs.
                slack = torch.finfo(dtype).eps * truth.abs().max() if dtype is torch.float32 else 0
                assert (got.double() - truth).abs().max() <= (eager.double() - truth).abs().max() + slack


@pytest.mark.parametrize("family", models.FAMILIES)
def test_no_other_node_changes_in_a_dynamo_graph(family):
    model, inputs = models.build(family)
    reports = []

    def backend(graph_module, example_inputs):
        code = graph_module.code
        after, report = fusionpass.rewrite(graph_module)
        assert graph_module.code == code
        assert_only_sites_changed(graph_module, after, report)
        reports.append(report)
        return after

    with torch.no_grad():
        expected = model(**inputs).logits
        got = torch.compile(model, backend=backend)(**inputs).logits
    assert [[r.stages for r in report.rewrites] for report in reports] == [[WHOLE] * LAYERS]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_export(family, dynamic, experts):
    if dynamic and family != "qwen2_moe":
        pytest.skip("the unrolled delta rule takes 20 s to export with dynamic shapes; qwen2_moe covers the pass")
    # With this seed no expert is chosen by a margin that one rounding turns.
    model, inputs = models.build(family, dtype=torch.bfloat16, experts=experts, seed=1)
    shapes = {"input_ids": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}} if dynamic else None
    ids = {"input_ids": inputs["input_ids"]}
    model.config.use_cache = False
    with torch.no_grad():
        program = torch.export.export(model, (), ids, dynamic_shapes=shapes, strict=False)
        after, report = fusionpass.rewrite(program)
        assert [r.stages for r in report.rewrites] == [WHOLE] * LAYERS
        assert [r.module for r in report.rewrites] == ["model.layers.0.mlp", "model.layers.1.mlp"]
        assert_only_sites_changed(program.graph_module, after.graph_module, report)
        expected, got = program.module()(**ids).logits, after.module()(**ids).logits
        truth = copy.deepcopy(model).double()
        truth.set_experts_implementation("batched_mm")
        want = truth(**ids).logits
    assert relative_error([got], [want]) <= SCATTER * relative_error([expected], [want])


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_make_fx_of_the_block(family, experts, mode):
    model, _ = models.build(family, dtype=torch.bfloat16, experts=experts)
    block = model.model.layers[0].mlp
    hidden = torch.randn(2, 5, 32, device=DEVICE, dtype=torch.bfloat16)
    with torch.no_grad():
        before = make_fx(lambda h: block(h), tracing_mode=mode, _allow_non_fake_inputs=True)(hidden)
        after, report = fusionpass.rewrite(before)
        assert [r.stages for r in report.rewrites] == [ROUTED]
        # The block's end: a reshape, which is handed out.
        outside = {stage: code for stage, code in ALONE.items() if stage != "finalize"}
        assert [stops(r) for r in report.rewrites] == [outside]
        assert_only_sites_changed(before, after, report)
        truth = copy.deepcopy(model).double()
        truth.set_experts_implementation("batched_mm")
        want = truth.model.layers[0].mlp(hidden.double())
        # Most of the error is that of the experts' own products, which both sides share: 0.89 to 1.06 of eager's were seen.
        assert relative_error([after(hidden)], [want]) <= 1.2 * relative_error([block(hidden)], [want])


def test_make_fx_with_the_backward():
    """In a joint graph the backward reads the sigmoid too: the core is fused, the projection stays for both readers."""
    model, _ = models.build("qwen2_moe", experts="batched_mm")
    block = model.model.layers[0].mlp
    weights = dict(block.named_parameters())

    def step(hidden, weights):
        out = torch.func.functional_call(block, weights, (hidden,))
        return out, torch.autograd.grad(out.square().sum(), list(weights.values()))

    hidden = torch.randn(2, 5, 32, device=DEVICE)
    before = make_fx(step)(hidden, weights)
    after, report = fusionpass.rewrite(before)
    assert [r.stages for r in report.rewrites] == [["finalize", "gated_add"]]
    assert stops(report.rewrites[0])["gate_projection"] == "gate-used-elsewhere"
    assert_only_sites_changed(before, after, report)
    for got, want in zip(
        torch.utils._pytree.tree_leaves(after(hidden, weights)),
        torch.utils._pytree.tree_leaves(before(hidden, weights)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


def test_symbolic_trace_of_the_block():
    """No shapes are recorded; example inputs give them."""
    model, _ = models.build("qwen2_moe", experts="batched_mm")
    block = model.model.layers[0].mlp
    before = torch.fx.symbolic_trace(block)
    hidden = torch.randn(2, 5, 32, device=DEVICE)
    with torch.no_grad():
        after, report = fusionpass.rewrite(before, [hidden])
        assert [r.rule for r in report.rewrites] == ["gated_add"]
        torch.testing.assert_close(after(hidden), block(hidden))


def test_decode_with_a_static_cache():
    transformers = pytest.importorskip("transformers")
    model, inputs = models.build("qwen2_moe")
    cache = transformers.StaticCache(config=model.config, max_cache_len=16)
    with torch.no_grad():
        report = fusionpass.explain(model)(input_ids=inputs["input_ids"][:, :1], past_key_values=cache, use_cache=True)
    assert [r.shape for r in report.rewrites] == [[2, 1, 32]] * LAYERS  # as the residual is


def test_generate():
    model, inputs = models.build("qwen2_moe")
    prompt = inputs["input_ids"]
    options = dict(max_new_tokens=4, do_sample=False)
    expected = model.generate(prompt, **options)
    fusionpass.fuse(model)
    with fusionpass.collect() as report:
        got = model.generate(prompt, **options)
    assert report.executed == 4 * LAYERS
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
def test_a_training_step_through_inductor(checkpointed):
    """Its gradients are as far from float64 as Inductor's own; checkpointed layers are child graphs, which run twice.

    Not as eager's: on a GPU Inductor's gradients of the unchanged model are 1.5 to 2.9 times as far off (3 seeds, with
    and without checkpoints), and those here 1.5 to 2.9 times too, not always where Inductor's are.
    """
    model, inputs = models.build("qwen2_moe", experts="batched_mm", layers=1)
    model.train()
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.is_gradient_checkpointing == checkpointed
    truth, plain = copy.deepcopy(model).double(), copy.deepcopy(model)
    loss(truth, inputs).backward()
    loss(torch.compile(plain, dynamic=False), inputs).backward()
    with fusionpass.collect() as report:
        loss(torch.compile(model, backend="fusionpass", dynamic=False), inputs).backward()
    assert [r.stages for r in report.rewrites] == [GROWN]
    assert report.misses == []
    want, inductors, got = gradients(truth), gradients(plain), gradients(model)
    assert len(want) == len(inductors) == len(got)
    assert relative_error(got, want) <= SCATTER * relative_error(inductors, want)

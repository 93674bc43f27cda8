"""The pass adds no recompile, no graph break and no copy; runs give the same bits each time; threads do not meet."""

import threading
from collections import Counter

import models
import pytest
import torch
import torch.nn.functional as F
from programs import DEVICE, Block, operands, unfused
from torch._dynamo.utils import counters

import fusionpass
import fusionpass.operators.implementations

S = torch.sigmoid


def formula(x, up, weight):
    return x + S(F.linear(x, weight)) * (x @ up)


def region(x, up, weight):
    total = x + (x.tanh() @ up + S(F.linear(x, weight)) * (x @ up))
    return total, F.rms_norm(total, (8,), up[0], 1e-6)


def split(x, up, weight):
    half = formula(x, up, weight)
    torch._dynamo.graph_break()
    return formula(half, up, weight)


PROGRAMS = {"formula": formula, "region": region, "with a graph break": split}
SHAPES = {
    "static": ({"dynamic": False}, False),
    "as Dynamo chooses": ({}, False),
    "dynamic": ({"dynamic": True}, False),
    "marked dynamic": ({}, True),
}


def compiles(function, backend, how, marked: bool, rows=(2, 3, 5, 9, 3, 2)) -> tuple[int, Counter]:
    """How many graphs are compiled over calls with these numbers of rows, and the graph breaks."""
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(function, backend=backend, **how)
    up, weight = operands((8, 8), (1, 8))
    for count in rows:
        (x,) = operands((count, 8))
        if marked:
            torch._dynamo.mark_dynamic(x, 0)
        got, want = compiled(x, up, weight), function(x, up, weight)
        torch.testing.assert_close(got, want)
    return counters["stats"]["unique_graphs"], Counter(counters["graph_break"])


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "grad"])
@pytest.mark.parametrize(("how", "marked"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("program", PROGRAMS)
def test_no_compile_is_added(program, how, marked, grad):
    from fusionpass.entry.backend import Backend
    from fusionpass.options import Options

    with torch.set_grad_enabled(grad):
        without = compiles(PROGRAMS[program], "eager", how, marked)
        with fusionpass.collect() as report:
            fused = compiles(PROGRAMS[program], Backend(Options.from_user({})), how, marked)
    assert report.rewrites
    assert fused == without


@pytest.mark.parametrize("experts", ["grouped_mm", "eager"])
def test_no_compile_is_added_to_a_model(experts):
    from fusionpass.entry.backend import Backend
    from fusionpass.options import Options

    model, _ = models.build("qwen2_moe", experts=experts)
    found = []
    for backend in ("eager", Backend(Options.from_user({}))):
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(model, backend=backend)
        with torch.no_grad():
            for tokens in (3, 5, 9, 9):
                compiled(input_ids=torch.arange(2 * tokens, device=DEVICE).view(2, tokens) % 100)
        found.append((counters["stats"]["unique_graphs"], Counter(counters["graph_break"])))
    assert found[0] == found[1]


def copies(function, args) -> Counter:
    """Clones and copies that a call runs."""
    function(*args)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(*args)
    names = ("aten::clone", "aten::copy_", "aten::contiguous", "aten::_to_copy")
    return Counter(event.name for event in profile.events() if event.name in names)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("program", ["formula", "region"])
def test_no_copy_is_added(program, inner, monkeypatch):
    monkeypatch.setattr(
        fusionpass.operators.implementations, "interpreted", lambda: False
    )  # the interpreter makes copies of its own
    args = operands((4, 8), (8, 8), (1, 8))
    with torch.no_grad():
        without = copies(torch.compile(PROGRAMS[program], backend=inner), args)
        torch._dynamo.reset()
        fused = copies(fusionpass.fuse(lambda *x: PROGRAMS[program](*x), inner=inner), args)
    assert not fused - without


@pytest.mark.parametrize("program", ["formula", "region"])
def test_no_copy_is_in_inductors_code(program):
    from torch._inductor.utils import run_and_get_code

    args = operands((4, 8), (8, 8), (1, 8))
    options = {"inductor": {"fx_graph_cache": False}}
    with torch.no_grad(), fusionpass.collect() as report:
        compiled = torch.compile(PROGRAMS[program], backend="fusionpass", options=options)
        got, code = run_and_get_code(compiled, *args)
    torch.testing.assert_close(got, PROGRAMS[program](*args))
    assert report.rewrites
    assert not any(word in text for text in code for word in ("clone", ".copy_(", "copy_kernel"))


@pytest.mark.parametrize("program", ["formula", "region"])
def test_the_same_bits_each_time(program):
    args = operands((4, 8), (8, 8), (1, 8), dtype=torch.bfloat16)
    fused = fusionpass.fuse(lambda *x: PROGRAMS[program](*x))
    with torch.no_grad():
        first = fused(*args)
        for _ in range(100):
            torch.testing.assert_close(fused(*args), first, rtol=0, atol=0)


def test_threads_compile_at_once(monkeypatch):
    """Each has its own report and its own results, of its own function or of one that all share."""
    # The interpreter knows no threads.
    monkeypatch.setattr(fusionpass.operators.implementations, "interpreted", lambda: False)
    count, found, failed = 6, {}, []
    shared = fusionpass.fuse(formula)
    start = threading.Barrier(count)

    def work(index: int) -> None:
        try:
            args = operands((4 + index, 8), (8, 8), (1, 8), seed=index)
            scope = {"formula": formula}
            exec(f"def own(x, up, weight): return formula(x, up, weight) * {index}", scope)  # code of its own
            own = fusionpass.fuse(scope["own"])
            start.wait()
            with fusionpass.collect() as report:
                for _ in range(3):
                    torch.testing.assert_close(own(*args), formula(*args) * index)
                    torch.testing.assert_close(shared(*args), formula(*args))
            found[index] = report
        except Exception as error:
            failed.append((index, error))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed[0][1]
    assert sorted(found) == list(range(count))
    for report in found.values():
        assert (
            report.misses == [] and 1 <= len(report.rewrites) <= 7
        )  # of its own and, where it came first, the shared one
        assert all(rewrite.stages == ["gate_projection", "gated_add"] for rewrite in report.rewrites)


def test_a_model_is_as_it_was_after_a_compiler_failed():
    """Nothing is half rewritten: the model runs on, alone and under the pass with another compiler."""

    def broken(graph_module, example_inputs):
        raise RuntimeError("no such instruction")

    block, (x,) = Block().to(DEVICE), operands((4, 8))
    want, state = block(x), {name: value.clone() for name, value in block.state_dict().items()}
    with pytest.raises(Exception, match="no such instruction"):
        fusionpass.fuse(block, inner=broken)(x)
    del block.forward
    torch._dynamo.reset()
    torch.testing.assert_close(block(x), want, rtol=0, atol=0)
    torch.testing.assert_close(unfused(fusionpass.fuse(block))(x), want)
    assert all(torch.equal(value, state[name]) for name, value in block.state_dict().items())

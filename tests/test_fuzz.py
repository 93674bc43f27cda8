"""Random programs around the formula behave as eager does: values, dtypes, shapes, strides, aliasing, mutated inputs,
gradients. Each program is source text, so that a failing one prints as something to run.

More than the default number: `pytest tests/test_fuzz.py --fuzz 2000`.
"""

import torch
import torch.nn.functional as F
from hypothesis import given, note
from hypothesis import strategies as st
from programs import DEVICE, operands
from torch.fx.experimental.proxy_tensor import make_fx

import fusionpass

# {w}, {v}: tensors of [4, 6]; {n}: of [4, 1]; W: the gate's weight [1, 6]
PURE_WIDE = (
    "{w} * 2",
    "{w} + {v}",
    "{w} * {v}",
    "torch.tanh({w})",
    "{w}.t().contiguous().t()",
    "{w}.clone()",
    "{w}.reshape(-1).reshape(4, 6)",
    "{w}.to({w}.dtype)",
    "{w}[:, :]",
    "{n}.expand(4, 6)",
    "torch.sigmoid({n}) * {w}",
    "{w} * torch.sigmoid({v})",
    "F.dropout({w}, 0.5, True)",
    "{w} * torch.rand_like({v})",
    "{w}.detach()",
    "{w}.bfloat16().float()",
    "(torch.sigmoid({n}) * {w}).to({w}.dtype)",
)
PURE_NARROW = (
    "{n} * 2",
    "{w}[:, :1]",
    "{w}.sum(1, keepdim=True)",
    "F.linear({w}, W)",
    "({w} @ W[0]).unsqueeze(-1)",
    "torch.sigmoid({n})",
    "{n}.view(2, 2, 1).reshape(4, 1)",
)
FORMULAS = (
    "{w} + torch.sigmoid({n}) * {v}",
    "{v} * F.sigmoid({n}) + {w}",
    "{w}.add({v}.mul({n}.sigmoid()))",
    "torch.addcmul({w}, torch.sigmoid({n}), {v})",
    "torch.add({w}, torch.sigmoid({n}) * {v}, alpha=2)",
    "{w} + torch.sigmoid(F.linear({v}, W)) * {v}",
    "{w} + torch.sigmoid({v}) * {w}",
    "torch.sigmoid({n}) * {w} + torch.sigmoid({w}) * {v}",
    "({w}.bfloat16() + torch.sigmoid({n}.bfloat16()) * {v}.bfloat16()).float()",
    "{w} + (torch.sigmoid({n}.bfloat16()) * {v})",
    "{w} + F.dropout(torch.sigmoid({n}) * {v}, 0.5, True)",
    "{w} + {n} * {v}",
    "{w} + {v}",
)
WRITES = (
    "{w}.mul_(0.5)",
    "{w} += {v}",
    "{w}[0] = 0",
    "{w}[:, ::2].add_(1)",
    "{n}.add_(1)",
    "{w}.zero_()",
    "torch.mul({v}, 2, out={w})",
    "{w} += torch.sigmoid({n}) * {v}",
    "{w}.add_({v} * torch.sigmoid({n}))",
    "{w} *= torch.sigmoid({n})",
    "{n}.sigmoid_()",
    "{w}.t_(); {w}.t_()",
    "{w}.copy_({v})",
)


SPLIT = ("s{i} = torch.sigmoid({n})", "m{i} = s{i} * {v}", "t{i} = {w} + m{i}")
SPLIT_PROJECTED = ("l{i} = F.linear({v}, W)", "s{i} = torch.sigmoid(l{i})", "m{i} = s{i} * {w}", "t{i} = {w} + m{i}")


# The combine region line by line. Y: the experts' outputs [8, 6]; K: weights [4, 2]; I: a permutation of 8; M: a mask
# [4, 2]; N: a norm's weight [6]. a{i}: the routed sum, t{i}: the sum, u{i}: the normed sum.
ROUTED = (
    ("a{i} = {w}",),
    ("p{i} = Y * K.reshape(-1, 1)", "q{i} = p{i}[I]", "r{i} = q{i}.view(4, 2, 6)", "a{i} = r{i}.sum(1)"),
    ("p{i} = Y[I]", "q{i} = p{i}.view(4, 2, 6) * K.unsqueeze(-1)", "a{i} = q{i}.sum(dim=-2)"),
    ("c{i} = K.t().contiguous().t()", "p{i} = Y.view(4, 2, 6) * c{i}[..., None]", "a{i} = p{i}.sum(1)"),
    ("p{i} = Y.masked_fill(M.view(-1, 1), 0)", "q{i} = p{i}.view(4, 2, 6) * K[..., None]", "a{i} = q{i}.sum(1)"),
    ("a{i} = torch.einsum('tk,tkh->th', K, Y.view(4, 2, 6))",),
)
CORES = (
    ("m{i} = torch.sigmoid({n}) * {v}", "t{i} = a{i} + m{i}"),
    ("l{i} = F.linear({v}, W)", "s{i} = torch.sigmoid(l{i})", "t{i} = a{i} + s{i} * {w}"),
)
RESIDUALS = (
    (),
    ("t{i} = {w} + t{i}",),
    ("t{i} = t{i}.view(2, 2, 6)", "t{i} = {v}.reshape(2, 2, 6) + t{i}", "t{i} = t{i}.view(4, 6)"),
)
NORMS = (
    (),
    ("u{i} = F.rms_norm(t{i}, (6,), N, 1e-5)",),
    ("v{i} = t{i}.pow(2).mean(-1, keepdim=True)", "u{i} = N * (t{i} * torch.rsqrt(v{i} + 1e-5))"),
    (
        "n{i} = 1 + N",
        "v{i} = (t{i} * t{i}).mean(-1, True)",
        "x{i} = t{i} * torch.rsqrt(v{i} + 1e-5)",
        "u{i} = x{i} * n{i}",
    ),
)
INPUT_WRITES = (
    "Y.mul_(0.5)",
    "Y[0] = 1",
    "K.add_(1)",
    "N.mul_(2)",
    "I.copy_(I.flip(0))",
    "M.logical_not_()",
    "W.add_(0.1)",
)


def region(draw, index: int, names: dict[str, str], writes: bool) -> list[str]:
    """The region's lines, with writes in between to what it has read or made."""
    lines, made = [], []
    for steps in (ROUTED, CORES, RESIDUALS, NORMS):
        for step in draw(st.sampled_from(steps)):
            lines.append(step.format(i=index, **names))
            made.append(lines[-1].split(" = ")[0])
            if writes and draw(st.integers(0, 5)) == 0:
                own = [f"{name}.mul_(0.5)" for name in made]
                lines.append(draw(st.sampled_from((*INPUT_WRITES, *own, "{w}.mul_(2)", "{v}[0] = 0"))).format(**names))
    return lines


@st.composite
def programs(draw, writes: bool) -> str:
    wide, narrow, lines = ["a", "b"], ["g"], []
    for index in range(draw(st.integers(2, 9))):
        kinds = ["wide", "narrow", "formula", "split", "region"] + (["write", "write"] if writes else [])
        kind = draw(st.sampled_from(kinds))
        names = {
            "w": draw(st.sampled_from(wide)),
            "v": draw(st.sampled_from(wide)),
            "n": draw(st.sampled_from(narrow)),
        }
        if kind == "write":
            lines.append(draw(st.sampled_from(WRITES)).format(**names))
            continue
        if kind == "region":
            lines += region(draw, index, names, writes)
            wide += [f"t{index}"] + ([f"u{index}"] if any(line.startswith(f"u{index} = ") for line in lines) else [])
            continue
        if kind == "split":  # the formula line by line, with writes to its own operands in between
            for step in draw(st.sampled_from((SPLIT, SPLIT_PROJECTED))):
                lines.append(step.format(i=index, **names))
                if writes and draw(st.booleans()):
                    lines.append(draw(st.sampled_from(WRITES)).format(**names))
            wide.append(f"t{index}")
            continue
        source = {"wide": PURE_WIDE, "narrow": PURE_NARROW, "formula": FORMULAS}[kind]
        (narrow if kind == "narrow" else wide).append(f"t{index}")
        lines.append(f"t{index} = " + draw(st.sampled_from(source)).format(**names))
    results = draw(st.lists(st.sampled_from(wide + narrow), min_size=1, max_size=3))
    body = "\n".join("    " + line for line in [*lines, f"return ({', '.join([wide[-1], *results])},)"])
    return f"def program(a, b, g, W, Y, K, N, I, M):\n{body}\n"


def build(source: str):
    scope = {"torch": torch, "F": F}
    exec(source, scope)
    return scope["program"]


def inputs(requires_grad: bool = False) -> list[torch.Tensor]:
    shapes = (4, 6), (4, 6), (4, 1), (1, 6), (8, 6), (4, 2), (6,)
    floats = [t.requires_grad_(requires_grad) for t in operands(*shapes, dtype=torch.float32)]
    order = torch.tensor([3, 0, 7, 1, 6, 2, 5, 4], device=DEVICE)
    return [*floats, order, order.view(4, 2) > 5]


def aliasing(tensors: list[torch.Tensor]) -> list[list[bool]]:
    keys = [t.untyped_storage().data_ptr() for t in tensors]
    return [[x == y for y in keys] for x in keys]


def run(function, args):
    """What a call gives, or how it raises: eager refuses some programs (`+=` on an expanded tensor), and so must we."""
    torch.manual_seed(0)
    try:
        return list(function(*args))
    except RuntimeError:
        return None


def drawn() -> list[torch.Tensor]:
    """Where the streams of random numbers stand."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if DEVICE == "cuda" else [])]


def assert_same(got: list[torch.Tensor], want: list[torch.Tensor], source: str) -> None:
    """The same but for rounding, which in bfloat16 is 2**-8 of the largest number met."""
    for x, y in zip(got, want, strict=True):
        assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())
        rtol, atol = (1e-4, 1e-5)
        if "bfloat16" in source:
            rtol, atol = 0.03, 0.03 * max(1.0, y.double().nan_to_num(0, 0, 0).abs().max().item())
        torch.testing.assert_close(x, y, rtol=rtol, atol=atol, equal_nan=True)


INNER = ("eager", "aot_eager")  # whole programs are compared, so no site is verified by itself


def without(program, inner: str):
    """The program as the pass would have left it. AOTAutograd by itself drops a dead random op, which moves the stream."""
    return program if inner == "eager" else torch.compile(program, backend=inner)


@given(programs(writes=True), st.sampled_from(INNER))
def test_with_writes(source, inner):
    note(source)
    torch._dynamo.reset()
    program = build(source)
    eager_args, fused_args = inputs(), inputs()
    with torch.no_grad():
        want, stream = run(without(program, inner), eager_args), drawn()
        if want is None:
            return
        torch._dynamo.reset()
        got = run(fusionpass.fuse(program, inner=inner, verify=False), fused_args)
        fused_stream = drawn()
        if got is None:  # Dynamo refuses what eager lets pass, such as t.copy_(t) of an expanded t: by itself, too
            assert run(torch.compile(program, backend=inner), inputs()) is None
            return
    assert_same(got, want, source)
    assert_same(fused_args, eager_args, source)
    assert aliasing(got + fused_args) == aliasing(want + eager_args)
    assert_equal(fused_stream, stream)


@given(programs(writes=True))
def test_make_fx(source):
    """A graph of aten's overloads that make_fx has recorded keeps the writes; the graph unrewritten is the truth."""
    note(source)
    program = build(source)
    with torch.no_grad():
        try:
            graph_module = make_fx(program, tracing_mode="fake")(*inputs())
        except (RuntimeError, NotImplementedError):
            return
        plain_args, fused_args = inputs(), inputs()
        want, stream = run(graph_module, plain_args), drawn()
        if want is None:
            return
        got, fused_stream = run(fusionpass.rewrite(graph_module, verify=False).graph_module, fused_args), drawn()
    assert_same(got, want, source)
    assert_same(fused_args, plain_args, source)
    assert aliasing(got + fused_args) == aliasing(want + plain_args)
    assert_equal(fused_stream, stream)


def assert_equal(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@given(programs(writes=False), st.sampled_from(INNER))
def test_gradients(source, inner):
    note(source)
    torch._dynamo.reset()
    program = build(source)
    eager_args, fused_args = inputs(True), inputs(True)
    want = run(without(program, inner), eager_args)
    if want is None:
        return
    torch._dynamo.reset()
    got = run(fusionpass.fuse(program, inner=inner, verify=False), fused_args)
    if got is None:
        assert run(torch.compile(program, backend=inner), inputs(True)) is None
        return
    assert_same([t.detach() for t in got], [t.detach() for t in want], source)
    assert [t.requires_grad for t in got] == [t.requires_grad for t in want]
    for outputs in (want, got):
        if any(t.requires_grad for t in outputs):
            sum(t.square().sum() for t in outputs if t.requires_grad).backward()
    for x, y in zip(fused_args, eager_args, strict=True):
        assert (x.grad is None) == (y.grad is None)
        if y.grad is not None:
            tolerance = 0.05 * max(1.0, y.grad.abs().max().item()) if "bfloat16" in source else 1e-4
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-3, atol=tolerance)

"""The statements that random programs are made of.

{w}, {v}: tensors of [4, 6]; {n}: of [4, 1]; W: the gate's weight [1, 6]; Y: the experts' outputs [8, 6]; K: weights [4, 2];
I: a permutation of 8; M: a mask [4, 2]; N: a norm's weight [6]. A statement of several lines makes t{i}, [4, 6].
"""

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
    "Y[I][:4] * 1",
    "{w}.view(2, 2, 6).transpose(0, 1).reshape(4, 6)",
)
PURE_NARROW = (
    "{n} * 2",
    "{w}[:, :1]",
    "{w}.sum(1, keepdim=True)",
    "F.linear({w}, W)",
    "({w} @ W[0]).unsqueeze(-1)",
    "torch.sigmoid({n})",
    "{n}.view(2, 2, 1).reshape(4, 1)",
    "{n}.view(2, 2, 1).transpose(0, 1).reshape(4, 1)",
    "F.linear({w}, W).float()",
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
    # a factor, a mask, a dropout that does nothing
    "{w} + 2 * torch.sigmoid({n}) * {v}",
    "{w} + torch.sigmoid({n}) * {v} * 2",
    "{w} + (torch.sigmoid({n}) * {v}).masked_fill(M[:, :1], 0)",
    "{w} + torch.sigmoid({n}) * {v} * M[:, :1]",
    "{w} + F.dropout(torch.sigmoid({n}) * {v}, 0.5, False)",
    # casts around, operands of two dtypes
    "{w} + (torch.sigmoid({n}.float()) * {v}.float()).to({w}.dtype)",
    "({w}.float() + torch.sigmoid({n}).float() * {v}.float()).to({w}.dtype)",
    "{w} + torch.sigmoid({n}) * {v}.bfloat16()",
    "{w}.bfloat16() + torch.sigmoid({n}) * {v}.bfloat16()",
    "({w}.double() + torch.sigmoid({n}) * {v}).float()",
    # the ops called by hand, the methods by their class
    "{w} + torch.ops.aten.sigmoid({n}) * {v}",
    "torch.ops.aten.add.Tensor({w}, torch.ops.aten.mul.Tensor(torch.ops.aten.sigmoid.default({n}), {v}))",
    "torch.Tensor.add({w}, torch.Tensor.__mul__(torch.Tensor.sigmoid({n}), {v}))",
    "torch.add(input={w}, other=torch.mul(other={v}, input=torch.sigmoid(input={n})))",
)
# Views behind the sigmoid and the product: the first keep the rows' order, the others do not.
VIEWED = (
    "{w} + torch.sigmoid({n}.reshape(4))[..., None] * {v}",
    "{w} + torch.sigmoid({n}).reshape(4).view(4, 1) * {v}",
    "{w} + torch.sigmoid({n}.squeeze(1)).unsqueeze(-1) * {v}",
    "{w} + torch.sigmoid({n}).expand_as({v}) * {v}",
    "{w} + (torch.sigmoid({n}) * {v}).view(2, 2, 6).flatten(0, 1)",
    "{w} + (torch.sigmoid({n}).view(2, 2, 1) * {v}.view(2, 2, 6)).view(4, 6)",
    "({w}.view(2, 2, 6) + torch.sigmoid({n}).view(2, 2, 1) * {v}.reshape(2, 2, 6)).reshape(4, 6)",
    "{w} + torch.sigmoid({n}).view(2, 2, 1).transpose(0, 1).reshape(4, 1) * {v}",
    "{w} + torch.sigmoid({n}).view(2, 2).t().reshape(4, 1) * {v}",
    "{w} + (torch.sigmoid({n}) * {v}).view(2, 2, 6).transpose(0, 1).reshape(4, 6)",
    "{w} + (torch.sigmoid({n}) * {v}).t().reshape(4, 6)",
    "{w} + torch.sigmoid({n}).flip(0) * {v}",
    "{w} + torch.sigmoid({n})[:1] * {v}",
    "{w} + torch.sigmoid({n}.view(1, 4)).view(-1)[:, None] * {v}",
    "{w} + (torch.sigmoid({n}) * {v}).detach()",
    "{w} + torch.sigmoid({n}).detach() * {v}",
)
SPLIT = (
    ("s{i} = torch.sigmoid({n})", "m{i} = s{i} * {v}", "t{i} = {w} + m{i}"),
    ("l{i} = F.linear({v}, W)", "s{i} = torch.sigmoid(l{i})", "m{i} = s{i} * {w}", "t{i} = {w} + m{i}"),
)
# The formula by statements that write into memory of its own.
OWN_WRITES = (
    ("t{i} = torch.sigmoid({n}) * {v}", "t{i} += {w}"),
    ("t{i} = torch.sigmoid({n}) * {v}", "q{i} = t{i}", "t{i} += {w}", "t{i} = t{i} + q{i}"),
    ("s{i} = torch.sigmoid({n})", "t{i} = {v} * s{i}", "t{i}.add_({w})", "s{i}.mul_(2)"),
    ("p{i} = {v} * 1", "p{i}.mul_(torch.sigmoid({n}))", "t{i} = {w} + p{i}"),
    ("p{i} = {v} * 1", "p{i} *= torch.sigmoid({n})", "t{i} = {w} + p{i}", "t{i} = t{i} * p{i}"),
    ("m{i} = torch.sigmoid({n}) * {v}", "t{i} = {w} * 1", "t{i}.add_(m{i}, alpha=0.5)"),
    ("t{i} = {w} * 1", "t{i} = torch.Tensor.__iadd__(t{i}, torch.sigmoid({n}) * {v})"),
    ("q{i} = {w} * 1", "t{i} = q{i}", "t{i} += torch.sigmoid({n}) * {v}", "t{i} = t{i} * q{i}"),
    ("t{i} = {w} * 1", "q{i} = t{i}[:2]", "t{i} += torch.sigmoid({n}) * {v}", "q{i}.mul_(2)"),
    ("t{i} = {w} * 1", "t{i}.addcmul_(torch.sigmoid({n}), {v})"),
    ("l{i} = {n} * 1", "l{i}.sigmoid_()", "t{i} = {w} + l{i} * {v}"),
    ("l{i} = {n} * 1", "s{i} = torch.sigmoid_(l{i})", "t{i} = {w} + s{i} * {v}", "t{i} = t{i} * l{i}"),
)
OUT_WRITES = (  # refused by autograd
    ("t{i} = torch.empty_like({w})", "torch.add({w}, torch.sigmoid({n}) * {v}, out=t{i})"),
    ("p{i} = {v} * 1", "torch.mul(torch.sigmoid({n}), {v}, out=p{i})", "t{i} = {w} + p{i}", "t{i} = t{i} * p{i}"),
    ("s{i} = {n} * 1", "torch.sigmoid({n}, out=s{i})", "t{i} = {w} + s{i} * {v}", "s{i}.add_(1)"),
)
# A function that runs under autocast, a checkpoint, vmap; a place where Dynamo breaks the graph.
REGIONS = (
    ("with torch.autocast(DEVICE, torch.bfloat16):", "    t{i} = {w} + torch.sigmoid(F.linear({v}, W)) * {v}"),
    (
        "with torch.autocast(DEVICE, torch.bfloat16):",
        "    l{i} = F.linear({v}, W)",
        "t{i} = {w} + torch.sigmoid(l{i}) * {v}",
    ),
    (
        "with torch.autocast(DEVICE, torch.bfloat16):",
        "    l{i} = {v} @ W.t()",
        "    with torch.autocast(DEVICE, enabled=False):",
        "        t{i} = {w} + torch.sigmoid(l{i}.float()) * {v}",
    ),
    ("s{i} = torch.sigmoid({n})", "torch._dynamo.graph_break()", "t{i} = {w} + s{i} * {v}"),
    ("t{i} = {w} + torch.sigmoid({n}) * {v}", "torch._dynamo.graph_break()", "t{i} = t{i} + {w}"),
    ("t{i} = checkpoint(lambda x, y, z: x + torch.sigmoid(y) * z, {w}, {n}, {v}, use_reentrant=False)",),
    ("t{i} = torch.vmap(lambda x: x * 2)({w}) + torch.sigmoid({n}) * {v}",),
    ("t{i} = torch.vmap(lambda x, y, z: x + torch.sigmoid(y) * z)({w}, {n}, {v})",),
    ("with torch.no_grad():", "    t{i} = {w} + torch.sigmoid({n}) * {v}"),
)

# The combine region line by line. a{i}: the routed sum, t{i}: the sum, u{i}: the normed sum.
ROUTED = (
    ("a{i} = {w}",),
    ("p{i} = Y * K.reshape(-1, 1)", "q{i} = p{i}[I]", "r{i} = q{i}.view(4, 2, 6)", "a{i} = r{i}.sum(1)"),
    ("p{i} = Y[I]", "q{i} = p{i}.view(4, 2, 6) * K.unsqueeze(-1)", "a{i} = q{i}.sum(dim=-2)"),
    ("c{i} = K.t().contiguous().t()", "p{i} = Y.view(4, 2, 6) * c{i}[..., None]", "a{i} = p{i}.sum(1)"),
    ("p{i} = Y.masked_fill(M.view(-1, 1), 0)", "q{i} = p{i}.view(4, 2, 6) * K[..., None]", "a{i} = q{i}.sum(1)"),
    ("a{i} = torch.einsum('tk,tkh->th', K, Y.view(4, 2, 6))",),
    ("q{i} = Y.view(4, 2, 6)", "q{i} = q{i} * K[..., None]", "q{i}.mul_(2)", "a{i} = q{i}.sum(1)"),
)
CORES = (
    ("m{i} = torch.sigmoid({n}) * {v}", "t{i} = a{i} + m{i}"),
    ("l{i} = F.linear({v}, W)", "s{i} = torch.sigmoid(l{i})", "t{i} = a{i} + s{i} * {w}"),
    ("t{i} = torch.sigmoid({n}) * {v}", "t{i} += a{i}"),
)
RESIDUALS = (
    (),
    ("t{i} = {w} + t{i}",),
    ("t{i} += {w}",),
    ("t{i} = t{i}.view(2, 2, 6)", "t{i} = {v}.reshape(2, 2, 6) + t{i}", "t{i} = t{i}.view(4, 6)"),
    ("t{i} = {v} + t{i}.view(2, 2, 6).transpose(0, 1).reshape(4, 6)",),
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
    (
        "f{i} = t{i}.float()",
        "v{i} = f{i}.pow(2).mean(-1, True)",
        "u{i} = N * (f{i} * torch.rsqrt(v{i} + 1e-5)).to(t{i}.dtype)",
    ),
)
REGION = (ROUTED, CORES, RESIDUALS, NORMS)

# A user's own ops, by torch's names.
OWN_OPS = (
    ("t{i} = {w} + torch.sigmoid(fuzzlib.half({n})) * {v}",),
    ("t{i} = {w} + torch.sigmoid(fuzzlib.to(F.linear({v}, W))) * {v}",),
    ("t{i} = {w} + fuzzlib.view(torch.sigmoid({n}) * {v})",),
    ("t{i} = {w} + torch.sigmoid(fuzzlib.contiguous({n})) * fuzzlib.clone({v})",),
    ("t{i} = {w} + fuzzlib.expand(torch.sigmoid({n})) * {v}",),
    ("t{i} = {w} + fuzzlib.sigmoid({n}) * {v}",),
    ("t{i} = fuzzlib.add({w}, torch.sigmoid({n}) * {v})",),
    ("t{i} = {w} + fuzzlib.mul(torch.sigmoid({n}), {v})",),
    ("t{i} = {w} + torch.sigmoid(fuzzlib.linear({v}, W)) * {v}",),
    ("t{i} = {w} + fuzzlib.flatten({v} + torch.sigmoid({n}) * {v})",),
    ("t{i} = {w} + torch.sigmoid({n}) * {v}", "t{i} = {w} + fuzzlib.contiguous(t{i})"),
    ("t{i} = fuzzlib.index(Y * K.reshape(-1, 1), I).view(4, 2, 6).sum(1) + torch.sigmoid({n}) * {v}",),
    ("t{i} = fuzzlib.index(Y, I).view(4, 2, 6)", "t{i} = fuzzlib.sum(t{i} * K[..., None]) + torch.sigmoid({n}) * {v}"),
    ("t{i} = {w} + torch.sigmoid({n}) * {v}", "t{i} = t{i} * fuzzlib.rsqrt(t{i}.pow(2).mean(-1, True) + 1e-5) * N"),
    ("t{i} = {w} + torch.sigmoid({n}) * {v}", "t{i} = t{i} * torch.rsqrt(fuzzlib.pow(t{i}).mean(-1, True) + 2) * N"),
    ("t{i} = {w} + torch.sigmoid(reshape({n})) * {v}",),
    ("t{i} = {w} + reshape(torch.sigmoid({n}) * {v})",),
)
OWN_OPS_THAT_WRITE = (
    ("s{i} = torch.sigmoid({n})", "m{i} = s{i} * {v}", "fuzzlib.fill({v})", "t{i} = {w} + m{i}"),
    ("s{i} = torch.sigmoid({n})", "m{i} = s{i} * {v}", "x{i} = fuzzlib.relu_({w}, {v})", "t{i} = {w} + m{i}"),
    ("s{i} = torch.sigmoid({n})", "x{i} = detach({n})", "t{i} = {w} + s{i} * {v}"),
    ("m{i} = torch.sigmoid({n}) * {v}", "x{i} = detach({v})", "t{i} = x{i} + m{i}"),
)

# Writes to anything, in no_grad.
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
    "{w}.add_({v} * torch.sigmoid({n}), alpha=0.5)",
    "{w} *= torch.sigmoid({n})",
    "{n}.sigmoid_()",
    "{w}.t_(); {w}.t_()",
    "{w}.copy_({v})",
    "torch.Tensor.__iadd__({w}, {v})",
    "torch.add({w}, torch.sigmoid({n}) * {v}, out={v})",
    "F.relu({w}, inplace=True)",
    "torch._foreach_mul_([{w}, {n}], 0.5)",
    "torch._foreach_add_([{w}], [{v}])",
    "{w}.data.add_(1)",
    "{w}.detach().mul_(2)",
    "F.batch_norm({v}, {w}[0], {w}[1].square() + 1, training=True)",
    "F.instance_norm({v}[None], {w}[0, :4], {w}[1, :4].abs() + 1, use_input_stats=True)",
    "F.embedding(I[:2] // 2, {w}, max_norm=0.5)",
    "fuzzlib.fill({w})",
    "fuzzlib.fill({n})",
    "setitem({w}, 0, 1.)",
    "iadd({w}, {v})",
    "torch.index_put_({w}, (I[:1] // 2,), {v}[:1])",
    "torch.ops.aten.mul_.Tensor({w}, {v})",
    "torch.ops.aten.sigmoid_({n})",
)
INPUT_WRITES = (
    "Y.mul_(0.5)",
    "Y[0] = 1",
    "K.add_(1)",
    "N.mul_(2)",
    "I.copy_(I.flip(0))",
    "M.logical_not_()",
    "W.add_(0.1)",
    "fuzzlib.fill(Y)",
    "torch._foreach_add_([K, N], 1.)",
    "W.data.mul_(2)",
)
# Writes that autograd lets pass to what the program has made ({w}, {n}), or does not see.
TRAINING_WRITES = (
    "{n}.add_(1)",
    "{w}.mul_(0.5)",
    "torch._foreach_add_([{n}], 1.)",
    "torch._foreach_mul_([{w}, {n}], 2.)",
    "{n}.data.add_(1)",
    "{w}.data.add_(1)",
    "{w}.detach().mul_(2)",
    "{w}[0] = 0",
    "torch.set_grad_enabled(False); {w}.mul_(0.5); torch.set_grad_enabled(True)",
    "{w}.zero_()",
    "{n}.sigmoid_()",
    "{w} += {v}",
    "W.data.add_(1)",
    "a.data.mul_(2)",
    "b.data.mul_(2)",
    "g.data.add_(1)",
    "Y.data.mul_(2)",
    "K.detach().add_(1)",
    "N.data.mul_(2)",
)
# numpy code, which Dynamo alone traces.
NUMPY = (
    ("v{i} = {w}.numpy()", "v{i} *= 0.5"),
    ("v{i} = {w}.numpy()", "v{i} += {v}.numpy()"),
    ("v{i} = {w}.numpy()", "np.add(v{i}, v{i}, out=v{i})"),
    ("v{i} = {w}.numpy()", "np.multiply(v{i}, 2, v{i})"),
    ("v{i} = {w}.numpy()", "v{i}[0] = 0"),
    ("v{i} = {w}.numpy()", "v{i}.sort()"),
    ("v{i} = {w}.numpy()", "v{i}.fill(1)"),
    ("v{i} = {n}.numpy()", "v{i} -= 1"),
    ("v{i} = {w}.numpy().T", "v{i} *= 2"),
    ("v{i} = np.asarray({w})", "np.negative(v{i}, out=v{i})"),
    ("v{i} = {w}.numpy() * 2",),
)

# What a caller does between forward and backward. args: the inputs; outputs: what came out.
BETWEEN = (
    "pass",
    "args[0].data.add_(1)",
    "args[1].data.mul_(2)",
    "args[2].data.add_(1)",
    "args[3].data.mul_(2)",
    "args[4].data.mul_(2)",
    "args[5].data.add_(1)",
    "args[6].data.mul_(2)",
    "args[7].copy_(args[7].flip(0))",
    "args[8].logical_not_()",
    "outputs[0].data.mul_(2)",
    "outputs[-1].data.add_(1)",
    "torch._foreach_add_([x.data for x in args[:4]], 1.)",
    "with torch.no_grad(): args[1].mul_(2)",
    "with torch.no_grad(): args[2].add_(1)",
    "with torch.no_grad(): args[3].add_(1)",
    "with torch.no_grad(): outputs[0].mul_(2)",
    "outputs[0].mul_(2)",
)
# How the inputs of a later call share memory; P is a tensor that the program knows by itself, as it would a parameter.
SHARED = (
    "pass",
    "b = a",
    "b = a[:]",
    "a = b.view(-1).view(4, 6)",
    "both = torch.cat([a, b[:1]]); a, b = both[:4], both[1:]",
    "g = a[:, :1]",
    "g = b[:, 5:]",
    "a = P",
    "b = P[:]",
    "a = Y[:4]",
    "b = Y[4:]",
    "N = W[0]",
    "N = a[1]",
    "W = b[2:3]",
    "K = Y.view(-1)[8:16].view(4, 2)",
    "b = torch.cat([a, a], 1)[:, 6:]; a = b",
    "g = W.view(-1)[:4].view(4, 1)",
)
# How the inputs lie in memory when a graph is recorded.
LAYOUTS = (
    "pass",
    "a = a.t().contiguous().t()",
    "b = b.t().contiguous().t()",
    "a = torch.cat([a, a], 1)[:, :6]",
    "b = torch.cat([b, b], 1)[:, 6:]",
    "g = torch.cat([g] * 4, 1)[:, 2:3]",
    "g = g.expand(4, 4)[:, :1]",
    "Y = Y.t().contiguous().t()",
    "K = K.t().contiguous().t()",
    "W = torch.cat([W, W], 1)[:, ::2]",
    "N = torch.stack([N, N], 1)[:, 0]",
    "a = a[:1].expand(4, 6)",
    "I = torch.stack([I, I], 1)[:, 0]",
)

# Leaf modules, for symbolic_trace.
LEAF_LINES = (
    "t{i} = {w} + self.act({n}) * {v}",
    "t{i} = {w} + torch.sigmoid(self.gate({v})) * {v}",
    "t{i} = {w} + self.act(self.gate({v})) * {w}",
    "t{i} = {w} + self.act(input={n}) * {v}",
    "t{i} = {w} + self.act(self.gate(input={v})) * {v}",
    "t{i} = {w} + torch.sigmoid({n}) * self.drop({v})",
    "t{i} = {w} + self.drop(torch.sigmoid({n}) * {v})",
    "t{i} = self.norm({w} + torch.sigmoid(self.gate({v})) * {v})",
    "t{i} = self.norm({v} + ({w} + self.act({n}) * {v}))",
    "t{i} = {w} + self.own_sigmoid({n}) * {v}",
    "t{i} = {w} + self.act(self.own_gate({v})) * {v}",
    "t{i} = self.own_norm({w} + self.act({n}) * {v})",
    "t{i} = self.same({w}) + self.act(self.same({n})) * {v}",
    "m{i} = torch.sigmoid({n}) * {v}; x{i} = self.{leaf}({v}); t{i} = {w} + m{i}",
    "m{i} = torch.sigmoid({n}) * {v}; x{i} = self.{leaf}({w}); t{i} = x{i} + m{i}",
    "m{i} = torch.sigmoid({n}) * self.{state}; x{i} = self.{leaf}({v}); t{i} = {w} + m{i}",
    "m{i} = self.act(self.gate({v})) * {v}; x{i} = self.{leaf}({v}); t{i} = self.{state} + m{i}",
    "m{i} = torch.sigmoid({n}) * {v}; x{i} = self.table(I[:4]); t{i} = self.table.weight[:4] + m{i}",
    "s{i} = self.act(self.gate({v})); x{i} = self.{leaf}({v}); t{i} = {w} + s{i} * self.{state}",
)
LEAVES = ("batch_norm", "counter", "in_place", "relu", "table_of_rows", "drop", "norm", "silent")
STATES = (
    "batch_norm.running_mean.expand(4, 6)",
    "batch_norm.running_mean",
    "counter.seen",
    "silent.seen",
    "gate.weight.expand(4, 6)",
    "norm.weight",
)
PATCHES = (
    "pass",
    "pass",
    "patch(module.gate, lambda old, x: old(x) * 10)",
    "patch(module.act, lambda old, x: torch.tanh(x))",
    "patch(module.norm, lambda old, x: old(x) + 1)",
    "patch(module.drop, lambda old, x: x * 2)",
    "module.gate.register_forward_hook(lambda m, args, out: out * 2)",
    "module.act.register_forward_pre_hook(lambda m, args: tuple(x + 1 for x in args))",
    "module.norm.register_forward_hook(lambda m, args, out: out - 1)",
    "module.drop.register_forward_hook(lambda m, args, out: args[0].detach().mul_(0.5) * 1)",
    "module.act.__class__ = type('Sigmoid', (torch.nn.Sigmoid,), dict(forward=lambda self, input: input.tanh()))",
    "module.gate.register_full_backward_hook(lambda m, grads, out: doubled(grads))",
    "module.gate.weight.data.mul_(2)",
    "module.eval()",
    "module.act.eval()",
    "torch.nn.utils.parametrize.register_parametrization(module.gate, 'weight', module.same)",
)
GLOBAL_HOOKS = (
    "",
    "",
    "",
    "register_module_forward_hook(lambda m, args, out: out * 2 if type(m) in (torch.nn.Linear, torch.nn.Sigmoid) else None)",
    "register_module_forward_pre_hook(lambda m, args: (args[0] + 1,) if type(m) is torch.nn.RMSNorm else None)",
    "register_module_full_backward_hook(lambda m, grads, out: doubled(grads) if type(m) is torch.nn.Linear else None)",
)

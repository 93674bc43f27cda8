"""A fused instance, its copies of every kind, and who wraps or rebinds its forward."""

import copy
import functools
import inspect
import pickle
import types

import pytest
import torch
from programs import DEVICE, Block, operands

import fusionpass


class Subclass(Block):
    """Its own code around a forward that may be fused."""

    def forward(self, x):
        return super().forward(x) + 1


class OwnCopy(Block):
    """A class that says itself how it is copied."""

    def __copy__(self):
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.copied = True
        return new


class OwnReplica(Block):
    def _replicate_for_data_parallel(self):
        new = super()._replicate_for_data_parallel()
        new.copied = True
        return new


def set_on_the_instance(module):
    module.forward = types.MethodType(Block.forward, module)
    return module


def formula(module, x):
    return x + torch.sigmoid(module.gate(x)) * x.tanh()


def functional(module):
    return lambda x, gate: torch.func.functional_call(
        module, {f"gate.{n}": p for n, p in gate.named_parameters()}, (x,)
    )


SHALLOW = {
    "copy.copy": copy.copy,
    "a replica": lambda module: module._replicate_for_data_parallel(),
    "a copy of a copy": lambda module: copy.copy(copy.copy(module)),
    "a replica of a copy": lambda module: copy.copy(module)._replicate_for_data_parallel(),
    "a copy of a used one": lambda module: (module(operands((2, 8))[0]), copy.copy(module))[1],
}
DEEP = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "deepcopy of a copy": lambda module: copy.deepcopy(copy.copy(module)),
    "pickle of a copy": lambda module: pickle.loads(pickle.dumps(copy.copy(module))),
}
EVERY = SHALLOW | DEEP
OF_CLASSES = {
    **{name: (Block, duplicate) for name, duplicate in EVERY.items()},
    "__copy__ of its own": (OwnCopy, copy.copy),
    "a replica beside a __copy__": (OwnCopy, SHALLOW["a replica"]),
    "a way to replicate of its own": (OwnReplica, SHALLOW["a replica of a copy"]),
}


@pytest.mark.parametrize(("cls", "duplicate"), OF_CLASSES.values(), ids=OF_CLASSES)
def test_a_copy_runs_its_own_parameters(cls, duplicate):
    original = fusionpass.fuse(cls().to(DEVICE))
    copied = duplicate(original)
    copied._modules = {"gate": torch.nn.Linear(8, 1).to(DEVICE)}
    (x,) = operands((4, 8))
    torch._dynamo.reset()
    with torch.no_grad(), fusionpass.collect() as report:
        torch.testing.assert_close(copied(x), formula(copied, x))
        torch.testing.assert_close(original(x), formula(original, x))
    assert report.executed == 2
    assert copied.forward.module is copied and original.forward.module is original and type(copied) is cls
    assert list(copied.state_dict()) == list(original.state_dict()) == ["gate.weight", "gate.bias"]


@pytest.mark.parametrize("duplicate", [copy.copy, SHALLOW["a replica"]], ids=["copy", "replica"])
def test_a_copy_inside_somebodys_compilation(duplicate):
    copied = duplicate(fusionpass.fuse(Block().to(DEVICE)))
    copied._modules = {"gate": torch.nn.Linear(8, 1).to(DEVICE)}
    (x,) = operands((4, 8))
    torch._dynamo.reset()
    with torch.no_grad(), fusionpass.collect() as report:
        torch.testing.assert_close(torch.compile(copied, backend="eager")(x), formula(copied, x))
    assert len(report.rewrites) == 1


@pytest.mark.parametrize("duplicate", EVERY.values(), ids=EVERY)
def test_other_instances_of_the_class_are_copied_as_they_were(duplicate):
    fusionpass.fuse(Block())
    module = Block().to(DEVICE)
    module.remark = ["kept"]
    copied = duplicate(module)
    assert type(copied) is Block and "forward" not in copied.__dict__ and copied.remark == ["kept"]
    assert copied.__dict__.keys() - {"_is_replica"} == module.__dict__.keys()


@pytest.mark.parametrize(
    "make", [lambda: fusionpass.fuse(Block()), lambda: fusionpass.fuse(set_on_the_instance(Block()))]
)
def test_functional_call(make):
    module, other = make().to(DEVICE), torch.nn.Linear(8, 1).to(DEVICE)
    (x,) = operands((4, 8))
    with torch.no_grad():
        expected = x + torch.sigmoid(other(x)) * x.tanh()
        torch.testing.assert_close(functional(module)(x, other), expected)


def test_a_forward_set_on_the_instance_stays_under_the_fusion():
    module = set_on_the_instance(Block().to(DEVICE))
    before = module.forward
    (x,) = operands((4, 8))
    fusionpass.fuse(fusionpass.fuse(module), numerics="eager")
    with torch.no_grad(), fusionpass.collect() as report:
        torch.testing.assert_close(module(x), formula(module, x))
    assert len(report.rewrites) == 1 and module.forward.__wrapped__ is before


def test_a_class_patched_after_the_fusion_is_the_one_that_runs():
    cls = type("Patched", (Block,), {})
    module = fusionpass.fuse(cls().to(DEVICE))
    (x,) = operands((4, 8))
    with torch.no_grad():
        module(x)
        cls.forward = lambda self, x: formula(self, x) - 1
        torch.testing.assert_close(module(x), formula(module, x) - 1)


def noisy(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args) + 1

    return wrapper


@fusionpass.fuse
def fused(x, gate):
    return x + torch.sigmoid(gate) * x.tanh()


class Decorated(Block):
    @fusionpass.fuse
    def forward(self, x):
        return formula(self, x)


class Wrapped(Block):
    forward = noisy(fusionpass.fuse(Block.forward))


def plainly(x, gate):
    return x + torch.sigmoid(gate) * x.tanh()


# What is fused over something fused -> how much its own code adds, and whether the name is the first one's.
OVER = {
    "wraps of a function": (lambda: fusionpass.fuse(noisy(fused)), 1),
    "wraps of wraps": (lambda: fusionpass.fuse(noisy(noisy(fused))), 2),
    "a function twice": (lambda: fusionpass.fuse(fused, numerics="eager"), 0),
    "wraps of a function fused twice": (lambda: fusionpass.fuse(fusionpass.fuse(noisy(fused)), numerics="eager"), 1),
    "partial": (lambda: fusionpass.fuse(functools.partial(fused)), 0),
    "update_wrapper of partial": (
        lambda: fusionpass.fuse(functools.update_wrapper(functools.partial(noisy(fused)), fused)),
        1,
    ),
}


@pytest.mark.parametrize(("make", "added"), OVER.values(), ids=OVER)
def test_a_wrappers_own_code_runs(make, added):
    x, gate = operands((4, 8), (4, 1))
    with fusionpass.collect() as report:
        torch.testing.assert_close(make()(x, gate), plainly(x, gate) + added)
    assert len(report.rewrites) == 1


MODULES = {
    "a subclass that calls super": (lambda: fusionpass.fuse(type("Sub", (Subclass,), {}))(), 1),
    "an instance of one": (lambda: fusionpass.fuse(Subclass()), 1),
    "an instance of a fused class": (lambda: fusionpass.fuse(Decorated(), numerics="eager"), 0),
    "a fused class again": (lambda: fusionpass.fuse(type("Again", (Decorated,), {}), numerics="eager")(), 0),
    "a class whose forward wraps a fused one": (lambda: fusionpass.fuse(type("Again", (Wrapped,), {}))(), 1),
    "an instance of such a class": (lambda: fusionpass.fuse(Wrapped()), 1),
}


@pytest.mark.parametrize(("make", "added"), MODULES.values(), ids=MODULES)
def test_a_modules_own_code_runs(make, added):
    module = make().to(DEVICE)
    (x,) = operands((4, 8))
    with torch.no_grad(), fusionpass.collect() as report:
        torch.testing.assert_close(module(x), formula(module, x) + added)
    assert len(report.rewrites) == 1


def test_a_bound_method_is_fused_over_its_original():
    module = Decorated().to(DEVICE)
    again = fusionpass.fuse(module.forward, numerics="eager")
    assert again.__wrapped__.__self__ is module and not hasattr(again.__wrapped__.__func__, "__wrapped__")


def test_the_forward_is_like_a_bound_method():
    module = fusionpass.fuse(Block())
    plain = Block()
    assert inspect.signature(module.forward) == inspect.signature(plain.forward)
    assert inspect.getsource(module.forward) == inspect.getsource(plain.forward)
    assert module.forward.__self__ is module and module.forward.__name__ == "forward"
    assert module.forward.__code__ is Block.forward.__code__


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(
    "make", [lambda: fusionpass.fuse(Block()), Decorated, Block], ids=["instance", "class", "plain"]
)
def test_accelerate_wraps_and_unwraps(make, keep):
    accelerate = pytest.importorskip("accelerate")
    module = make()
    prepared = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(module)
    x = torch.randn(4, 8)
    with torch.no_grad():
        prepared(x)
        unwrapped = accelerate.Accelerator(mixed_precision="bf16", cpu=True).unwrap_model(
            prepared, keep_fp32_wrapper=keep
        )
        tolerance = {"rtol": 2**-7, "atol": 2**-6} if keep else {}  # of bf16's rounding, under autocast
        torch.testing.assert_close(unwrapped(x), formula(module, x), **tolerance)

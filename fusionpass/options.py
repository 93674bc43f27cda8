"""The options every entry point takes, checked once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from fusionpass.inductor_settings import check_settings
from fusionpass.kernels.contract import NUMERICS
from fusionpass.rules import checked


@dataclass(frozen=True)
class Options:
    """What a user may choose. Equal options are equal objects, so Dynamo's backend guard sees one backend.

    Attributes:
        inner: compiles the rewritten graph: a registered backend's name ("eager", "aot_eager", "inductor", ...)
            or a callable taking `(graph_module, example_inputs)`.
        rules: names of the rules and stages to allow (see `fusionpass rules`), and `Rule` and `Stage` objects of
            `fusionpass.rules`, tried in this order. A `Rule` brings all its stages. None allows all that have a name there.
        numerics: "fp32" rounds once, at the store; "eager" gives the bits of the unfused eager nodes.
        profitable_only: leave a site alone if the inner compiler by itself would be faster.
        strict: raise `NothingRewritten` if no rewritten site ran in a call; see `fusionpass.entry.nothing_rewritten`.
        verify: run each rewritten site against the nodes it replaces, on random inputs, while compiling.
        mode: with `inner="inductor"`, one of torch.compile's modes ("reduce-overhead", "max-autotune", ...).
        inductor: with `inner="inductor"`, settings of `torch._inductor.config` for this compilation, by name.
    """

    inner: str | Callable[..., Any] = "eager"
    rules: tuple[Any, ...] | None = None
    numerics: str = "fp32"
    profitable_only: bool = True
    strict: bool = False
    verify: bool = False
    mode: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def from_user(cls, given: Mapping[str, Any], *, default_inner: str | Callable[..., Any] = "eager") -> Options:
        """Checked options.

        Raises:
            ValueError: an unknown option, or a value outside the allowed ones.
            TypeError: a value of the wrong type.
        """
        allowed = [f.name for f in fields(cls)]
        for name in given:
            if name not in allowed:
                raise ValueError(f"unknown option {name!r}: allowed are {', '.join(allowed)}")
        values = {"inner": default_inner, **given}
        _check_inner(values["inner"])
        values["rules"] = checked(values.get("rules"))
        if values.get("numerics", "fp32") not in NUMERICS:
            raise ValueError(f"option 'numerics' is {values['numerics']!r}: allowed are 'fp32' and 'eager'")
        for name in ("profitable_only", "strict", "verify"):
            if not isinstance(values.get(name, False), bool):
                raise TypeError(f"option {name!r} is {values[name]!r}: it takes True or False")
        check_settings(values["inner"], values.get("mode"), values.get("inductor", {}))
        return cls(**{**values, "inductor": dict(values.get("inductor", {}))})


def _check_inner(inner: Any) -> None:
    if callable(inner):
        return
    if not isinstance(inner, str):
        raise TypeError(f"option 'inner' is {inner!r}: it takes a backend's name or a callable")
    if inner == "fusionpass":
        raise ValueError("option 'inner' is 'fusionpass' itself: name the compiler that takes the rewritten graph")
    from fusionpass.private import list_backends

    if inner not in list_backends(exclude_tags=()):
        shown = sorted(
            {"eager", "aot_eager", *list_backends()} - {"fusionpass"}
        )  # without the backends for PyTorch's own tests
        raise ValueError(f"option 'inner' is {inner!r}: allowed are {', '.join(shown)}, or a callable")

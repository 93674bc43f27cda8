"""The options that are Inductor's own: torch.compile's modes, and settings of `torch._inductor.config`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any


def of_mode(mode: str | None) -> dict[str, Any]:
    """What one of torch.compile's modes changes in Inductor's configuration.

    Raises:
        ValueError: there is no such mode.
    """
    if mode in (None, "default"):
        return {}
    from fusionpass.private import list_mode_options

    patches = list_mode_options()
    if mode not in patches:
        raise ValueError(f"mode is {mode!r}: allowed are {', '.join(sorted(patches))}")
    return patches[mode]


def check_settings(inner: Any, mode: Any, inductor: Any) -> None:
    """The options `mode` and `inductor`, beside `inner`.

    Raises:
        ValueError: one is unknown, or `inner` is not Inductor.
        TypeError: a value of the wrong type.
    """
    if mode is not None and not isinstance(mode, str):
        raise TypeError(f"option 'mode' is {mode!r}: it takes a mode's name, such as 'reduce-overhead'")
    if not isinstance(inductor, Mapping):
        raise TypeError(f"option 'inductor' is {inductor!r}: it takes a dict of Inductor's settings")
    given = [("mode", mode)] if mode not in (None, "default") else []
    given += [("inductor", dict(inductor))] if inductor else []
    if given and inner != "inductor":
        name, value = given[0]
        raise ValueError(
            f"option {name!r} is {value!r}, which is for Inductor only, but option 'inner' is {inner!r}: "
            f"add inner='inductor', or leave {name!r} out"
        )
    of_mode(mode)
    if inductor:
        _check_names(inductor)


def _check_names(inductor: Mapping[str, Any]) -> None:
    from fusionpass.private import config

    known = config.get_config_copy()
    for name in inductor:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=3)
            hint = f"; similar names are {', '.join(near)}" if near else ""
            raise ValueError(f"option 'inductor' names {name!r}, which torch._inductor.config does not have{hint}")

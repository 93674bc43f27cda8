"""Why something is left alone. A refusal is a value: the caller decides what follows from it."""

from __future__ import annotations


class Refusal:
    """A stable code, and a sentence that is put together only when somebody reads it."""

    __slots__ = ("args", "code", "template")

    def __init__(self, code: str, template: str, *args: object):
        self.code = code
        self.template = template
        self.args = args

    @property
    def reason(self) -> str:
        return self.template.format(*self.args)

    def __repr__(self) -> str:
        return f"Refusal({self.code!r}, {self.reason!r})"

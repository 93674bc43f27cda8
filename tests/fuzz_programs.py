"""Random programs around the formula, as source text: what is drawn prints on failure as something to read and to run.

A program is drawn by `choose`, which picks one of a sequence: Hypothesis's draw in the suite, a seeded `random.Random` in
`tests/fuzz.py`. Everything a check does is in the text: the function, how its inputs lie in memory, what the caller does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fuzz_lines import (
    BETWEEN,
    FORMULAS,
    GLOBAL_HOOKS,
    INPUT_WRITES,
    LAYOUTS,
    LEAF_LINES,
    LEAVES,
    NUMPY,
    OUT_WRITES,
    OWN_OPS,
    OWN_OPS_THAT_WRITE,
    OWN_WRITES,
    PATCHES,
    PURE_NARROW,
    PURE_WIDE,
    REGION,
    REGIONS,
    SHARED,
    SPLIT,
    STATES,
    TRAINING_WRITES,
    VIEWED,
    WRITES,
)

Choose = Callable[[Sequence[Any]], Any]

ARGUMENTS = "a, b, g, W, Y, K, N, I, M"
# fewer would not let the kinds meet, more would make each program slow to compile
STEPS = (2, 3, 3, 4, 4, 5, 6, 7)
DTYPES = ("torch.float32",) * 4 + ("torch.bfloat16",)
CONTEXTS = ("contextlib.nullcontext()",) * 6 + ("torch.autocast(DEVICE, torch.bfloat16)",)
NUMERICS = ("fp32", "fp32", "eager")


class Drawing:
    """The body of one program as it grows, and the names that later lines may use."""

    def __init__(self, choose: Choose, writes: Sequence[str], between: int, training: bool):
        self.choose = choose
        self.writes = writes  # statements that may stand between the lines of one formula
        self.between = between  # one in how many gaps has one
        self.wide, self.narrow = ["a", "b"] + ([] if training else ["Q"]), ["g"]
        self.training = training  # autograd lets a program write what it has made itself
        self.made: list[str] = []
        self.lines: list[str] = []

    def names(self) -> dict[str, str]:
        choose = self.choose
        return {
            "i": str(len(self.lines)),
            "w": choose(self.wide),
            "v": choose(self.wide),
            "n": choose(self.narrow),
            "leaf": choose(LEAVES),
            "state": choose(STATES),
        }

    def steps(self, statements: Sequence[str]) -> None:
        """The lines of one statement, with writes to its operands and results in between."""
        names = self.names()
        made: list[str] = []
        written = self.writable() or names
        for statement in statements:
            self.lines.append(statement.format(**names))
            name = statement.format(**names).strip().split(" = ")[0]
            if name.isidentifier():
                made.append(name)
            if self.writes and self.choose(range(self.between)) == 0 and not statement.endswith(":"):
                inside = statement[: len(statement) - len(statement.lstrip())]
                own = [f"{name}.mul_(0.5)" for name in made if name[0] not in "vx"]
                self.lines.append(
                    inside + self.choose((*self.writes, *own)).format(**(written if self.training else names))
                )
        for prefix in ("t", "u"):
            if f"{prefix}{names['i']}" in made:
                self.wide.append(f"{prefix}{names['i']}")
                self.made.append(self.wide[-1])

    def writable(self) -> dict[str, str] | None:
        """Names that a write may name; None when there are none yet."""
        if not self.training:
            return self.names()
        if not self.made:
            return None
        narrow = [name for name in self.narrow if name != "g"] or ["(g * 1)"]
        return {**self.names(), "w": self.choose(self.made), "n": self.choose(narrow)}

    def write(self, writes: Sequence[str]) -> None:
        names = self.writable()
        if names is not None:
            self.lines.append(self.choose(writes).format(**names))

    def region(self) -> None:
        self.steps([step for part in REGION for step in self.choose(part)])

    def result(self) -> str:
        """Indented lines, up to the return of the last sum and up to three others."""
        others = [self.choose(self.wide + self.narrow) for _ in range(self.choose((0, 1, 1, 2)))]
        known = [] if self.training else ["Q = P"]
        return "\n".join(
            "    " + line for line in [*known, *self.lines, f"return ({', '.join([self.wide[-1], *others])},)"]
        )


def _pure(drawing: Drawing) -> None:
    source, prefix = drawing.choose(((PURE_WIDE, "t"), (PURE_NARROW, "n"), (FORMULAS, "t")))
    names = drawing.names()
    name = prefix + names["i"]
    drawing.lines.append(f"{name} = " + drawing.choose(source).format(**names))
    (drawing.narrow if prefix == "n" else drawing.wide).append(name)
    if prefix == "t":
        drawing.made.append(name)


def _body(
    choose: Choose, writes: Sequence[str], tables: Sequence[Any], between: int = 6, training: bool = False
) -> str:
    """The function's body. tables: each a statement's lines to choose from, or None for the statements of one line."""
    drawing = Drawing(choose, writes, between, training)
    kinds = [None, None, "region", "region", "formula", *(["write"] * 2 if writes else []), *tables]
    for _ in range(choose(STEPS)):
        kind = choose(kinds)
        if kind is None:
            _pure(drawing)
        elif kind == "region":
            drawing.region()
        elif kind == "formula":
            drawing.steps(("t{i} = " + choose(FORMULAS),))
        elif kind == "write":
            drawing.write(writes)
        else:
            drawing.steps(choose(kind))
    return drawing.result()


def _function(name: str, arguments: str, body: str) -> str:
    return f"def {name}({arguments}):\n{body}\n"


def _sharing(choose: Choose, name: str, table: Sequence[str]) -> str:
    return _function(name, ARGUMENTS, f"    {choose(table)}\n    return [{ARGUMENTS}]")


def _settings(choose: Choose, **constants: Sequence[str]) -> str:
    return "".join(f"{name} = {choose(values)}\n" for name, values in constants.items())


PURE_TABLES = (SPLIT, OWN_WRITES, [(f"t{{i}} = {line}",) for line in VIEWED], OWN_OPS)


def compiled(choose: Choose) -> str:
    """For Dynamo, without gradients: two calls, whose inputs share memory each in its own way."""
    body = _body(choose, (*WRITES, *INPUT_WRITES), (*PURE_TABLES, OUT_WRITES, REGIONS, NUMPY, OWN_OPS_THAT_WRITE))
    constants = _settings(
        choose,
        INNER=("'eager'", "'eager'", "'aot_eager'"),
        DTYPE=DTYPES,
        NUMERICS=tuple(map(repr, NUMERICS)),
        AROUND=CONTEXTS,
    )
    shared = _sharing(choose, "first", ("pass", "pass", *SHARED, *LAYOUTS)) + _sharing(choose, "second", SHARED)
    return constants + _function("program", ARGUMENTS, body) + shared


fused = compiled  # by `fuse` itself, against the same inner compiler by itself


def recorded(choose: Choose) -> str:
    """For a graph that a tracer has recorded and that runs as it is: the graph unrewritten is the truth."""
    body = _body(choose, (*WRITES, *INPUT_WRITES), (*PURE_TABLES, OUT_WRITES, REGIONS, OWN_OPS_THAT_WRITE))
    tracers = ("'real'", "'real'", "'fake'", "'symbolic'", "'symbolic_trace'")
    constants = _settings(choose, TRACER=tracers, DTYPE=DTYPES, NUMERICS=tuple(map(repr, NUMERICS)), AROUND=CONTEXTS)
    shared = _sharing(choose, "first", ("pass", *SHARED, *LAYOUTS)) + _sharing(choose, "second", SHARED)
    return constants + _function("program", ARGUMENTS, body) + shared


def trained(choose: Choose) -> str:
    """With gradients: the program writes to what it has made, the caller to anything before backward."""
    body = _body(choose, TRAINING_WRITES, (*PURE_TABLES, SPLIT, REGIONS), 8, training=True)
    constants = _settings(choose, INNER=("'eager'", "'aot_eager'"), DTYPE=DTYPES, NUMERICS=tuple(map(repr, NUMERICS)))
    between = _function("between", "args, outputs", f"    {choose(BETWEEN)}")
    return constants + _function("program", ARGUMENTS, body) + between


def of_modules(choose: Choose) -> str:
    """A module with leaf modules for symbolic_trace, some of them patched, hooked or with a state of their own."""
    leaf_table = [line.split("; ") for line in LEAF_LINES]
    body = _body(choose, (), (leaf_table,) * 6)
    lines = "\n".join("    " + line for line in (choose(PATCHES), choose(PATCHES)))
    hook = choose(GLOBAL_HOOKS)
    return (
        _settings(choose, DTYPE=DTYPES[:1], NUMERICS=tuple(map(repr, NUMERICS)), GRADIENTS=("False", "True"))
        + _function("program", f"self, {ARGUMENTS}", body)
        + _function("prepare", "module", lines)
        + _function("hook", "", f"    return [{hook}]")
    )

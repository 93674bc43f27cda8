"""The values that travel through the pass: a site on its way, a refusal, and what a rule says of itself."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node


@dataclass(frozen=True)
class RuleInfo:
    """What `fusionpass rules` prints of a rule or stage."""

    name: str
    kind: str  # "rule" for a core formula, "stage" for what it grows over
    formula: str
    needs: tuple[str, ...]
    codes: dict[str, str]  # refusal code -> what it means


class Refusal:
    """Why not: a stable code, and a sentence rendered only when somebody reads it."""

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


@dataclass
class Projection:
    """The gate logit as x . weight + bias; `weight` and `bias` are nodes, or attribute paths of an nn.Linear."""

    x: Node
    weight: Node | str
    bias: Node | str | None


@dataclass
class Finalize:
    """a as the sum over k of weights[t, k] * y[inverse[t, k]]."""

    y: Node  # the experts' outputs, T * top_k rows
    weights: Node
    top_k: int
    inverse: Node | None
    permuted: bool  # the weights lie in the order of y, not of the sum
    masked: Node | None = None  # rows of y that count as zero


@dataclass
class Norm:
    """The RMSNorm that reads the sum: its nodes in the order of the data flow, `result` the last."""

    weight: Node | str | None
    eps: float
    offset: float
    result: Node
    parts: list[Node]
    weight_read: Node  # the first of its nodes that reads the weight


@dataclass
class Site:
    """One a + sigmoid(gate) * b, as nodes.

    `parts` are the nodes the op would take the place of, those of a stage together in data-flow order; of these,
    `handed_on` are the product and what hands it on to the sum, which nobody but the sum may read.
    """

    add: Node
    product: Node  # the mul, or `add` itself for addcmul
    sigmoid: Node
    a: Node
    gate: Node
    b: Node
    parts: list[Node]
    handed_on: list[Node]
    overwrites: Node | None = None  # a, or the product, in whose memory the sum lands: iadd, add_, addcmul_
    in_place: dict[Node, Node] = field(default_factory=dict)  # the sigmoid or product -> what it overwrites
    gate_shape: tuple | None = None  # the shape in which the formula sees the gate and b, where views stand between
    b_shape: tuple | None = None
    projection: Projection | None = None
    finalize: Finalize | None = None
    residual: Node | None = None
    residual_written: bool = False  # residual += sum: what the op gives is copied there
    norm: Norm | None = None
    stages: list[str] = field(default_factory=lambda: ["gated_add"])
    stopped: list[tuple[str, Refusal]] = field(default_factory=list)  # stages that did not join, and why
    end: Node = None  # type: ignore[assignment]  # the node whose value the op computes: `add`, the residual's, or a cast
    at: Node = None  # type: ignore[assignment]  # where the op goes: the last sum

    def __post_init__(self):
        self.end = self.end or self.add
        self.at = self.at or self.end

    @property
    def combined(self) -> bool:
        """Whether the site grew over more than the formula and the gate projection."""
        return self.finalize is not None or self.residual is not None or self.norm is not None

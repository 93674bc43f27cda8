"""A rule of your own: silu(gate) * up becomes one op, which this file registers by itself.

    python examples/own_rule.py

A rule says where it may begin and how such a node is read. fusionpass brings the rest: the guards, the op's place in the
graph, the check of what the op computes (`verify`) and the report.
"""

import torch
import torch.nn.functional as F

import fusionpass
from fusionpass.rules import CODES, GUARDS, RULES, Op, Operand, Rule, Site, same_bits, torch_name


@torch.library.custom_op("own::silu_mul", mutates_args=())
def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up  # stands for a kernel of yours


@silu_mul.register_fake
def _(gate, up):
    return F.silu(gate) * up


def find(words, product):
    """Every way to read the product as silu(gate) * up. `words` knows all spellings of a multiplication."""
    factors = words.operands(product, "mul") or ()
    for silu, up in (factors, factors[::-1]) if len(factors) == 2 else ():
        if isinstance(silu, torch.fx.Node) and torch_name(silu) == "silu":
            operands = {"gate": Operand(silu.args[0], read=silu), "up": Operand(up, read=product)}
            yield Site(anchor=product, operands=operands, parts=[silu, product]), None


SILU_MUL = Rule(
    name="silu_mul",
    formula="silu(gate) * up",
    needs=("a silu that nobody else reads",),
    codes=CODES,
    op=Op(torch.ops.own.silu_mul.default),
    anchors=("mul", "mul_"),
    find=find,
    guards=GUARDS,
    bits=same_bits,
)

if __name__ == "__main__":
    x, w_gate, w_up = torch.randn(4, 32), torch.randn(32, 64), torch.randn(32, 64)
    with torch.no_grad():
        report = fusionpass.explain(lambda x: F.silu(x @ w_gate) * (x @ w_up), rules=[*RULES, SILU_MUL], verify=True)(x)
    print(report)

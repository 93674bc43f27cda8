"""a + sigmoid(gate) * b  ->  gated_add(a, gate, b): the core every site starts from."""

from fusionpass.guards import CODES
from fusionpass.match import RuleInfo

INFO = RuleInfo(
    name="gated_add",
    kind="rule",
    formula="a + sigmoid(gate) * b",
    needs=(
        "a, b and the sum of one shape; the gate broadcasts to it",
        "one dtype of bfloat16, float16, float32; one device; plain strided tensors",
        "a product nobody else reads, added with no cast or view in between",
        "no write to an operand between the old reads and the sum",
    ),
    codes=CODES,
)

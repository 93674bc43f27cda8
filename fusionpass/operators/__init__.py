"""The ops, `torch.ops.fusionpass.*`: each is declared in a module of its own, and registered here."""

from fusionpass.operators import gate_projected_add, gated_add, moe_combine
from fusionpass.operators.declaration import register

OPS = (*gated_add.OPS, *gate_projected_add.OPS, *moe_combine.OPS)

for _op in OPS:
    register(_op)

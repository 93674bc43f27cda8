"""The ops, `torch.ops.fusionpass.*`. Each is declared in a module of its own, with its other forms, and registered here.

fusionpass::gated_add            y = a + sigmoid(gate) * b
fusionpass::gate_projected_add   y = a + sigmoid(x . weight + bias) * b
fusionpass::moe_combine          the second with its neighbours: top-k finalize, residual add, RMSNorm
fusionpass::_gated_add_out       the first, written into a given tensor; behind `gated_add(..., out=)`
fusionpass::_gate_projected_add_and_logit   the second where autograd records, with the logit for its gradients
fusionpass::_gated_add_backward, fusionpass::_gate_projected_add_backward   their gradients
"""

from fusionpass.operators import gate_projected_add, gated_add, moe_combine
from fusionpass.operators.declaration import register

OPS = (*gated_add.OPS, *gate_projected_add.OPS, *moe_combine.OPS)

for _op in OPS:
    register(_op)

"""One line on a forward: the shared-expert combine of a small block runs as one op.

python examples/decorator.py
"""

import torch
import torch.nn.functional as F

import fusionpass


class SparseBlock(torch.nn.Module):
    """Four experts, the best one per token, and a shared expert behind a sigmoid gate."""

    def __init__(self, hidden: int = 64, experts: int = 4):
        super().__init__()
        self.router = torch.nn.Linear(hidden, experts, bias=False)
        self.experts = torch.nn.Parameter(torch.randn(experts, hidden, hidden) / hidden**0.5)
        self.shared_expert = torch.nn.Linear(hidden, hidden, bias=False)
        self.shared_expert_gate = torch.nn.Linear(hidden, 1, bias=False)

    @fusionpass.fuse
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, chosen = self.router(x).softmax(-1).max(-1, keepdim=True)
        routed = torch.einsum("th,thk->tk", x, self.experts[chosen.squeeze(-1)]) * weight
        return routed + F.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)


if __name__ == "__main__":
    torch.manual_seed(0)
    block, x = SparseBlock(), torch.randn(8, 64)
    with torch.no_grad(), fusionpass.collect() as report:
        fused = block(x)
        unfused = SparseBlock.forward.__wrapped__(block, x)
    print(report)
    print(f"largest difference to the unfused block: {(fused - unfused).abs().max():.1e}")

"""Check the number of rewritten sites in your project's CI: if a model or library update loses one, the test fails.

    pytest examples/hold_the_count.py

From the shell, `fusionpass report qwen2_moe --layers 2 --expect 2` does the same. It exits 1 if the count differs.
"""

import torch

import fusionpass


class Block(torch.nn.Module):
    """Stands for your own model."""

    def __init__(self, hidden: int = 32):
        super().__init__()
        self.norm = torch.nn.LayerNorm(hidden)
        self.routed = torch.nn.Linear(hidden, hidden)
        self.shared = torch.nn.Linear(hidden, hidden)
        self.gate = torch.nn.Linear(hidden, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + (self.routed(h) + torch.sigmoid(self.gate(h)) * self.shared(h))


def test_every_block_is_fused():
    model = torch.nn.Sequential(*(Block() for _ in range(3)))
    report = fusionpass.explain(model, strict=True)(torch.randn(4, 32))
    assert len(report.rewrites) == 3, str(report)
    assert all(site.stages == ["gate_projection", "gated_add"] for site in report.rewrites), str(report)


if __name__ == "__main__":
    test_every_block_is_fused()
    print("3 of 3 blocks are fused")

"""How people start the pass: `fuse`, `torch.compile`, `rewrite`, `explain`, `collect`; and what their call does."""

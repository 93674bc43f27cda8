"""How people start the pass: `fuse`, `torch.compile`, `rewrite`, `explain`, `collect`; and what a call of theirs does."""

"""What the pass raises besides ValueError and TypeError."""


class NothingRewritten(RuntimeError):
    """No site was rewritten, and the option `strict` asked to be told so."""

"""What the pass raises besides ValueError and TypeError."""


class NothingRewritten(RuntimeError):
    """No site was rewritten, and the option `strict` asked to be told so."""


class VerificationFailed(RuntimeError):
    """A rewritten site gave other values than the nodes it replaces, and the option `verify` asked to be told so."""

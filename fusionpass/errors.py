"""What the pass raises besides ValueError and TypeError."""


class NothingRewritten(RuntimeError):
    """No site was rewritten, and the option `strict` is on."""


class VerificationFailed(RuntimeError):
    """A rewritten site gave other values than the nodes it replaces. Only the option `verify` looks for this."""

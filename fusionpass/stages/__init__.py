"""What a core match grows over: one file per stage, tried in the order of `STAGES`.

A stage is a module with `INFO`, a `RuleInfo`, and `grow(site, words, effects, options)`, which absorbs a neighbour into the
site and returns None, or leaves the site as it was and returns the refusal.
"""

from fusionpass.stages import finalize, gate_projection, residual, rms_norm

STAGES = (gate_projection, finalize, residual, rms_norm)

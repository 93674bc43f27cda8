"""Every rule and stage, in the order they are tried: what `fusionpass rules` prints and the option `rules` may name."""

from fusionpass.match import RuleInfo
from fusionpass.stages import STAGES, gated_add

RULES: tuple[RuleInfo, ...] = (gated_add.INFO, *(stage.INFO for stage in STAGES))

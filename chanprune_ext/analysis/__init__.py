"""Which channels of a model may go, what goes with them, and what must follow."""

from chanprune_ext.analysis.analyse import analyse
from chanprune_ext.analysis.groups import Analysis, CouplingGroup, Frozen, Member
from chanprune_ext.analysis.rules import register_rule

__all__ = ["Analysis", "CouplingGroup", "Frozen", "Member", "analyse", "register_rule"]

"""L1: sites, rules, policies, recipes and the loss scale's state machine. Pure data and pure functions."""

from mezzo.policy.phases import Phase, Schedule
from mezzo.policy.policy import Policy
from mezzo.policy.recipe import RECIPES, Recipe
from mezzo.policy.rule import Rule
from mezzo.policy.scale import LossScaling, ScaleState
from mezzo.policy.site import Site
from mezzo.policy.spec import Spec

__all__ = ["RECIPES", "LossScaling", "Phase", "Policy", "Recipe", "Rule", "ScaleState", "Schedule", "Site", "Spec"]

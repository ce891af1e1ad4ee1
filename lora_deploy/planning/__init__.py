"""Where to adapt, and with which rank: the choices that spend a budget, their costs, and the choices trained."""

from lora_deploy.planning.plan import Plan, PlanRow, make_plan

__all__ = ["Plan", "PlanRow", "make_plan"]

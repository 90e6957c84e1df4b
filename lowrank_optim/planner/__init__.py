"""The memory that training will take on a card: `estimate_memory`, `lowrank-optim memory`."""

from .estimate import Estimate, Plans, estimate_memory
from .models import PlanError

__all__ = ["Estimate", "PlanError", "Plans", "estimate_memory"]

"""What training takes on a card before it is run: `estimate_memory`, `lowrank-optim memory`."""

from .estimate import Estimate, Plans, estimate_memory
from .models import PlanError

__all__ = ["Estimate", "PlanError", "Plans", "estimate_memory"]

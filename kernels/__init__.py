"""Floor 1, one device: masks, plans, block-sparse attention, patterns. Knows no ranks.

from sparring.kernels import Geometry, Plan, attend
"""

from .bound import BoundPlan, bind
from .geometry import Geometry
from .operators import attend
from .plan import Plan

__all__ = ["BoundPlan", "Geometry", "Plan", "attend", "bind"]

"""sparring.balance: decides, as pure data, who holds which blocks and in what order keys move.

Floor 2 of the house. It knows neither process groups nor model tensors, only block ids, counts and numpy
arrays; so the engine, the tests, the planner and a simulator all use the same objects.

    layout.py      Layout: which rank holds which blocks; contiguous, zigzag, striped, or any assignment
    schedule.py    Schedule: what a rank computes in each step and which messages are in flight meanwhile
    statistics.py  Statistics: what the plans of a step tell about the next batch
    cost.py        expected work of a batch; work of each rank and ring step under a layout; imbalances
    planner.py     resolve: the layout of a step, given by name or chosen by predicted time
"""

from .cost import (
    ExpectedTiles,
    expected_columns,
    expected_tiles,
    first_blocks,
    step_imbalance,
    work_matrices,
    worker_imbalance,
)
from .layout import Layout, contiguous, from_assignment, striped, zigzag
from .planner import Candidate, Decision, PlannerState, candidates, choose, resolve
from .schedule import EXCHANGES, Schedule, Step, Transfer, gather, hierarchical, order, ring, schedule_of
from .statistics import Statistics, measure

__all__ = [
    "EXCHANGES",
    "Candidate",
    "Decision",
    "ExpectedTiles",
    "Layout",
    "PlannerState",
    "Schedule",
    "Statistics",
    "Step",
    "Transfer",
    "candidates",
    "choose",
    "contiguous",
    "expected_columns",
    "expected_tiles",
    "first_blocks",
    "from_assignment",
    "gather",
    "hierarchical",
    "measure",
    "order",
    "resolve",
    "ring",
    "schedule_of",
    "step_imbalance",
    "striped",
    "work_matrices",
    "worker_imbalance",
    "zigzag",
]

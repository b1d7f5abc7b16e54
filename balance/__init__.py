"""sparring.balance: decides, as pure data, who holds which blocks and in what order keys move.

Floor 2 of the house. It knows neither process groups nor model tensors, only block ids, counts and numpy
arrays; so the engine, the tests, the planner and a simulator all use the same objects.

    layout.py      Layout: which rank holds which blocks; contiguous, zigzag, striped, or any assignment
    schedule.py    Schedule: what a rank computes in each step and which messages are in flight meanwhile
    hops.py        live_hops: which messages of a ring hold what some rank needs
    statistics.py  Statistics: what the plans of a step tell about the next batch
    topology.py    Topology, Constants: nodes, links and kernels as numbers; kept in a file
    tiles.py       expected work of a batch before its forward, and which keys a layout makes ranks need
    layers.py      Layers: groups of layers that are planned for with statistics of their own
    cost.py        work of each rank and step under a layout; imbalances
    candidates.py, search.py   the layouts that are weighed
    predict.py     seconds of an exchange under a layout, in closed form
    by_heads.py    consider_heads: heads swapped for tokens in place of a ring, where that is faster
    simulate.py    simulate: when every rank computes and sends, by an event model of the schedules
    decision.py    what was weighed and decided, as data and as text
    lever.py       move_blocks: query blocks that move between ranks for one layer, where its plan is unequal
    planner.py     resolve: layout and exchange of a step, given by name or chosen by predicted time
"""

from .cost import step_imbalance, work_matrices, worker_imbalance
from .decision import Candidate, Decision, PlannerState
from .layers import Layers, expected_layers
from .layout import Layout, contiguous, from_assignment, striped, zigzag
from .planner import candidates, choose, choose_for, resolve
from .predict import Call, Prediction, predict
from .schedule import (
    EXCHANGES,
    Schedule,
    Step,
    Transfer,
    gather,
    hierarchical,
    pull,
    ring,
    schedule_of,
    step_of_source,
)
from .simulate import Timeline, programs, programs_of, simulate
from .statistics import Statistics, measure
from .tiles import ExpectedTiles, GivenTiles, Tiles, expected_columns, expected_tiles, first_blocks
from .topology import H200, Constants, KernelCost, LinkCost, Topology, read_constants, write_constants

__all__ = [
    "EXCHANGES",
    "H200",
    "Call",
    "Candidate",
    "Constants",
    "Decision",
    "ExpectedTiles",
    "GivenTiles",
    "KernelCost",
    "Layers",
    "Layout",
    "LinkCost",
    "PlannerState",
    "Prediction",
    "Schedule",
    "Statistics",
    "Step",
    "Tiles",
    "Timeline",
    "Topology",
    "Transfer",
    "candidates",
    "choose",
    "choose_for",
    "contiguous",
    "expected_columns",
    "expected_layers",
    "expected_tiles",
    "first_blocks",
    "from_assignment",
    "gather",
    "hierarchical",
    "measure",
    "predict",
    "programs",
    "programs_of",
    "pull",
    "read_constants",
    "resolve",
    "ring",
    "schedule_of",
    "simulate",
    "step_imbalance",
    "step_of_source",
    "striped",
    "work_matrices",
    "worker_imbalance",
    "write_constants",
    "zigzag",
]

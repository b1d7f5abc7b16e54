"""The four step functions on Hopper, bit-identical from run to run: dQ in a kernel of its own."""

from .hopper_backward import backward_keys
from .hopper_columns import forward_columns
from .hopper_columns_backward import backward_columns
from .hopper_dq import backward_rows
from .hopper_forward import forward_step

__all__ = ["backward_columns", "backward_step", "forward_columns", "forward_step"]


def backward_step(q, k, v, dout, lse, delta, bound, source: int, dq, dk, dv, scale: float) -> None:
    """Adds the gradients of the tiles of one source; shapes are those of reference.py."""
    backward_keys(q, k, v, dout, lse, delta, bound, source, None, dk, dv, scale)
    backward_rows(q, k, v, dout, lse, delta, bound, source, dq, scale)

"""The output delta of the backward in one pass over out and dout, without their product in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_forward import launch


def output_delta(out: Tensor, dout: Tensor, dlse: Tensor) -> Tensor:
    """rowsum(out * dout) - dlse, [B, H, S] like dlse; out, dout: [B, H, S, D]."""
    out, dout, dlse = out.contiguous(), dout.contiguous(), dlse.contiguous()
    delta, rows, width = torch.empty_like(dlse), dlse.numel(), triton.next_power_of_2(out.shape[3])
    ROWS = max(1, 8192 // width)
    arguments = (out, dout, dlse, delta, rows)
    launch(_delta, triton.cdiv(rows, ROWS), out, arguments, ROWS=ROWS, DIM=out.shape[3], WIDTH=width)
    return delta


@triton.jit(do_not_specialize=["rows"])
def _delta(out, dout, dlse, delta, rows, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    places = row[:, None] * DIM + column[None, :]
    inside = (row < rows)[:, None] & (column < DIM)[None, :]
    x = tl.load(out + places, mask=inside, other=0.0)
    y = tl.load(dout + places, mask=inside, other=0.0).to(x.dtype)
    total = tl.sum(x * y, 1) - tl.load(dlse + row, mask=row < rows, other=0.0)
    tl.store(delta + row, total, mask=row < rows)

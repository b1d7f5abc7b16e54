"""Windows: what a rank reads is what was shown in that turn, however slow or fast the others are."""

from __future__ import annotations

import random
import time

import pytest
import torch

from sparring.cp import RingDesyncError, RingTimeoutError, run_threads

WORLD, TURNS = 4, 12


def shown(rank: int, turn: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """[rank + turn, width]: rows that tell where they are from."""
    rows = torch.arange(rank + turn)[:, None] + 100 * rank
    return (rows + 7 * turn + torch.arange(width)).to(dtype)


def most(turn: int) -> int:
    return WORLD - 1 + turn  # grows, so that buffers have to


@pytest.mark.parametrize(("width", "dtype"), [(16, torch.float32), (6, torch.bfloat16), (3, torch.uint8)])
def test_ranks_that_rush_or_linger_read_what_was_shown(width, dtype):
    """Of all other ranks, by places and as slices; two channels do not wait for each other."""

    def body(transport):
        pause = random.Random(transport.rank)
        for turn in range(TURNS):
            channel = ("keys", "grads")[turn % 3 == 0]
            window = transport.publish(shown(transport.rank, turn, width, dtype), most(turn), channel)
            time.sleep(pause.choice((0, 0, 0.01)))
            for rank in range(WORLD):
                expected = shown(rank, turn, width, dtype)
                places = torch.arange(rank + turn).flip(0)[::2]
                by_place, part = expected.new_empty(len(places), width), expected.new_empty(turn, width)
                finish = window.read([(by_place, rank, places), (part, rank, slice(rank, rank + turn))])
                finish()
                assert torch.equal(by_place, expected[places])
                assert torch.equal(part, expected[rank:])

    run_threads(WORLD, body)


def test_buffers_grow_a_few_times_only():
    """By a quarter at least."""

    def body(transport):
        for rows in range(1, 200):
            transport.publish(torch.zeros(rows, 128), rows, "keys")
        return transport._calls["swap", "keys"] - 199  # a barrier each

    assert all(1 < grown <= 25 for grown in run_threads(2, body))


def test_ranks_of_one_node_read_and_others_do_not():
    device = torch.device("cpu")
    assert all(run_threads(2, lambda transport: transport.one_sided(device)))
    assert not any(run_threads(2, lambda transport: transport.one_sided(device), nodes=2))


def test_a_rank_that_shows_nothing_is_named():
    def body(transport):
        if transport.rank == 0:
            transport.publish(torch.zeros(1, 4), 1, "keys")

    with pytest.raises(RingTimeoutError, match="nothing shown for keys by rank 1") as caught:
        run_threads(2, body, timeout=0.5)
    assert (caught.value.rank, caught.value.peer) == (0, 1)


def test_ranks_that_show_rows_of_different_widths_are_told():
    def body(transport):
        transport.publish(torch.zeros(1, 1024 * (1 + transport.rank)), 1, "keys")

    with pytest.raises(RingDesyncError, match=r"\(8192,\).*\(16384,\)|\(16384,\).*\(8192,\)"):
        run_threads(2, body)

"""The ring as data: all ranks of a schedule are simulated message by message."""

import pytest

from sparring.balance import ring

WORLDS = [1, 2, 3, 4, 5, 8, 16]


def deliver(transfers):
    """{rank: source received}; checks that every message meets the receiver that expects it."""
    sent = {(rank, t.send_to): t.sends for rank, t in transfers.items()}
    expected = {(t.recv_from, rank): t.receives for rank, t in transfers.items()}
    assert sent == expected
    return {to: source for (_, to), source in sent.items()}


def posted(steps, number, what):
    """{rank: transfer} of one step; all ranks post it or none does."""
    transfers = {rank: getattr(steps[rank][number], what) for rank in steps}
    assert len({transfer is None for transfer in transfers.values()}) == 1
    return {rank: t for rank, t in transfers.items() if t is not None}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_every_rank_computes_with_every_source_once_when_its_keys_are_there(world, phase):
    steps = {rank: getattr(ring(rank, world), phase) for rank in range(world)}
    here = {rank: {rank} for rank in steps}
    computed = []
    for number in range(world):
        keys = posted(steps, number, "keys")
        for rank, transfer in keys.items():
            assert transfer.sends in here[rank]
        for rank in steps:
            assert steps[rank][number].source in here[rank]
            computed.append((rank, steps[rank][number].source))
            here[rank] = {steps[rank][number].source}  # a ring keeps one set of keys at a time
        for rank, source in deliver(keys).items():
            here[rank].add(source)
    assert sorted(computed) == [(r, s) for r in range(world) for s in range(world)]


@pytest.mark.parametrize("world", WORLDS)
def test_gradients_collect_every_share_and_arrive_home(world):
    steps = {rank: ring(rank, world).backward for rank in range(world)}
    travelling = {rank: {} for rank in steps}  # rank: {source: shares collected}
    hops = 0
    for number in range(world):
        for rank in steps:
            source = steps[rank][number].source
            shares = travelling[rank].setdefault(source, [])
            shares.append(rank)
        gradients = posted(steps, number, "gradients")
        moved = {rank: travelling[rank].pop(t.sends) for rank, t in gradients.items()}
        for to, source in deliver(gradients).items():
            sender = gradients[to].recv_from
            travelling[to][source] = moved[sender]
        hops += bool(gradients)
    assert hops == (world if world > 1 else 0)
    assert {rank: list(sources) for rank, sources in travelling.items()} == {rank: [rank] for rank in steps}
    for rank in steps:
        assert sorted(travelling[rank][rank]) == list(range(world))


@pytest.mark.parametrize("world", WORLDS)
def test_the_first_step_is_local_and_the_last_moves_no_keys(world):
    for rank in range(world):
        schedule = ring(rank, world)
        assert [step.source for step in schedule.forward] == [(rank - t) % world for t in range(world)]
        for steps in (schedule.forward, schedule.backward):
            assert steps[0].source == rank
            assert [step.keys is None for step in steps] == [False] * (world - 1) + [True]
        assert all(step.gradients is None for step in schedule.forward)


def test_a_schedule_reads_well():
    assert str(ring(0, 2)).splitlines() == [
        "ring, rank 0 of 2",
        "  forward 0: compute with the keys of 0; keys of 0 to 1, of 1 from 1",
        "  forward 1: compute with the keys of 1",
        "  backward 0: compute with the keys of 0; keys of 0 to 1, of 1 from 1; "
        "gradients of 0 to 1, of 1 from 1",
        "  backward 1: compute with the keys of 1; gradients of 1 to 1, of 0 from 1",
    ]


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_outside_the_world_is_refused(rank, world):
    with pytest.raises(ValueError, match=f"rank is {rank}, world is {world}"):
        ring(rank, world)

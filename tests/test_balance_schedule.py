"""Schedules as data: all ranks are simulated message by message."""

from collections import Counter

import pytest

from sparring.balance import EXCHANGES, gather, hierarchical, ring, step_of_source

SHAPES = [(world, 1) for world in (1, 2, 3, 4, 5, 8, 16)]
SHAPES += [(4, 2), (8, 2), (8, 4), (6, 3), (6, 2), (4, 4), (3, 3), (16, 4), (12, 3)]  # ranks, nodes
CASES = [(name, *shape) for name in EXCHANGES for shape in SHAPES if name == "hierarchical" or shape[1] == 1]
every_case = pytest.mark.parametrize(("name", "world", "nodes"), CASES)


def of_all(name, world, nodes, phase):
    """{rank: steps}"""
    return {rank: getattr(EXCHANGES[name](rank, world, nodes), phase) for rank in range(world)}


def posted(steps, number, what):
    """The transfers of one step as [{rank: transfer}], in the order in which all ranks post them."""
    each = {rank: getattr(steps[rank][number], what) for rank in steps}
    assert len({tuple(t.outer for t in transfers) for transfers in each.values()}) == 1
    return [dict(zip(each, column, strict=True)) for column in zip(*each.values(), strict=True)]


def deliver(transfers):
    """{rank: source received}; checks that every message meets the receiver that expects it."""
    sent = {(rank, t.send_to): t.sends for rank, t in transfers.items()}
    expected = {(t.recv_from, rank): t.receives for rank, t in transfers.items()}
    assert sent == expected
    return {to: source for (_, to), source in sent.items()}


@every_case
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_every_rank_computes_with_every_source_once_when_its_keys_are_there(name, world, nodes, phase):
    steps = of_all(name, world, nodes, phase)
    here = {rank: {rank} for rank in steps}
    computed = []
    for number in range(len(steps[0])):
        arriving = {rank: set() for rank in steps}
        for transfers in posted(steps, number, "keys"):
            assert all(t.sends in here[rank] for rank, t in transfers.items())
            for rank, source in deliver(transfers).items():
                arriving[rank].add(source)
        for rank in steps:
            for source in steps[rank][number].sources:
                computed.append((rank, source))
                here[rank].remove(source)  # keys are given up by the step that uses them
            here[rank] |= arriving[rank]
    assert sorted(computed) == [(r, s) for r in range(world) for s in range(world)]
    assert not any(here.values())


@every_case
def test_gradients_collect_every_share_and_arrive_home(name, world, nodes):
    steps = of_all(name, world, nodes, "backward")
    shares, inside, outside = ({rank: {} for rank in steps} for _ in range(3))  # rank: {source: ranks}

    def summed(rank, source, outer):
        parts = [shares, inside] + [outside] * outer
        return sum((part[rank].pop(source, []) for part in parts), [])

    for number in range(len(steps[0])):
        for rank in steps:
            shares[rank] |= {source: [rank] for source in steps[rank][number].sources}
        for transfers in posted(steps, number, "gradients"):
            moved = {rank: summed(rank, t.sends, t.outer) for rank, t in transfers.items()}
            for to, source in deliver(transfers).items():
                arrived = outside if transfers[to].outer else inside
                arrived[to].setdefault(source, []).extend(moved[transfers[to].recv_from])
    for rank in steps:
        assert sorted(summed(rank, rank, True)) == list(range(world))
    assert not any(part[rank] for part in (shares, inside, outside) for rank in steps)


@every_case
def test_own_keys_come_first_in_the_forward_and_last_in_the_backward(name, world, nodes):
    for rank in range(world):
        schedule = EXCHANGES[name](rank, world, nodes)
        nothing, *others, own = schedule.backward
        assert schedule.forward[0].sources == own.sources == (rank,) and not nothing.sources
        assert [step.sources for step in schedule.forward[1:]] == [step.sources for step in others]
        assert nothing.keys == schedule.forward[0].keys and not own.keys and not own.gradients
        assert not any(step.gradients for step in schedule.forward)
        assert world == 1 or not schedule.forward[-1].keys


@pytest.mark.parametrize("world", [2, 4, 8])
def test_a_ring_talks_to_its_neighbours_alone(world):
    for rank in range(world):
        for step in (*ring(rank, world).forward, *ring(rank, world).backward):
            for transfer in (*step.keys, *step.gradients):
                assert (transfer.send_to, transfer.recv_from) == ((rank + 1) % world, (rank - 1) % world)
                assert not transfer.outer


@pytest.mark.parametrize(("world", "nodes"), [shape for shape in SHAPES if shape[1] > 1])
def test_what_crosses_nodes_is_outer_once_a_round_and_in_flight_through_one(world, nodes):
    inner = world // nodes
    for rank in range(world):
        schedule = hierarchical(rank, world, nodes)
        for steps, what, rounds in (
            (schedule.forward, "keys", nodes - 1),
            (schedule.backward, "keys", nodes - 1),
            (schedule.backward, "gradients", nodes - 1),
        ):
            outer = []
            for number, step in enumerate(steps):
                for transfer in getattr(step, what):
                    assert transfer.outer == (transfer.send_to // inner != rank // inner)
                    outer += [number] * transfer.outer
            if what == "keys":  # used by the first step of the next round
                assert outer == [turn * inner for turn in range(rounds)]
            elif inner > 1:  # the sum of a round goes on in the first step of the next
                assert outer == [turn * inner for turn in range(2, nodes)] + [world - 1]
            else:
                assert outer == list(range(1, nodes))


def test_hierarchical_sends_fewer_messages_between_nodes_than_a_flat_ring():
    """8 ranks on 2 nodes: each rank one message of keys in place of the 7 that cross at the node's end."""
    schedule = hierarchical(3, 8, 2)
    counts = Counter(t.outer for step in schedule.forward for t in step.keys)
    assert counts == {True: 1, False: 6}


@pytest.mark.parametrize("world", [2, 5])
def test_a_ring_moves_gradients_once_less_than_there_are_ranks(world):
    counts = [len(step.gradients) for step in ring(1, world).backward]
    assert counts == [0] + [1] * (world - 1) + [0]


@every_case
def test_step_of_source_says_when_each_rank_computes_with_each_source(name, world, nodes):
    table = step_of_source(name, world, nodes)
    for rank, steps in of_all(name, world, nodes, "forward").items():
        assert all(table[rank, s] == number for number, step in enumerate(steps) for s in step.sources)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 9])
def test_a_gather_computes_in_three_launches_at_most(world):
    steps = gather(0, world).forward
    sizes = [len(step.sources) for step in steps]
    assert sizes[0] == 1 and sum(sizes) == world and len(sizes) <= 3 and max(sizes) <= 1 + world // 2


def test_a_gather_sends_everything_at_once_and_gradients_to_their_owner():
    first, *rest = gather(1, 4).forward
    assert [t.send_to for t in first.keys] == [2, 3, 0] and {t.sends for t in first.keys} == {1}
    assert not any(step.keys for step in rest)
    sent = [t for step in gather(1, 4).backward for t in step.gradients]
    assert [(t.send_to, t.sends, t.receives) for t in sent] == [(0, 0, 1), (3, 3, 1), (2, 2, 1)]


def test_a_schedule_reads_well():
    assert str(hierarchical(0, 2, 2)).splitlines() == [
        "hierarchical, rank 0 of 2",
        "  forward 0: compute with the keys of 0; outer keys of 0 to 1, of 1 from 1",
        "  forward 1: compute with the keys of 1",
        "  backward 0: compute nothing yet; outer keys of 0 to 1, of 1 from 1",
        "  backward 1: compute with the keys of 1; outer gradients of 1 to 1, of 0 from 1",
        "  backward 2: compute with the keys of 0",
    ]


@pytest.mark.parametrize("name", EXCHANGES)
@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_outside_the_world_is_refused(name, rank, world):
    with pytest.raises(ValueError, match=f"rank is {rank}, world is {world}"):
        EXCHANGES[name](rank, world, 1)


@pytest.mark.parametrize(("world", "nodes"), [(4, 3), (4, 0), (2, 4)])
def test_nodes_that_do_not_divide_the_ranks_are_refused(world, nodes):
    with pytest.raises(ValueError, match=f"{world} ranks on {nodes} nodes; .* equally many on each"):
        hierarchical(0, world, nodes)

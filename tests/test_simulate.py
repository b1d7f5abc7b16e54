"""The event model against closed forms, and the files of cost constants."""

from dataclasses import replace

import numpy as np
import pytest

from sparring.balance import (
    EXCHANGES,
    H200,
    KernelCost,
    LinkCost,
    Step,
    Topology,
    programs,
    programs_of,
    read_constants,
    simulate,
    write_constants,
)

FREE = LinkCost(latency=0.0, bandwidth=np.inf)
SHAPES = [(1, 1), (2, 1), (5, 1), (4, 2), (8, 2), (6, 3), (4, 4), (12, 3)]  # ranks, nodes
every_case = pytest.mark.parametrize(
    ("name", "world", "nodes"), [(name, *shape) for name in EXCHANGES for shape in SHAPES]
)


def machine(world, nodes=1, inside=FREE, between=None, memory=np.inf, shared=False):
    return Topology(nodes, world // nodes, inside, between or inside, memory, shared)


def drawn(world, steps, *cases, seed=0):
    return np.random.default_rng(seed).uniform(0.5, 2.0, (*cases, world, steps + 1))


def even(world, steps, seconds=1.0):
    """Equal work in all steps, none for columns."""
    return np.tile([seconds] * steps + [0.0], (world, 1))


@every_case
def test_with_free_links_a_rank_of_equal_work_never_waits(name, world, nodes):
    for program in programs_of(name, world, nodes):
        compute = even(world, program.groups)
        found = simulate(program, machine(world, nodes), compute, 1e6, 2e6)
        assert np.array_equal(found.finish, compute.sum(1))
        assert not found.exposed.any()
        assert np.array_equal(np.sort(found.ends[:, :-1]), np.cumsum(compute[:, :-1], 1))


@every_case
@pytest.mark.parametrize("shared", [False, True])
def test_no_time_is_below_its_bounds_and_every_step_waits_for_its_keys(name, world, nodes, shared):
    links = LinkCost(0.25, 4.0), LinkCost(0.5, 2.0)
    for program in programs_of(name, world, nodes):
        compute = drawn(world, program.groups)
        found = simulate(
            program, machine(world, nodes, *links, memory=64.0, shared=shared), compute, 3.0, 5.0
        )
        assert (found.finish >= found.busy).all()
        assert (found.busy >= compute.sum(1) * (1 - 1e-12)).all()
        assert found.seconds >= max(found.inside.max() / 4, found.between.max() / 2)
        np.testing.assert_allclose(found.ends - found.begins, compute, rtol=1e-12)
        order = [place for place in program.places if place >= 0] + [program.groups]
        assert (found.begins[:, order[1:]] >= found.ends[:, order[:-1]]).all()
        arrived = {(rank, rank): 0.0 for rank in range(world)}
        hops = [hop for step in program.keys for hop in step]
        keys = [flight for flight in found.flights if "keys" in flight.channel]
        for hop, flight in zip(hops, keys, strict=True):
            for rank, (to, source) in enumerate(zip(hop.send_to, hop.sends, strict=True)):
                assert arrived[rank, source] <= flight.begin[rank]  # it must be here to be sent on
                arrived[to, source] = flight.end[rank]
        for place, sources in zip(program.places, program.sources, strict=True):
            for rank in range(world if place >= 0 else 0):
                assert found.begins[rank, place] >= max(arrived[rank, s] for s in sources[rank])


@every_case
@pytest.mark.parametrize("shared", [False, True])
def test_no_port_carries_more_than_its_bandwidth(name, world, nodes, shared):
    topology = machine(world, nodes, LinkCost(0.25, 4.0), LinkCost(0.5, 2.0), shared=shared)
    need = np.random.default_rng(3).choice([0.0, 1.0, 6.0], (world, world))
    for program in programs_of(name, world, nodes):
        found = simulate(program, topology, drawn(world, program.groups), need, 2 * need)
        carried = {}
        for flight in found.flights:
            for rank, to in enumerate(flight.send_to):
                between = rank // topology.inner != to // topology.inner
                ends = (rank // topology.inner, to // topology.inner) if between and shared else (rank, to)
                for port in zip(("out", "in"), ends, strict=True):
                    message = flight.end[rank], flight.size[rank]
                    carried.setdefault((between, *port), []).append(message)
        for (between, *_), messages in carried.items():
            link = topology.between if between else topology.inside
            ends, sizes = np.array(sorted(messages)).T
            assert (np.cumsum(sizes) <= link.bandwidth * ends + 1e-9).all()
            assert (ends[sizes > 0] >= link.latency + sizes[sizes > 0] / link.bandwidth).all()


def test_a_message_that_is_not_sent_holds_up_no_other():
    forward = programs_of("pull", 4)[0]
    need = np.zeros((4, 4))
    need[1, 0] = need[3, 0] = need[2, 3] = 4.0  # 0 sends two messages, 3 sends one to a third rank
    found = simulate(forward, machine(4, inside=LinkCost(0.0, 1.0)), even(4, forward.groups, 0.0), need)
    assert found.finish.tolist() == [0.0, 4.0, 4.0, 8.0]


@pytest.mark.parametrize("world", [2, 3, 8])
def test_a_ring_over_slow_links_takes_its_transfers_and_the_last_step(world):
    forward, backward = programs_of("ring", world)
    slow = machine(world, inside=LinkCost(latency=3.0, bandwidth=2.0))
    work = even(world, world, 0.5)
    found = simulate(forward, slow, work, keys=4.0)
    assert found.seconds == (world - 1) * (3.0 + 4.0 / 2.0) + 0.5
    assert np.array_equal(found.inside, np.full(world, (world - 1) * 4.0)) and not found.between.any()
    # Gradients are dearer: once the first of them have left, after one step, there is always one on its way.
    free_keys = simulate(backward, slow, work, keys=0.0, gradients=8.0)
    assert free_keys.seconds == 0.5 + (world - 1) * (3.0 + 8.0 / 2.0)


def test_the_gradients_of_a_ring_are_added_up_at_the_speed_of_memory():
    backward = programs_of("ring", 4)[1]
    found = simulate(backward, machine(4, memory=2.0), even(4, 4), keys=0.0, gradients=6.0)
    assert (found.busy == 4 + 4 * 6 / 2 + 3 * 3 * 6 / 2).all()  # computed, zeroed, added


def test_a_hierarchical_ring_hides_the_slow_link_behind_a_whole_round():
    nodes, inner = 4, 4
    forward = programs_of("hierarchical", nodes * inner, nodes)[0]
    hidden = machine(16, nodes, FREE, LinkCost(0.0, 1.0))
    assert simulate(forward, hidden, even(16, 16), keys=4.0).seconds == 16  # 4 s behind 4 steps of 1 s
    found = simulate(forward, hidden, even(16, 16), keys=6.0)
    assert found.seconds == (nodes - 1) * 6.0 + 4
    assert np.array_equal(found.between, np.full(16, (nodes - 1) * 6.0))
    flat = simulate(programs_of("ring", 16, nodes)[0], hidden, even(16, 16), keys=6.0)
    assert flat.seconds == 15 * 6.0 + 1  # every step waits for the messages that cross


def test_ranks_that_share_a_port_between_nodes_take_turns():
    forward = programs_of("hierarchical", 8, 2)[0]
    for shared, expected in ((False, 5.0), (True, 20.0)):
        topology = machine(8, 2, FREE, LinkCost(0.0, 1.0), shared=shared)
        found = simulate(forward, topology, even(8, 8, 0.0), keys=5.0)
        assert found.seconds == expected


def test_messages_of_one_step_share_the_port_and_pay_the_latency_once():
    forward = programs_of("gather", 5)[0]
    found = simulate(forward, machine(5, inside=LinkCost(3.0, 2.0)), even(5, 3, 0.0), keys=4.0)
    assert found.seconds == 4 * 2.0 + 3.0


@every_case
def test_bytes_are_those_of_the_messages(name, world, nodes):
    rng = np.random.default_rng(1)
    need = rng.integers(1, 9, (world, world)).astype(float)
    topology = machine(world, nodes, LinkCost(0.0, 1.0))
    for program in programs_of(name, world, nodes):
        compute = even(world, program.groups)
        found = simulate(program, topology, compute, need, 2 * need)
        hops = [hop for step in program.keys for hop in step]
        moved = sum(need[hop.send_to, hop.sends].sum() for hop in hops)
        sums = [hop for step in program.gradients for hop in step]
        moved += sum(2 * need[np.arange(world), hop.sends].sum() for hop in sums)
        assert found.inside.sum() + found.between.sum() == moved
        if name in ("gather", "pull"):
            others = need.sum() - np.trace(need)
            assert moved == others * (3 if any(program.gradients) else 1)


def test_what_nobody_needs_costs_nothing():
    need = np.zeros((4, 4))
    topology = machine(4, inside=LinkCost(5.0, 1.0))
    for program in programs_of("pull", 4):
        compute = even(4, program.groups)
        found = simulate(program, topology, compute, need, need)
        assert found.seconds == compute.sum(1).max()


def test_columns_travel_during_the_steps_and_their_gradients_after_them():
    forward, backward = programs_of("ring", 4)
    topology = machine(4, inside=LinkCost(0.5, 2.0))
    compute = even(4, 4)
    compute[:, -1] = 3.0
    reduced = 2 * 2 * 0.5 + 2 * 3 / 4 * 8.0 / 2.0  # a tree of two levels there and back; 6 of 4 parts
    found = simulate(forward, topology, compute, keys=0.0, columns=8.0)
    assert found.seconds == max(4, reduced) + 3
    found = simulate(backward, topology, compute, 0.0, 0.0, columns=8.0, column_gradients=8.0)
    assert found.seconds == max(4, reduced) + 3 + reduced
    assert np.array_equal(found.inside, np.full(4, 2 * 2 * 3 / 4 * 8.0))


@every_case
def test_cases_at_once_are_the_same_as_one_by_one_and_the_same_again(name, world, nodes):
    topology = machine(world, nodes, LinkCost(0.25, 4.0), LinkCost(0.5, 2.0), memory=50.0)
    for program in programs_of(name, world, nodes):
        compute = drawn(world, program.groups, 2, 3)
        need = np.random.default_rng(2).uniform(0, 4, (3, world, world))
        found = simulate(program, topology, compute, need, 2 * need)
        for case in np.ndindex(2, 3):
            one = simulate(program, topology, compute[case], need[case[1]], 2 * need[case[1]])
            for what in ("begins", "ends", "finish", "busy", "exposed", "inside", "between"):
                assert np.array_equal(getattr(one, what), getattr(found, what)[case]), what


@pytest.mark.parametrize("name", list(EXCHANGES))
def test_slower_links_never_help(name):
    links = LinkCost(0.1, 4.0)
    for program in programs_of(name, 8, 2):
        compute = drawn(8, program.groups)
        times = [
            simulate(program, machine(8, 2, links, LinkCost(0.1, speed)), compute, 3.0, 5.0).seconds
            for speed in (8.0, 4.0, 2.0, 1.0)
        ]
        assert times == sorted(times)


def test_schedules_that_do_not_fit_together_are_refused():
    schedules = [EXCHANGES["ring"](rank, 4, 1) for rank in range(4)]
    with pytest.raises(ValueError, match="rank 1 starts other transfers than rank 0"):
        silent = tuple(Step(step.sources) for step in schedules[1].forward)
        programs([schedules[0], replace(schedules[1], forward=silent), *schedules[2:]])
    with pytest.raises(ValueError, match="what the receiver does not expect"):
        programs(schedules[::-1])


def test_sizes_that_do_not_fit_are_refused():
    forward = programs_of("ring", 4)[0]
    with pytest.raises(ValueError, match=r"compute must be \[..., 4, 5\]"):
        simulate(forward, machine(4), np.ones((4, 4)), 1.0)
    with pytest.raises(ValueError, match="the topology has 2 ranks"):
        simulate(forward, machine(2), np.ones((4, 5)), 1.0)
    with pytest.raises(ValueError, match="6 ranks on 4 nodes"):
        H200.topology(6, 4)


def test_a_kernel_costs_tiles_rows_that_have_any_and_columns_or_a_launch():
    cost = KernelCost(tile=2.0, row=3.0, column=0.5, launch=11.0)
    work = np.array([[10.0, 1.0, 0.0, 0.25], [4.0, 0.0, 0.0, 3.0]])  # three steps, then columns
    found = cost.seconds(work, blocks=4, heads=2, block_size=8)
    assert np.array_equal(found, [[40 + 24, 11, 0, 11], [16 + 24, 0, 0, 24]])


def test_constants_come_back_from_their_file(tmp_path):
    path = tmp_path / "constants.json"
    write_constants(H200, path)
    assert read_constants(path) == H200
    path.write_text('{"source": "elsewhere"}')
    with pytest.raises(ValueError, match="benchmarks/calibrate.py"):
        read_constants(path)

"""Listed mutations of kernels/patterns/, balance/ and launch/, and the list of all."""

from __future__ import annotations

from mutation_case import Mutation
from mutation_list_cp import CP
from mutation_list_kernels import KERNELS, PATTERNS

CHOICE = [
    Mutation(
        "the window is one block too short",
        "kernels/patterns/static.py",
        "(distance <= -(-self.window // geometry.block_size))",
        "(distance < -(-self.window // geometry.block_size))",
        PATTERNS,
    ),
    Mutation(
        "one sink token too few",
        "kernels/patterns/static.py",
        "min(end, start + sink)",
        "min(end, start + sink - 1)",
        PATTERNS,
    ),
    Mutation(
        "one sink token too many in vertical-slash",
        "kernels/patterns/vertical_slash.py",
        "(ids < start_of_pair + pattern.sink)",
        "(ids <= start_of_pair + pattern.sink)",
        PATTERNS,
    ),
    Mutation(
        "the threshold of top-p for columns is 2 % too low",
        "kernels/patterns/vertical_slash.py",
        "target = (tables.queries * self.top_p).long() - tables.queries",
        "target = (tables.queries * self.top_p * 0.98).long() - tables.queries",
        PATTERNS,
    ),
    Mutation(
        "top-p stops one entry late when the share is reached exactly",
        "kernels/select.py",
        "(before < target[..., None])",
        "(before <= target[..., None])",
        PATTERNS,
    ),
    Mutation(
        "ties go to the higher id",
        "kernels/select.py",
        "return (mass << ID_BITS) + ((1 << ID_BITS) - 1 - ids) + forced * FORCED",
        "return (mass << ID_BITS) + ids + forced * FORCED",
        PATTERNS,
    ),
    Mutation(
        "the mass of a diagonal ignores the part that falls on the next one",
        "kernels/estimates.py",
        "(offset[..., None] - bins * size).abs()",
        "(offset[..., None] - bins * size).clamp(max=0).abs()",
        PATTERNS,
    ),
]

LAYOUTS, PLANNER, SCHEDULE = "test_balance_layout.py", "test_balance_planner.py", "test_balance_schedule.py"
CALL = "test_planner_call.py"

BALANCE = [
    Mutation(
        "the inverse of a layout forgets the order inside a rank",
        "balance/layout.py",
        "blocks = self.bounds[self.source_of_block] + self.slot_of_block",
        "blocks = self.bounds[self.source_of_block] + np.sort(self.slot_of_block)",
        LAYOUTS,
    ),
    Mutation(
        "the second chunk of zigzag is not mirrored",
        "balance/layout.py",
        "chunks[rank] + chunks[-1 - rank]",
        "chunks[rank] + chunks[world + rank]",
        LAYOUTS,
    ),
    Mutation(
        "layouts with other assignments have one digest",
        "balance/layout.py",
        "text = repr((self.block_size, self.assignment)).encode()",
        "text = repr((self.block_size, self.num_blocks)).encode()",
        LAYOUTS,
    ),
    Mutation(
        "a layout that holds a block twice is accepted",
        "balance/layout.py",
        "np.array_equal(np.sort(self.order), ",
        "np.array_equal(np.unique(self.order), ",
        LAYOUTS,
    ),
    Mutation(
        "the gradients of the last hop are not sent",
        "balance/schedule.py",
        "        if step > 0:",
        "        if 0 < step < inner - 1:",
        SCHEDULE,
    ),
    Mutation(
        "the sum of a node crosses to the next one before its last share has come",
        "balance/schedule.py",
        "yield across(complete)",
        "yield across(turn)",
        SCHEDULE,
    ),
    Mutation(
        "what came from other nodes is left out of what goes on",
        "cp/ring.py",
        "        if outer:\n            arrived",
        "        if False:\n            arrived",
        "test_zoo.py -k 'rings_of_rings and top_k' -m 'not full'",
    ),
    Mutation(
        "the ring turns the wrong way",
        "balance/schedule.py",
        "+ (place - step) % inner",
        "+ (place + step) % inner",
        SCHEDULE,
    ),
    Mutation(
        "worker imbalance is the mean over the mean",
        "balance/cost.py",
        "return float(totals.max() / totals.mean())",
        "return float(totals.mean() / totals.mean())",
        PLANNER,
    ),
    Mutation(
        "step imbalance takes the slowest step, not the slowest ranks",
        "balance/cost.py",
        "work.max(0).sum() / work.mean(0).sum()",
        "work.max(1).sum() / work.mean(1).sum()",
        PLANNER,
    ),
    Mutation(
        "work is given to the wrong ring step",
        "balance/cost.py",
        "np.arange(world)[:, None] * count + steps)",
        "np.arange(world)[:, None] * count + steps[:, ::-1])",
        PLANNER,
    ),
    Mutation(
        "the last, partly filled block of a document costs nothing",
        "balance/tiles.py",
        "held = row[start // block_size : -(-end // block_size)]",
        "held = row[start // block_size : end // block_size]",
        PLANNER,
    ),
    Mutation(
        "no hysteresis: the layout changes for any gain",
        "balance/planner.py",
        "candidate.time <= best.time * SWITCH",
        "candidate.time <= best.time",
        PLANNER,
    ),
    Mutation(
        "statistics take the offset for the distance",
        "balance/statistics.py",
        "np.bincount(distance[visible], chosen[visible], num_blocks)",
        "np.bincount(offset[visible], chosen[visible], num_blocks)",
        PLANNER,
    ),
    Mutation(
        "an exchange of chunks may make the other rank the heaviest",
        "balance/search.py",
        "self.load[light] + moved), mean)",
        "self.load[light]), mean)",
        CALL,
    ),
    Mutation(
        "a folded layout takes heavy blocks where it should take light ones",
        "balance/candidates.py",
        "order[low : low + taken], order[high - count + taken : high]",
        "order[low : low + count - taken], order[high - taken : high]",
        CALL,
    ),
    Mutation(
        "needed keys of a document are counted before it begins",
        "balance/tiles.py",
        "seen = np.searchsorted(keys, firsts)",
        "seen = np.zeros_like(firsts)",
        CALL,
    ),
    Mutation(
        "gradients of a pull are predicted to start with its keys",
        "balance/predict.py",
        "np.maximum(clock.max(-1, keepdims=True), arrivals[-1])",
        "0",
        CALL,
    ),
    Mutation(
        "unequal work is as good as equal work",
        "balance/decision.py",
        "worker_imbalance(self.work) > EVEN else 1.0",
        "worker_imbalance(self.work) > 99 else 1.0",
        CALL,
    ),
]

CHECKPOINT, DATA = "test_checkpoint.py", "test_data.py -k 'not default_data and not standard'"
SHARDED, RESUME = "test_checkpoint_sharded.py", "test_train.py -k resumed"
OPTIMIZER = "test_launch_optimizer.py"

LAUNCH = [
    Mutation(
        "the hash of a checkpoint is not verified, its size alone",
        "launch/manifest.py",
        "if (found := fingerprint(path)) != expected:",
        'if (found := fingerprint(path))["bytes"] != expected["bytes"]:',
        CHECKPOINT,
    ),
    Mutation(
        "one checkpoint too many is kept",
        "launch/manifest.py",
        "complete[len(complete) - (keep - 1) :] if keep > 1",
        "complete[len(complete) - keep :] if keep > 1",
        CHECKPOINT,
    ),
    Mutation(
        "the newest checkpoint is named before its manifest is written",
        "launch/manifest.py",
        "    write_json(folder / MANIFEST, ",
        "    (folder.parent / LATEST).write_text(folder.name)\n    write_json(folder / MANIFEST, ",
        CHECKPOINT,
    ),
    Mutation(
        "what is saved is not a copy",
        "launch/shards.py",
        '.to("cpu", copy=True)',
        '.to("cpu")',
        CHECKPOINT,
    ),
    Mutation(
        "every rank writes all replicas",
        "launch/shards.py",
        "return first and (",
        "return (",
        SHARDED,
    ),
    Mutation(
        "a signal that another rank got is not heard",
        "launch/train.py",
        "max(number for (number,) in gather(world.control, [stop.number]))",
        "stop.number",
        "test_interrupt.py -k numbers",
    ),
    Mutation(
        "the optimizer's state is not restored",
        "launch/trainee.py",
        "        set_optimizer_state_dict(self.model, self.optimizer, optimizer, options=TRAINED)\n",
        "",
        OPTIMIZER,
    ),
    Mutation(
        "trained weights are in bf16 where the computation is",
        "launch/parallel.py",
        "torch.float32 if parameter.requires_grad else dtype",
        "dtype",
        "test_launch_model.py -k fp32",
    ),
    Mutation(
        "attention runs again under selective checkpointing",
        "launch/memory.py",
        "        del parts[ATTENTION]\n",
        "",
        "test_launch_model.py -k less_memory",
    ),
    Mutation(
        "vectors decay",
        "launch/optimizer.py",
        '"weight_decay": 0.0',
        '"weight_decay": config.weight_decay',
        OPTIMIZER,
    ),
    Mutation(
        "the planner's memory is not restored",
        "launch/trainee.py",
        '        self.cp.load_state_dict(state["planner"])\n',
        "",
        OPTIMIZER,
    ),
    Mutation(
        "random numbers do not go on where they were",
        "launch/trainee.py",
        '        torch.set_rng_state(state["rng"]["cpu"])\n',
        "",
        OPTIMIZER,
    ),
    Mutation(
        "warmup begins at a learning rate of 0",
        "launch/optimizer.py",
        "return config.lr * (step + 1) / config.warmup",
        "return config.lr * step / config.warmup",
        OPTIMIZER,
    ),
    Mutation(
        "resuming starts one step late",
        "launch/train.py",
        "for step in range(start, config.steps):",
        "for step in range(start + (start > 0), config.steps):",
        RESUME,
    ),
    Mutation(
        "the position in the data is not restored",
        "launch/data.py",
        'self.dealt = state["dealt"]',
        "self.dealt = 0",
        DATA,
    ),
    Mutation(
        "all replicas read the same rows",
        "launch/data.py",
        "first = self.dealt + self.dp_rank * self.batch",
        "first = self.dealt",
        DATA,
    ),
    Mutation(
        "positions do not restart at documents",
        "launch/packing.py",
        "position_ids[at, end : end + length] = np.arange(length)",
        "position_ids[at, end : end + length] = np.arange(end, end + length)",
        DATA,
    ),
    Mutation(
        "the first token of a document is predicted from the one before",
        "launch/packing.py",
        "(position_ids == 0) | (mask == 0)",
        "mask == 0",
        DATA,
    ),
    Mutation(
        "padding has labels",
        "launch/packing.py",
        "(position_ids == 0) | (mask == 0)",
        "position_ids == 0",
        DATA,
    ),
    Mutation(
        "the position in the data is that of the batch made ahead",
        "launch/prefetch.py",
        "return self._state\n",
        "return self._data.state_dict()\n",
        "test_prefetch.py",
    ),
    Mutation(
        "a resumed run keeps the row of the step that it repeats",
        "launch/metrics.py",
        'r["step"] < start',
        'r["step"] <= start',
        "test_report.py -k resumed",
    ),
]

LISTED = [*KERNELS, *CHOICE, *BALANCE, *CP, *LAUNCH]

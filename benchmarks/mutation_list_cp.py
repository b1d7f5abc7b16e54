"""Listed mutations of cp/."""

from __future__ import annotations

from mutation_case import Mutation

RING = "test_ring.py -k 'ring_matches_oracle or uneven'"
MODEL = "test_functional.py -k 'dense_equals_the_original_model and (2- or 4-)'"
CHECKPOINTED = "test_functional.py -k 'two_micro_batches or sparse_equals'"
PRECISION = "test_precision.py"
PULL = "test_pull.py test_zoo.py -k 'lower_bound or (all_at_once and pull)'"
SUBGROUP = "test_gloo.py -k 'subgroup or slice'"
GLOO = "test_gloo.py -k 'equals_oracle_in_fp64'"
AUTO = "test_auto_layout.py"
BORDERS = "test_regressions.py -k labels_and_positions"

EXCHANGE = [
    Mutation(
        "keys are used before they have arrived",
        "cp/ring.py",
        "arriving.pop(source).wait()",
        "arriving.pop(source)",
        RING,
    ),
    Mutation(
        "gradients are taken before they have arrived home",
        "cp/ring.py",
        "            pending.wait()\n            parts.append(received)\n",
        "            parts.append(received)\n",
        RING,
    ),
    Mutation(
        "columns are used before they have arrived",
        "cp/attention.py",
        "    tensor, pending = columns\n    pending.wait()\n",
        "    tensor, pending = columns\n",
        RING,
    ),
    Mutation(
        "stale buffer: this rank's own keys are sent on in every step",
        "cp/ring.py",
        "send = held[transfer.sends] if sends else None",
        "send = own if sends else None",
        RING,
    ),
    Mutation(
        "stale buffer: every step computes with this rank's own keys",
        "cp/ring.py",
        "parts = [held.pop(source) for source in step.sources if source in held]",
        "parts = [(held.pop(source), own)[1] for source in step.sources if source in held]",
        RING,
    ),
    Mutation(
        "one buffer sends and receives",
        "cp/ring.py",
        "received = torch.empty(like.shape, dtype=like.dtype, device=like.device) if receives else None",
        "received = send",
        GLOO,
    ),
    Mutation(
        "keys and values are swapped",
        "cp/ring.py",
        "parts = [held.pop(source) for source in step.sources if source in held]",
        "parts = [held.pop(source).flip(0) for source in step.sources if source in held]",
        RING,
    ),
    Mutation(
        "the gradients that arrive are not added",
        "cp/ring.py",
        "            total += other\n",
        "            total += 0 * other\n",
        RING,
    ),
    Mutation(
        "dK and dV of one rank are lost",
        "cp/attention.py",
        "bound, step, dq, *gradient, scale",
        "bound, step, dq, *(gradient if step else gradient.clone()), scale",
        RING,
    ),
    Mutation(
        "local instead of global lse in the backward",
        "cp/attention.py",
        "ctx.save_for_backward(q, k, v, out, lse, *lists)",
        "local = carried(q)\n"
        "        ring.steps.forward_step(q, k, v, ctx.bound.join(lists), 0, *local, scale, fresh=True)\n"
        "        ctx.save_for_backward(q, k, v, out, local[1], *lists)",
        RING,
    ),
    Mutation(
        "delta from the out of the local keys",
        "cp/attention.py",
        "ctx.save_for_backward(q, k, v, out, lse, *lists)",
        "local = carried(q)\n"
        "        ring.steps.forward_step(q, k, v, ctx.bound.join(lists), 0, *local, scale, fresh=True)\n"
        "        ctx.save_for_backward(q, k, v, local[0], lse, *lists)",
        RING,
    ),
    Mutation(
        "the gradients of columns are not summed over ranks",
        "cp/attention.py",
        'summed = ring.all_reduce("backward", dcolumns)',
        'summed = ring.all_reduce("backward", dcolumns.clone())',
        RING,
    ),
    Mutation(
        "travelling gradients are cast too early",
        "cp/attention.py",
        "gradient = accumulators(keys)",
        "gradient = torch.zeros_like(keys)",
        PRECISION,
    ),
    Mutation(
        "the carried output is rounded after every step",
        "cp/attention.py",
        "bound, step, out, lse, scale, fresh=step == 0)\n",
        "bound, step, out, lse, scale, fresh=step == 0)\n        out.copy_(out.to(q.dtype))\n",
        PRECISION,
    ),
    Mutation(
        "keys do not go on through a rank that has no use for them",
        "balance/hops.py",
        "keys[sender, source] |= keys[receiver, source]",
        "keys[sender, source] |= False",
        "test_hops.py -k bring",
    ),
    Mutation(
        "gradients do not go on through a rank that adds nothing",
        "balance/hops.py",
        "gradients[receiver, source] |= gradients[sender, source]",
        "gradients[receiver, source] |= False",
        "test_hops.py -k bring",
    ),
    Mutation(
        "hops are dropped by the plan from before query blocks moved",
        "cp/shard.py",
        "computed = self._moved_bound(layer) if layer in self.moved else bound",
        "computed = bound",
        "test_hops.py -k have_moved",
    ),
    Mutation(
        "a header is used before it has arrived",
        "cp/link.py",
        "self._awaited(lambda: (pending.wait(), x)[1])",
        "self._awaited(lambda: x)",
        "test_hops.py -k when_messages_arrive",
    ),
    Mutation(
        "pull: a block that only one key head needs is left out",
        "cp/pull.py",
        "unions = mine.any(1).any(0)",
        "unions = mine.all(1).any(0)",
        PULL,
    ),
    Mutation(
        "pull: gradients of one rank are not added",
        "cp/pull.py",
        "index_add_(0, places, share)",
        "index_add_(0, places, share * bool(self.arriving.index((rows, received, pending))))",
        PULL,
    ),
    Mutation(
        "pull: values are sent as keys",
        "cp/rows.py",
        "both = mask[:, None].expand(-1, 2, -1, -1, -1)",
        "both = mask[:, None] & torch.tensor([True, False]).view(1, 2, 1, 1, 1)",
        PULL,
    ),
    Mutation(
        "windows: rows are shown where the last ones may still be read",
        "cp/windows.py",
        "self._turn = 1 - self._turn",
        "self._turn = 0",
        "test_windows.py -k rush",
    ),
    Mutation(
        "windows: rows are read before all ranks show theirs",
        "cp/windows.py",
        "            self._shared.barrier()\n",
        "",
        "test_windows.py -k rush",
    ),
    Mutation(
        "peers are places in the group, not global ranks",
        "cp/transport.py",
        "self.groups[channel], self.ranks[send_to], self.ranks[recv_from]",
        "self.groups[channel], send_to, recv_from",
        SUBGROUP,
    ),
    Mutation(
        "an all-gather comes in the order of the backend, not of the mesh",
        "cp/transport.py",
        "if self.ranks == tuple(sorted(self.ranks)):",
        "if len(self.ranks) > 0:",
        SUBGROUP,
    ),
]

HEADS = [
    Mutation(
        "the gradient of a repeated key head is that of one rank's queries",
        "cp/heads.py",
        "arriving[1]().unflatten(1, (ctx.kv_heads, -1)).sum(2)",
        "arriving[1]().unflatten(1, (ctx.kv_heads, -1))[:, :, 0]",
        "test_heads.py -k every_way",
    ),
    Mutation(
        "gradients of repeated key heads are rounded before they are added up",
        "cp/heads.py",
        "if k.shape[1] * len(ring.shares.inside) == ctx.kv_heads:",
        "if k.shape[1] * len(ring.shares.inside) >= ctx.kv_heads:",
        "test_heads.py -k rounded_once",
    ),
    Mutation(
        "heads are used before they have arrived",
        "cp/swap.py",
        "            pending.wait()\n            return received\n",
        "            return received\n",
        "test_heads.py -k every_way",
    ),
    Mutation(
        "every rank has the columns of the first heads",
        "cp/heads.py",
        "shares_of(columns, swap.link.size)[:, swap.link.rank]",
        "shares_of(columns, swap.link.size)[:, 0]",
        "test_heads.py -k every_way",
    ),
    Mutation(
        "columns of one node reach no other",
        "cp/part.py",
        "else parts.sum(0)",
        "else parts[self.rank]",
        "test_heads.py -k every_way",
    ),
]

BATCH = [
    Mutation(
        "labels shift after sharding instead of before",
        "cp/context_parallel.py",
        "labels=None if labels is None else take(labels, geometry, IGNORE),",
        "labels=None if labels is None else torch.nn.functional.pad(\n"
        '                take(batch["labels"], geometry, IGNORE)[:, 1:], (0, 1), value=IGNORE),',
        BORDERS,
    ),
    Mutation(
        "the last token of a document predicts the next document",
        "cp/batch.py",
        "inside[row, start : end - 1] = True",
        "inside[row, start:end] = True",
        BORDERS,
    ),
    Mutation(
        "the layout is not applied to labels",
        "cp/context_parallel.py",
        "take(labels, geometry, IGNORE)",
        "take(labels, geometry.select(held[::-1]), IGNORE)",
        MODEL,
    ),
    Mutation(
        "padding has labels",
        "cp/context_parallel.py",
        "take(labels, geometry, IGNORE)",
        "take(labels, geometry, 0)",
        MODEL,
    ),
    Mutation(
        "positions are counted from the start of the shard",
        "cp/context_parallel.py",
        "return {name: take(x, geometry, 0) for name, x in (given",
        "geometry = geometry.select(tuple(range(len(geometry.blocks))))\n"
        "        return {name: take(x, geometry, 0) for name, x in (given",
        BORDERS,
    ),
    Mutation(
        "documents begin one token early",
        "cp/batch.py",
        "starts[:, 1:] |= ids[:, 1:] != ids[:, :-1]",
        "starts[:, :-1] |= ids[:, 1:] != ids[:, :-1]",
        "test_peers.py -k 'test_mask and 900/63'",
    ),
    Mutation(
        "a document of one token is not found by its position",
        "cp/batch.py",
        "positions[:, 1:] != positions[:, :-1] + 1",
        "positions[:, 1:] < positions[:, :-1]",
        BORDERS,
    ),
    Mutation(
        "unshard does not undo the layout",
        "cp/shard.py",
        "return physical[inverse][: shard.length]",
        "return physical[: shard.length]",
        RING,
    ),
    Mutation(
        "plans of all ranks are gathered in physical order",
        "cp/shard.py",
        "return torch.cat(held)[order.to(x.device)].movedim(0, dim)",
        "return torch.cat(held).movedim(0, dim)",
        RING,
    ),
    Mutation(
        "maxima of the estimate are summed over ranks",
        "cp/estimate.py",
        "transport.all_reduce(flat, op).wait()",
        "transport.all_reduce(flat).wait()",
        "test_ring.py -k 'plans_do_not_depend and vertical'",
    ),
]

LOSS = [
    Mutation(
        "the loss is normalised by the labels of this rank",
        "cp/context_parallel.py",
        "count = shard.tokens if tokens is None else tokens",
        "count = int((shard.labels != IGNORE).sum()) if tokens is None else tokens",
        MODEL,
    ),
    Mutation(
        "labels are counted by each rank alone",
        "cp/loss.py",
        "    group.all_reduce(count).wait()\n",
        "",
        MODEL,
    ),
    Mutation(
        "the loss is not compensated for the mean that DDP and FSDP take",
        "cp/context_parallel.py",
        'scale = group.size if self.grad_reduce == "mean" else 1',
        "scale = 1",
        "test_parallel.py -k 'equals_one_process and plain'",
    ),
    Mutation(
        "gradients are summed twice",
        "cp/loss.py",
        "parameter.grad = total.to(parameter.dtype)",
        "parameter.grad = (total + total).to(parameter.dtype)",
        MODEL,
    ),
    Mutation(
        "gradients are not summed",
        "cp/loss.py",
        "        everyone.all_reduce(total).wait()\n        parameter.grad",
        "        parameter.grad",
        MODEL,
    ),
    Mutation(
        "a parameter without a gradient on one rank is left out of the sum",
        "cp/loss.py",
        "            parameter.grad = torch.zeros_like(parameter)\n",
        "            continue\n",
        "test_functional.py -k without_a_gradient",
    ),
]

GUARDS = [
    Mutation(
        "the comparison of headers is off",
        "cp/transport.py",
        "if torch.equal(table, table[:1].expand_as(table)):",
        "if len(table):",
        "test_bad_input.py -k another_batch_on_one_rank",
    ),
    Mutation(
        "no header at a transfer in debug mode",
        "cp/link.py",
        "    def _prove(self, message: str, *tensors: Tensor) -> None:\n        if self.debug:",
        "    def _prove(self, message: str, *tensors: Tensor) -> None:\n        if not self.debug:",
        "test_faults.py -k 'debug_proves and threads'",
    ),
    Mutation(
        "ranks do not compare their layouts",
        "cp/agreement.py",
        "*contents, shard.layout.digest()]",
        "*contents, 0]",
        "test_gloo.py -k 'shard_proves and layout'",
    ),
    Mutation(
        "ranks do not compare their exchanges",
        "cp/agreement.py",
        "[*contents, shard.exchange]",
        "[*contents, 0]",
        "test_auto_exchange.py -k choose_differently",
    ),
    Mutation(
        "the fingerprint of a batch ignores the order of tokens",
        "cp/batch.py",
        "weights = torch.arange(1, bits.numel() + 1, device=x.device)",
        "weights = torch.ones(bits.numel(), dtype=torch.int64, device=x.device)",
        "test_gloo.py -k 'shard_proves and input_ids'",
    ),
    Mutation(
        "the checksum of parameters is off",
        "cp/context_parallel.py",
        "if self.model is not None and shard.step == 1:",
        "if self.model is not None and shard.step == 0:",
        "test_parallel.py -k forgotten",
    ),
    Mutation(
        "lost keys are counted and not reported",
        "cp/coverage.py",
        "    if differ:\n",
        "    if differ < 0:\n",
        "test_coverage.py -k lost_keys",
    ),
    Mutation(
        "values that are not finite are found and not reported",
        "cp/finite.py",
        "    if found:\n",
        "    if not table:\n",
        "test_finite.py -k on_every_rank",
    ),
    Mutation(
        "the mask function is not registered",
        "cp/huggingface.py",
        "    AttentionMaskInterface.register(NAME, attention_mask)\n",
        "",
        "test_huggingface.py -k 'mask_functions or (dense_equals and 2-llama)'",
    ),
    Mutation(
        "layers that ran without context parallelism are not reported",
        "cp/huggingface.py",
        "    if missing:\n",
        "    if not covered:\n",
        "test_regressions.py -k transformers_layer_that_stays_local",
    ),
    Mutation(
        "interception is lost in recomputation",
        "cp/functional.py",
        "            with self.mode:\n",
        "            with self.mode if whole else torch.enable_grad():\n",
        CHECKPOINTED,
    ),
    Mutation(
        "the plan is estimated again in recomputation",
        "cp/shard.py",
        "new = layer not in self.plans",
        "new = bool(layer not in self.plans or self.plans)",
        "test_recomputation.py -k uses_the_plan",
    ),
    Mutation(
        "a model's own scale does not reach attention",
        "cp/call.py",
        "out, lse = sharded_attention(q, k, v, bound, around, scale)",
        "out, lse = sharded_attention(q, k, v, bound, around, q.shape[3] ** -0.5)",
        "test_regressions.py -k scale_of_the_model",
    ),
    Mutation(
        "autocast reaches into attention",
        "cp/isolated.py",
        "torch.autocast(device.type, enabled=False)",
        "torch.autocast(device.type, enabled=torch.is_autocast_enabled(device.type))",
        "test_tensors.py -k autocast",
    ),
    Mutation(
        "errors do not say where in a step they happened",
        "cp/link.py",
        "            error.place = self.place\n",
        "",
        "test_faults.py -k 'debug_proves and threads'",
    ),
    Mutation(
        "verify compares the sharded output with itself",
        "cp/verify.py",
        "(outputs - whole).abs().max(), whole",
        "(outputs - outputs).abs().max(), whole",
        "test_trace.py -k verify",
    ),
    Mutation(
        "rotary frequencies follow the longest position of one rank",
        "cp/context_parallel.py",
        "shard.last_position = positions.max()",
        'shard.last_position = shard.tensors["position_ids"].max()',
        "test_rotary.py -k batches_of_many_lengths",
    ),
]

KNOWING = [
    Mutation(
        "recall is taken from the wrong rows",
        "cp/estimate.py",
        "everywhere(lse[:, :, local].float())",
        "everywhere(lse[:, :, :count].float())",
        "test_ring.py -k recall",
    ),
    Mutation(
        "density counts a shared mask once",
        "cp/record.py",
        "torch.stack((pairs * (heads // plan.mask_heads), column_pairs, visible))",
        "torch.stack((pairs, column_pairs, visible))",
        "test_ring.py -k density",
    ),
    Mutation(
        "the report gives work to the wrong layer",
        "cp/report.py",
        "zip(layers, work.swapaxes(0, 1), strict=True)",
        "zip(layers, work.swapaxes(0, 1)[::-1], strict=True)",
        "test_step_report.py -k imbalances",
    ),
    Mutation(
        "blocks that are held here count as needed of others",
        "cp/record.py",
        "needed.sum() - needed[:, :, plan.geometry.block_ids].sum()",
        "needed.sum()",
        "test_step_report.py -k least",
    ),
    Mutation(
        "least bytes of gradients are those of the keys' dtype",
        "cp/record.py",
        "block * accumulator_dtype(k).itemsize",
        "block * k.itemsize",
        "test_step_report.py -k least",
    ),
    Mutation(
        "the planner's statistics differ by rank",
        "cp/record.py",
        "        transport.all_reduce(total).wait()\n        vectors",
        "        vectors",
        AUTO,
    ),
    Mutation(
        "the planner uses the plans of the last step, which may still run",
        "cp/planning.py",
        "while len(self.pending) > 1:",
        "while len(self.pending) > 0:",
        AUTO,
    ),
    Mutation(
        "a resumed planner forgets the steps in flight",
        "cp/planning.py",
        "for each in (self.known, *self.pending)]",
        "for each in (self.known,)]",
        AUTO,
    ),
    Mutation(
        "a resumed planner forgets what attention calls were",
        "cp/planning.py",
        "calls = [list(astuple(call)) for call in self.calls]",
        "calls = []",
        "test_auto_exchange.py -k resumed",
    ),
    Mutation(
        "heads with plans of their own are taken to have equal work",
        "cp/planning.py",
        "alike = plan.mask_heads == 1 and",
        "alike = plan.mask_heads > 0 and",
        "test_auto_exchange.py -k not_alike",
    ),
    Mutation(
        "the exchange in use is replaced by one that is hardly faster",
        "balance/by_heads.py",
        "wins = heads.seconds <= ring.seconds * SWITCH",
        "wins = heads.seconds <= ring.seconds",
        "test_by_heads.py -k stays",
    ),
    Mutation(
        "heads that several ranks have are swapped once",
        "balance/by_heads.py",
        "queries + call.key_bytes * copies, queries",
        "queries + call.key_bytes, queries",
        "test_by_heads.py -k swapped",
    ),
    Mutation(
        "a pull may make a rank hold all keys",
        "cp/planning.py",
        'most_pulled=1.0 if self.exchange == "pull" else MOST_PULLED',
        "most_pulled=1.0",
        "test_auto_exchange.py -k 'dense_attention or given_layout'",
    ),
]

CP = [*EXCHANGE, *HEADS, *BATCH, *LOSS, *GUARDS, *KNOWING]

"""The cases of other projects, by name: their shapes and masks, our tolerances, gradients always.

Everything is fp64 against the dense oracle to 1e-10 unless a test says otherwise. Sequences that are long
for a CPU are `full`; `make test` runs them scaled down, with blocks of 16 instead of 128 tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import oracle
import peers
import pytest
import tiny_models
import tolerance
import torch
from peers import bi_causal, block_causal, causal_blockwise, cut, packed, shared_question, window
from rings import LAYOUTS, attend_batch, on_ring, whole
from test_precision import low_precision

from sparring.cp import ContextParallel, run_threads
from sparring.kernels import Geometry, Plan, attend
from sparring.kernels.patterns import Dense

pytestmark = pytest.mark.usefixtures("poisoned")
MAGI = ((8, 8, 64), (8, 2, 128))  # query heads, key heads, head dim
RFA = ((5, 5, 128),)
TE = ((12, 12, 64), (32, 4, 64))
TORCH = ((8, 8, 32),)
FLA = ((2, 2, 64),)


@dataclass(frozen=True)
class Case:
    """mask: of a scale, by which its sizes are divided; `scale` is that of `make test`."""

    name: str
    mask: Callable[[int], peers.Mask]
    shapes: tuple[tuple[int, int, int], ...]
    scale: int = 1
    worlds: tuple[int, ...] = tuple(range(1, 9))
    layouts: tuple[str, ...] = tuple(LAYOUTS)

    def __str__(self):
        return self.name


def padded(scale, *rows):
    """Two rows of documents with padding before, between and after them."""
    scaled = tuple(tuple((start // scale, end // scale) for start, end in row) for row in rows)
    return peers.documents(4096 // scale, scaled)


AT_ENDS = (((0, 1000), (1000, 3000)), ((40, 4000),))
BETWEEN = (((0, 1000), (1040, 3000)), ((0, 40), (400, 4000)))
FEW, CUTS = (1, 2, 4, 8), ("contiguous",)
CASES = (
    Case("magi full 14336", lambda s: peers.full(14336 // s), MAGI, 32),
    Case("magi 12288 = 6 x 2048", lambda s: cut(12288 // s, 2048 // s), MAGI, 32),
    Case("magi block-causal 15360, 4 sinks", lambda s: block_causal(15360 // s, 1536 // s, 4), MAGI, 32),
    Case("magi bi-causal", lambda s: bi_causal(8192 // s), MAGI, 32),
    Case("magi 10000/512", lambda s: cut(10000 // s, 512 // s), MAGI, 16),
    Case("magi 11021/1111", lambda s: cut(11021 // s, 1111 // s), MAGI, 16),
    Case("magi 1024/32", lambda s: cut(1024, 32), MAGI),
    Case("magi 1050/5", lambda s: cut(1050, 5), MAGI),
    Case("magi 960/16", lambda s: cut(960, 16), MAGI),
    Case("magi 840/4", lambda s: cut(840, 4), MAGI),
    Case("magi 900/63", lambda s: cut(900, 63), MAGI),
    Case("rfa 3816", lambda s: packed(3816 // s), RFA, 8),
    Case("rfa 3824", lambda s: packed(3824 // s), RFA, 8),
    Case("rfa cu 0 120 1248 4232", lambda s: packed(4232 // s, 120 // s, 1248 // s), RFA, 8),
    Case("rfa cu 0 128 1248 4240", lambda s: packed(4240 // s, 128 // s, 1248 // s), RFA, 8),
    Case("rfa cu 0 7 14 16", lambda s: packed(16, 7, 14), RFA, worlds=(8,)),
    Case("te batch 2, 4096", lambda s: packed(4096 // s, batch=2), TE, 16, FEW),
    Case("te window 512", lambda s: window(4096 // s, 512 // s), TE, 16, FEW),
    Case("te window 128", lambda s: window(4096 // s, 128 // s), TE, 16, FEW),
    Case("te padded", lambda s: padded(s, *AT_ENDS), TE, 16, FEW),
    Case("te padding between documents", lambda s: padded(s, *BETWEEN), TE, 16, FEW),
    Case("torch 64 tokens a rank, 2", lambda s: packed(128, batch=8), TORCH, worlds=(2,)),
    Case("torch 64 tokens a rank, 4", lambda s: packed(256, batch=8), TORCH, worlds=(4,)),
    Case("torch 64 tokens a rank, 8", lambda s: packed(512, batch=8), TORCH, worlds=(8,)),
    Case("lucidrains 31 tokens", lambda s: packed(31), ((8, 8, 64),), worlds=(8,)),
    Case("dcp lambda 64, 4096", lambda s: window(8192 // s, 4096 // s, 64 // s), MAGI, 32),
    Case("dcp causal blockwise 256/2/1", lambda s: causal_blockwise(8192 // s, 256 // s, 2, 1), MAGI, 16),
    Case("dcp shared question 1 + 4 x 20 %", lambda s: shared_question(8000 // s, 4), MAGI, 16),
    Case("fla 10240 cut inside", lambda s: packed(10240 // s, 5000 // s, 6100 // s), FLA, 16, FEW, CUTS),
    Case("fla 10240 cut at the ranks", lambda s: cut(10240 // s, 2560 // s), FLA, 16, FEW, CUTS),
    Case("fla 10240 many short", lambda s: cut(10240 // s, 100 // s), FLA, 16, FEW, CUTS),
    Case("fla 65536 on 8", lambda s: cut(65536 // s, 7000 // s), ((1, 1, 64),), 64, (8,), CUTS),
)
BY_NAME = {case.name: case for case in CASES}


def params():
    """Scaled down over all worlds and shapes, one of them in `make test`; at full size once a shape."""
    chosen = []
    for n, case in enumerate(CASES):
        combinations = [(world, shape) for world in case.worlds for shape in case.shapes]
        for m, (world, shape) in enumerate(combinations):
            layout = case.layouts[(n + m) % len(case.layouts)]
            marks = () if m == 3 * n % len(combinations) else pytest.mark.full
            chosen.append(pytest.param(case, case.scale, world, shape, layout, marks=marks))
        if case.scale > 1:
            for world, shape in zip(case.worlds[::-1], case.shapes, strict=False):
                layout = case.layouts[n % len(case.layouts)]
                chosen.append(pytest.param(case, 1, world, shape, layout, marks=pytest.mark.full))
    return chosen


def attend_case(case, scale, world, shape, layout, dtype=torch.float64, most=96):
    """(mask, judged rows, tensors, actual out, dq, dk, dv); dout is zero outside of the rows."""
    mask, size = case.mask(scale), 16 if scale == case.scale else 128
    rows = peers.rows_to_judge(mask, size, world, most)
    *tensors, drawn, dlse = oracle.inputs(mask.batch_size, *shape[:2], mask.length, shape[2], dtype=dtype)
    tensors.append(torch.zeros_like(drawn))
    tensors[3][:, :, rows] = drawn[:, :, rows]
    held = LAYOUTS[layout](-(-mask.length // size), world, size)
    batch = mask.batch()
    if batch is None:
        out, _, *grads = on_ring(mask.plan(size), held, *tensors, torch.zeros_like(dlse))
        return mask, rows, tensors, (out, *grads)
    options = dict(pattern=Dense(), layout=held, block_size=size, recall_every=0, count_keys=0)
    shares = run_threads(world, lambda transport: attend_batch(transport, batch, *tensors, **options))
    return mask, rows, tensors, whole([share.tensors for share in shares], held, mask.length)


@pytest.mark.parametrize("case,scale,world,shape,layout", params(), ids=str)
def test_mask(case, scale, world, shape, layout):
    mask, rows, tensors, actual = attend_case(case, scale, world, shape, layout)
    peers.judge(rows, mask.pairs(rows), tensors, actual)


@pytest.mark.parametrize(
    "world,dtype",
    [
        (4, torch.bfloat16),
        *(pytest.param(world, torch.bfloat16, marks=pytest.mark.full) for world in (1, 2, 8)),
        *(pytest.param(world, torch.float16, marks=pytest.mark.full) for world in (1, 2, 4, 8)),
    ],
)
@pytest.mark.parametrize("name", ["te batch 2, 4096", "te window 512", "te window 128", "te padded"])
def test_te_low_precision(name, world, dtype):
    """Within what plain operations in that dtype lose."""
    case = BY_NAME[name]
    mask, rows, tensors, actual = attend_case(
        case, case.scale, world, (12, 12, 64), "zigzag", dtype, most=case.mask(case.scale).length
    )
    pairs = mask.pairs(rows).expand(-1, 12, -1, -1)
    low = low_precision(*tensors, pairs)
    out, _, *grads = oracle.attention(*tensors[:3], pairs, tensors[3], torch.zeros(pairs.shape[:3]))
    bounds = [tolerance.rounding(x, y, dtype) for x, y in zip(low, (out, *grads), strict=True)]
    peers.judge(rows, pairs, tensors, actual, "bf16", bounds)


@pytest.mark.parametrize("world", [1, 3, 8])
@pytest.mark.parametrize("name", ["te padded", "te padding between documents"])
def test_te_padding_gets_zero_gradients(name, world):
    """Exactly zero, whatever dout says there; and out is zero."""
    mask, rows, _, actual = attend_case(BY_NAME[name], 16, world, (4, 2, 16), "zigzag", most=256)
    padding = ~mask.pairs(rows).any(-1)[:, 0]
    assert padding.any(1).all()
    for x in actual:
        assert not x.movedim(1, 2)[padding].any()


def test_deepspeed_tiny_random_llama():
    """hf-internal-testing/tiny-random-LlamaForCausalLM: loss and gradients of 2 ranks against 1."""
    sizes = dict(hidden_size=16, intermediate_size=64, num_attention_heads=4, num_key_value_heads=4)
    batch, documents = tiny_models.make_batch("packed")
    expected = tiny_models.reference(tiny_models.llama(**sizes), batch, documents)
    results = tiny_models.sharded(tiny_models.llama(**sizes), batch, 2, Dense())
    tiny_models.assert_same_step(results, expected)


@pytest.mark.parametrize("through", ["attend", "ContextParallel"])
def test_mla_is_refused(through):
    """Values of another width than keys: both numbers in the message."""
    q, k, v = torch.zeros(1, 2, 64, 192), torch.zeros(1, 2, 64, 192), torch.zeros(1, 2, 64, 128)
    geometry = Geometry.causal(1, 64, 16)
    plan = Plan.build(geometry, torch.ones(1, 1, 4, 4, dtype=torch.bool))
    cp = ContextParallel(None, pattern="dense", block_size=16)
    shard = cp.shard({"input_ids": torch.zeros(1, 64, dtype=torch.int64)})
    with pytest.raises(NotImplementedError, match="value head dim 128 differs from key head dim 192"):
        attend(q, k, v, plan) if through == "attend" else cp.attention(q, k, v, shard)


def test_query_overlap_is_refused():
    """Magi's slices may give a query to several ranges; documents here may not."""
    with pytest.raises(ValueError, match=r"document \(40, 96\).*overlaps"):
        Geometry.causal(1, 96, 16, (((0, 64), (40, 96)),))


def test_linear_attention_is_refused():
    """fla's KDA and GDN under context parallelism: the layers of Qwen3-Next."""
    from test_huggingface import UNSUPPORTED

    cp = ContextParallel(None, pattern="dense", block_size=16)
    with pytest.raises(NotImplementedError, match="layers of type linear_attention"):
        cp.attach(UNSUPPORTED["layers of type linear_attention"]())

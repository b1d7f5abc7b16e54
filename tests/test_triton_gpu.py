"""The compiled Triton kernels on a GPU, against dense fp64 attention computed head by head.

The shapes are those that other projects test (MagiAttention, ring-flash-attention, TransformerEngine,
PyTorch, ring-attention-pytorch, MTraining, MoBA, Automodel, DCP), the tolerances our own: twice the error of
plain operations that round at the same places, plus one rounding of the result.
"""

from __future__ import annotations

from dataclasses import dataclass

import machine
import oracle
import pytest
import tolerance
import torch

from sparring.kernels import Geometry, Plan, attend, bind

pytestmark = [machine.needs("gpu", "triton compiled"), pytest.mark.usefixtures("poisoned")]
NAMES = ("out", "lse", "dq", "dk", "dv")
FP32 = 2e-5  # relative bound of everything computed in fp32, lse included


def token(length, batch=1):
    return torch.arange(length).expand(batch, -1)


def cut(length, size):
    """Documents of `size` tokens, the last one shorter."""
    return (tuple((start, min(start + size, length)) for start in range(0, length, size)),)


def documents(*ends):
    return (tuple(zip(ends[:-1], ends[1:], strict=True)),)


def intervals(lo, hi, prefix=None):
    return Geometry.from_intervals(lo.clamp(min=0), hi.clamp(max=lo.shape[1] - 1), 128, prefix)


def with_sinks(lo, hi, count):
    return intervals(lo, hi, (torch.zeros_like(lo), torch.full_like(lo, count - 1)))


def window(length, width, batch=1):
    return intervals(token(length, batch) - width, token(length, batch))


def band(length, width):
    return intervals(token(length) - width, token(length) + width)


def block_causal(length, size, sinks):
    """All of one's own and of the previous chunk of `size` tokens, and the first tokens."""
    start = token(length) // size * size
    return with_sinks(start - size, start + size - 1, sinks)


def blockwise(length, size, blocks):
    """Causal inside the last `blocks` chunks, and the first chunk."""
    i = token(length)
    return with_sinks((i // size - blocks + 1) * size, i, size)


def shared_question(length, answers=4):
    """A question that is a fifth of the sequence, and answers that see it and themselves."""
    i, part = token(length), length // (answers + 1)
    start = i // part * part
    return intervals(start, i, (torch.zeros_like(i), torch.full_like(i, part - 1)))


def full(length):
    return intervals(torch.zeros_like(token(length)), token(length).clamp(min=length))


def causal(length, docs=None, batch=1):
    return Geometry.causal(batch, length, documents=docs)


@dataclass(frozen=True)
class Case:
    name: str
    geometry: object
    heads: int
    kv_heads: int
    dim: int
    dtype: str = "bfloat16"
    mask_heads: int = 1
    column_heads: int = 0
    density: float = 1.0

    def __str__(self):
        return f"{self.name}-{self.heads}:{self.kv_heads}-d{self.dim}-{self.dtype}"


def both(name, geometry, heads=((8, 8, 64), (8, 2, 128)), **kwargs):
    return [Case(name, geometry, *shape, **kwargs) for shape in heads]


PADDED = (((0, 1000), (1010, 3000)), ((40, 4000),))
CASES = [
    *both("magi_full_14336", lambda: full(14336)),
    *both("magi_documents_6x2048", lambda: causal(12288, cut(12288, 2048))),
    *both("magi_block_causal_sinks", lambda: block_causal(15360, 1536, 4)),
    *both("magi_bi_causal", lambda: band(8192, 700)),
    *both("magi_10000_512", lambda: causal(10000, cut(10000, 512))),
    *both("magi_11021_1111", lambda: causal(11021, cut(11021, 1111))),
    *[
        Case(f"magi_{total}_{size}", lambda t=total, s=size: causal(t, cut(t, s)), 8, 2, dim, "float32")
        for total, size, dim in ((1024, 32, 64), (1050, 5, 64), (960, 16, 128), (840, 4, 128), (900, 63, 64))
    ],
    *both("rfa_3816", lambda: causal(3816), ((5, 5, 128),)),
    *both("rfa_3824", lambda: causal(3824), ((5, 5, 128),)),
    *both("rfa_packed_4232", lambda: causal(4232, documents(0, 120, 1248, 4232)), ((5, 5, 128),)),
    *both("rfa_packed_4240", lambda: causal(4240, documents(0, 128, 1248, 4240)), ((5, 5, 128),)),
    *both("rfa_tiny_documents", lambda: causal(16, documents(0, 7, 14, 16)), ((5, 5, 128),)),
    *[
        Case("te_b2_4096", lambda: causal(4096, batch=2), *shape, dtype)
        for shape in ((12, 12, 128), (32, 4, 64))
        for dtype in ("bfloat16", "float16")
    ],
    Case("te_b2_window_512", lambda: window(4096, 512, 2), 12, 12, 128, "float16"),
    Case("te_b2_window_128", lambda: window(4096, 128, 2), 32, 4, 64),
    Case("te_padded_documents", lambda: causal(4096, PADDED, 2), 12, 12, 64),
    Case("torch_b8_512", lambda: causal(512, batch=8), 8, 8, 32),
    Case("torch_b8_512", lambda: causal(512, batch=8), 8, 8, 32, "float32"),
    Case("lucidrains_31", lambda: causal(31), 8, 8, 64, "float32"),
    *[
        Case("mtraining_16384", lambda: causal(16384), 4, kv_heads, dim, "bfloat16", 4, 4, density)
        for kv_heads, dim, density in ((1, 128, 0.1), (4, 64, 0.05))
    ],
    Case("moba_16384_top8", lambda: causal(16384), 4, 1, 128, "bfloat16", 4, 0, 8 / 128),
    Case("m3_2048_top2", lambda: causal(2048, cut(2048, 700)), 4, 2, 128, "bfloat16", 2, 0, 2 / 16),
    Case("groups_of_columns", lambda: causal(6000), 8, 2, 64, "bfloat16", 8, 2, 0.1),
    Case("dcp_lambda", lambda: with_sinks(token(16384) - 4096, token(16384), 64), 8, 2, 128),
    Case("dcp_blockwise", lambda: blockwise(16384, 256, 2), 8, 2, 64),
    Case("dcp_shared_question", lambda: shared_question(16000), 8, 2, 128),
    *[Case("odd_head_dim", lambda: causal(1000), 4, 2, dim, "bfloat16", 1, 2, 0.5) for dim in (80, 96, 256)],
]


def make_plan(geometry, case, seed=1):
    """Random tiles and columns; two groups of columns, by halves of the sequence, if heads share them."""
    g = torch.Generator("cuda").manual_seed(seed)
    batch, rows = geometry.batch, len(geometry.blocks)
    shape = (batch, case.mask_heads, rows, geometry.num_blocks)
    tiles = torch.rand(shape, generator=g, device="cuda") < case.density
    columns = group = None
    if case.column_heads:
        groups = 2 if case.column_heads < case.heads else 1
        shape = (batch, case.column_heads, groups, min(1000, geometry.num_tokens // 8))
        columns = torch.randint(0, geometry.num_tokens, shape, generator=g, device="cuda")
        group = (torch.arange(rows, device="cuda") * 2 // rows) if groups > 1 else None
    return Plan.build(geometry, tiles, columns, group)


def on_gpu(geometry):
    prefix = None if geometry.prefix_lo is None else (geometry.prefix_lo.cuda(), geometry.prefix_hi.cuda())
    lo, hi = geometry.lo.cuda(), geometry.hi.cuda()
    return Geometry.from_intervals(lo, hi, geometry.block_size, prefix, geometry.documents)


def inputs(case, batch, length, seed=0):
    g = torch.Generator("cuda").manual_seed(seed)

    def normal(heads, width=case.dim):
        shape = (batch, heads, length, width)
        return torch.randn(shape, generator=g, device="cuda", dtype=torch.float32)

    ramp = torch.arange(length, device="cuda")[:, None] / length
    q, k, v = normal(case.heads) * 1.5, normal(case.kv_heads) * 1.5, normal(case.kv_heads) + 1 + ramp
    dout = normal(case.heads) + 0.5
    return *(x.to(getattr(torch, case.dtype)) for x in (q, k, v, dout)), normal(case.heads, 1)[..., 0]


def dense(q, k, v, dout, dlse, mask, dtype, rounded=None):
    """out, lse, dq, dk, dv of masked attention in `dtype`, one head at a time; mask(b, h) is [Sq, Sk].

    rounded: the dtype to which P, dS and the results are rounded on the way, as in the kernels.
    """
    results = [torch.zeros_like(x, dtype=dtype) for x in (q, q[..., 0], q, k, v)]
    out, lse, dq, dk, dv = results
    group, scale = q.shape[1] // k.shape[1], q.shape[3] ** -0.5

    def less(x):
        return x if rounded is None else x.to(rounded).to(dtype)

    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            qh, kh, vh = (x.to(dtype) for x in (q[b, h], k[b, h // group], v[b, h // group]))
            grad = dout[b, h].to(dtype)
            scores = (qh @ kh.mT).mul_(scale).masked_fill_(~mask(b, h), -torch.inf)
            lse[b, h] = scores.logsumexp(1)
            norm = lse[b, h].masked_fill(lse[b, h] == -torch.inf, 0.0)
            weights = scores.sub_(norm[:, None]).exp_()
            rough = less(weights)
            out[b, h] = less(rough @ vh)
            dv[b, h // group] += rough.mT @ grad
            delta = ((rough @ vh) * grad).sum(1) - dlse[b, h].to(dtype)
            del rough
            dscores = less((grad @ vh.mT).sub_(delta[:, None]).mul_(weights))
            dq[b, h] = less(dscores @ kh * scale)
            dk[b, h // group] += dscores.mT @ qh * scale
    return out, lse, dq, less(dk), less(dv)


def check(actual, arguments, mask):
    """Errors against fp64 within the bounds described above."""
    dtype = arguments[0].dtype
    expected = dense(*arguments, mask, torch.float64)
    low = expected if dtype == torch.float32 else dense(*arguments, mask, torch.float32, dtype)
    for name, x, y, rough in zip(NAMES, actual, expected, low, strict=True):
        if name == "lse" or dtype == torch.float32:
            bound, tier = FP32 * float(y[y.isfinite()].abs().max()), "gpu-fp32"
        else:
            bound, tier = tolerance.rounding(rough, y, dtype), "gpu-bf16"
        tolerance.check(tier, name, x, y, bound)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_fp64(case):
    geometry = case.geometry()
    length = max(geometry.lo.shape[1] - 127, max(end for row in geometry.documents for _, end in row))
    geometry = on_gpu(geometry)
    plan = make_plan(geometry, case)
    arguments = inputs(case, geometry.batch, length)
    elements = plan.element_mask()[:, :, :length, :length]
    seen = elements.any(-1).repeat_interleave(case.heads // elements.shape[1], 1)
    arguments = (*arguments[:4], arguments[4] * seen)
    leaves = [x.clone().requires_grad_() for x in arguments[:3]]
    out, lse = attend(*leaves, plan, impl="triton")
    grads = torch.autograd.grad((out, lse), leaves, arguments[3:])
    again, _ = attend(*leaves, plan, impl="triton")
    check((out, lse, *grads), arguments, lambda b, h: elements[b, h * elements.shape[1] // case.heads])
    assert torch.equal(out, again)
    assert (grads[0][~seen] == 0).all()
    if elements.shape[1] == 1:
        nobody_sees = ~elements.any(2)[..., None]
        assert not (grads[1] * nobody_sees).any() and not (grads[2] * nobody_sees).any()


def test_gradients_repeat_bit_for_bit():
    case = Case("", None, 8, 2, 128, "bfloat16", 8, 2, 0.3)
    plan = make_plan(on_gpu(causal(8192)), case)
    q, k, v, dout, dlse = inputs(case, 1, 8192)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    first = None
    for _ in range(5):
        grads = torch.autograd.grad(attend(*leaves, plan, impl="triton"), leaves, (dout, dlse))
        first = first or grads
        assert all(torch.equal(x, y) for x, y in zip(grads, first, strict=True))


def test_sources_equal_one_source():
    """Ring steps carry (out, lse) without loss: 1 and 4 sources agree to fp32 rounding."""
    from sparring.kernels import triton_steps

    case = Case("", None, 8, 2, 128, "bfloat16", 2, 0, 0.5)
    plan = make_plan(on_gpu(causal(4096)), case)
    q, k, v, dout, dlse = inputs(case, 1, 4096)
    results = []
    for sources in (1, 4):
        key_blocks = tuple(tuple(range(s, 32, sources)) for s in range(sources))
        bound = bind(plan, key_blocks)
        out, lse = torch.zeros_like(q).float(), torch.full(q.shape[:3], -torch.inf, device="cuda")
        grads = [torch.zeros_like(x).float() for x in (q, k, v)]
        held = [torch.cat([torch.arange(b * 128, b * 128 + 128) for b in blocks]) for blocks in key_blocks]
        for source, tokens in enumerate(held):
            part = [x[:, :, tokens].contiguous() for x in (k, v)]
            triton_steps.forward_step(q, *part, bound, source, out, lse, 0.1)
        delta = (out * dout).sum(-1) - dlse
        for source, tokens in enumerate(held):
            part = [x[:, :, tokens].contiguous() for x in (k, v)]
            sums = [torch.zeros_like(x).float() for x in part]
            triton_steps.backward_step(q, *part, dout, lse, delta, bound, source, grads[0], *sums, 0.1)
            grads[1][:, :, tokens], grads[2][:, :, tokens] = sums
        results.append((out, lse, *grads))
    for name, x, y in zip(NAMES, *results, strict=True):
        # The lse of the two differ by fp32 rounding, so a factor that is rounded to bf16 (P, dS) may fall
        # on the other side: one unit in its last place, eps of its value.
        bound = FP32 if name == "lse" else torch.finfo(torch.bfloat16).eps
        assert oracle.relative_error(x, y) <= bound, name


def test_no_synchronisation_with_the_host():
    """attend forward and backward, binding included, never wait for the GPU."""
    case = Case("", None, 8, 2, 64, "bfloat16", 8, 2, 0.3)
    plan = make_plan(on_gpu(causal(4000)), case)
    q, k, v, dout, dlse = inputs(case, 1, 4000)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def step():
        out, lse = attend(*leaves, plan, impl="triton")
        return torch.autograd.grad((out, lse), leaves, (dout, dlse))

    expected = step()  # compiles, and fills what the geometry caches
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        grads = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(x, y) for x, y in zip(grads, expected, strict=True))


@machine.needs("100 GiB of gpu memory")
def test_more_than_2_to_the_31_elements():
    """512k tokens x 33 heads x 128: offsets need 64 bits. The last blocks of some heads are checked."""
    from sparring.kernels import triton_steps

    heads, length, dim = 33, 2**19, 128
    torch.cuda.empty_cache()  # needs 90 GiB
    assert heads * length * dim > 2**31
    geometry = Geometry.causal(1, length, device="cuda")
    block = torch.arange(length // 128, device="cuda")
    difference = block[:, None] - block
    plan = Plan.build(geometry, ((difference == 0) | (difference == 1))[None, None])
    bound = bind(plan, (geometry.blocks,))
    g = torch.Generator("cuda").manual_seed(0)
    shape = (1, heads, length, dim)
    q, k, v, dout = (torch.randn(shape, generator=g, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    dlse = torch.randn(shape[:3], generator=g, device="cuda")
    out, lse = torch.zeros(shape, device="cuda"), torch.full(shape[:3], -torch.inf, device="cuda")
    triton_steps.forward_step(q, k, v, bound, 0, out, lse, dim**-0.5)
    delta = torch.stack([(out[0, h] * dout[0, h]).sum(-1) for h in range(heads)])[None] - dlse
    dq, dk, dv = (torch.zeros(shape, device="cuda") for _ in range(3))
    triton_steps.backward_step(q, k, v, dout, lse, delta, bound, 0, dq, dk, dv, dim**-0.5)
    rows = torch.arange(256, device="cuda")[:, None]
    keys = torch.arange(384, device="cuda")[None]
    # The last two blocks of queries against the last three of keys; only the last block of keys is
    # seen by these queries alone, so its gradients are complete.
    mask = (keys <= rows + 128) & (keys // 128 >= rows // 128)
    for head in (0, heads // 2, heads - 1):
        part = slice(head, head + 1)
        queries = [x[:, part, -256:] for x in (q, dout, dlse)]
        keys_values = [x[:, part, -384:] for x in (k, v)]
        arguments = (queries[0], *keys_values, *queries[1:])
        expected = dense(*arguments, lambda b, h: mask, torch.float64)
        low = dense(*arguments, lambda b, h: mask, torch.float32, torch.bfloat16)
        actual = [x[:, part, -256:] for x in (out, lse, dq)] + [x[:, part, -384:] for x in (dk, dv)]
        for name, x, y, rough in zip(NAMES, actual, expected, low, strict=True):
            x, y, rough = (z[:, :, -128:] for z in (x, y, rough))
            bound = 2 * oracle.max_error(rough, y) + FP32 * float(y.abs().max())
            assert oracle.max_error(x, y) <= bound, (head, name)

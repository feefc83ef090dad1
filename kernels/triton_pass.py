"""One pass over the class vectors: attention whose keys and values are both W, in Triton.

A program has a block of rows of one side, student or teacher, and walks one split of W's tiles with
an online softmax: of each row it keeps the largest logit m, the sum of exponentials, and the sum
of w weighted by these, O. What the splits found is joined where it is used, row by row. Letters are
those of `reference`, and S splits.
"""

# Tuples that grow are what Triton has of lists.
# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.triton_unit import LOWEST

__all__ = ["Parts", "join", "ready", "traverse"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Blocks(NamedTuple):
    """How a program cuts its work."""

    rows: int
    classes: int  # a tile of W
    chunk: int  # of D
    warps: int
    stages: int  # tiles of W in shared memory


def blocks(D: int, dtype: torch.dtype) -> Blocks:
    """For a multiprocessor of an H100: reckoned, and compiled, but not yet timed.

    64 rows are wgmma's least, and O of 64 x 768 in fp32 takes 192 of the 255 registers that each of
    256 threads has; wider features get 32 rows. The 227 KB of shared memory hold the rows (96 KB of
    bf16 at D = 768) and two tiles of W, one being read while the other is multiplied. tf32x3 splits
    its operands in registers, so fp32 has few rows.
    """
    chunk = min((256, 128, 64), key=lambda chunk: (-D % chunk, -chunk))
    stages = 2 if D <= 1024 else 1
    if dtype == torch.float32:
        return Blocks(16, 16, min(chunk, 128), 8, stages)
    if D <= 512:
        return Blocks(64, 64, chunk, 8, stages)
    return Blocks(64 if D <= 768 else 32 if D <= 1024 else 16, 32, chunk, 8, stages)


@functools.cache
def splits(programs: int, tiles: int, multiprocessors: int) -> int:
    """Into how many parts to cut W, each walked by `programs`: those that take least time, if a
    multiprocessor runs one program at once, and joining a part takes about as long as a tile.
    There are at most about two programs a multiprocessor, which bounds the memory of O, [S, B, D].
    """

    def rounds(parts: int) -> int:
        return -(-programs * parts // multiprocessors) * -(-tiles // parts) + parts

    return min(range(1, min(tiles, -(-2 * multiprocessors // programs)) + 1), key=rounds)


@triton.jit
def _pass(
    x_ptr,
    u_ptr,
    w_desc,
    stats_ptr,
    top_ptr,
    o_ptr,
    scale,
    teacher_scale,
    B,
    N,
    tiles_of_a_split,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    EXPECTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows of a split: m, sum and rounded sum of 2^(z - m), top class, and O if EXPECTED.

    z are logits over ln 2. Programs of the same split run together, to find its tiles in the L2.
    """
    side, split = tl.program_id(1), tl.program_id(2)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, CHUNK)
    if side == 0:
        own_ptr, a = x_ptr, scale
    else:
        own_ptr, a = u_ptr, teacher_scale
    x, o = (), ()
    squares = tl.zeros([ROWS], tl.float32)
    for c in tl.static_range(CHUNKS):
        inside = (row < B)[:, None] & (c * CHUNK + d < D)[None, :]
        piece = tl.load(own_ptr + row[:, None] * D + c * CHUNK + d[None, :], mask=inside, other=0.0)
        squares += tl.sum(piece.to(tl.float32) * piece.to(tl.float32), 1)
        x = x + (piece,)
        if EXPECTED:
            o = o + (tl.zeros([ROWS, CHUNK], tl.float32),)
    a = a * LOG2E / tl.maximum(tl.sqrt(squares), 1e-12)
    m = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    rounded = tl.zeros([ROWS], tl.float32)
    top = tl.zeros([ROWS], tl.int32)

    begin = split * tiles_of_a_split * CLASSES
    end = tl.minimum(begin + tiles_of_a_split * CLASSES, N)
    for first in range(begin, end, CLASSES):
        n = first + tl.arange(0, CLASSES)
        w = ()
        z = tl.zeros([ROWS, CLASSES], tl.float32)
        for c in tl.static_range(CHUNKS):
            w = w + (w_desc.load([first, c * CHUNK]),)
            z = tl.dot(x[c], w[c].T, z, input_precision=PRECISION)
        z = tl.where((n < N)[None, :], z * a[:, None], float("-inf"))
        peak = tl.max(z, 1)
        its_class = tl.min(tl.where(z == peak[:, None], n[None, :], N), 1)
        top = tl.where(peak > m, its_class, top)
        higher = tl.maximum(m, peak)
        shrink = tl.exp2(m - higher)
        m = higher
        p = tl.exp2(z - m[:, None])
        total = total * shrink + tl.sum(p, 1)
        if EXPECTED:
            # The weights of O are p as the tensor cores take it, and are to sum to 1.
            p_rounded = p.to(w_desc.dtype)
            rounded = rounded * shrink + tl.sum(p_rounded.to(tl.float32), 1)
            further = ()
            for c in tl.static_range(CHUNKS):
                part = tl.dot(p_rounded, w[c], o[c] * shrink[:, None], input_precision=PRECISION)
                further = further + (part,)
            o = further

    at = side * tl.num_programs(2) + split
    stats_ptr += at * 3 * B
    tl.store(stats_ptr + row, m, mask=row < B)
    tl.store(stats_ptr + B + row, total, mask=row < B)
    tl.store(stats_ptr + 2 * B + row, rounded, mask=row < B)
    tl.store(top_ptr + at * B + row, top, mask=row < B)
    if EXPECTED:
        place = (at * B + row)[:, None] * D
        for c in tl.static_range(CHUNKS):
            inside = (row < B)[:, None] & (c * CHUNK + d < D)[None, :]
            tl.store(o_ptr + place + c * CHUNK + d[None, :], o[c], mask=inside)


@triton.jit
def join(stats_ptr, top_ptr, o_ptr, row, d, B, D, S, PARTS: tl.constexpr, EXPECTED: tl.constexpr):
    """A row of one side, of all splits: O, LSE in nats, and the top class."""
    part = tl.arange(0, PARTS)
    stats_ptr += part * 3 * B + row
    m = tl.load(stats_ptr, mask=part < S, other=LOWEST)
    m_all = tl.max(m, 0)
    share = tl.exp2(m - m_all)
    total = tl.sum(share * tl.load(stats_ptr + B, mask=part < S, other=0.0), 0)
    lse = (m_all + tl.log2(total)) * LN2
    best = tl.min(tl.where(m == m_all, part, S - 1), 0)
    top = tl.load(top_ptr + best * B + row).to(tl.int64)
    o = tl.zeros_like(d).to(tl.float32)
    if EXPECTED:
        rounded = tl.sum(share * tl.load(stats_ptr + 2 * B, mask=part < S, other=0.0), 0)
        for s in range(S):
            its_share = tl.sum(tl.where(part == s, share, 0.0), 0)
            o += its_share * tl.load(o_ptr + (s * B + row) * D + d, mask=d < D, other=0.0)
        o = o / rounded
    return o, lse, top


class Parts(NamedTuple):
    """What the splits of one side found."""

    stats_S3B: Tensor  # m, the sum of 2^(z - m), and the same as O's weights have it
    top_SB: Tensor
    o_SBD: Tensor


def traverse(sides: list[tuple[Tensor, float]], w_ND: Tensor, expected: bool) -> list[Parts]:
    """One launch for one or two sides, each its rows and its scale."""
    (x_BD, scale), (u_BD, teacher_scale) = sides[0], sides[-1]
    (B, D), N = x_BD.shape, len(w_ND)
    cut = blocks(D, w_ND.dtype)
    tiles = -(-N // cut.classes)
    row_blocks = -(-B // cut.rows)
    tiles_of_a_split = -(-tiles // splits(row_blocks * len(sides), tiles, _multiprocessors(x_BD)))
    S = -(-tiles // tiles_of_a_split)
    stats = x_BD.new_empty(len(sides), S, 3, B, dtype=torch.float32)
    tops = x_BD.new_empty(len(sides), S, B, dtype=torch.int32)
    o = x_BD.new_empty(len(sides), S if expected else 0, B, D, dtype=torch.float32)
    _pass[row_blocks, len(sides), S](
        x_BD,
        u_BD,
        TensorDescriptor.from_tensor(w_ND, [cut.classes, cut.chunk]),
        stats,
        tops,
        o,
        scale,
        teacher_scale,
        B,
        N,
        tiles_of_a_split,
        D=D,
        ROWS=cut.rows,
        CLASSES=cut.classes,
        CHUNK=cut.chunk,
        CHUNKS=-(-D // cut.chunk),
        EXPECTED=expected,
        PRECISION="tf32x3" if w_ND.dtype == torch.float32 else None,
        num_warps=cut.warps,
        num_stages=cut.stages,
        enable_fp_fusion=False,  # the same bits with and without O
    )
    return [Parts(*part) for part in zip(stats, tops, o, strict=True)]


def ready(w_ND: Tensor, *rows_BD: Tensor) -> list[Tensor]:
    """W so that it is read by bulk tensor copies, whose rows start at multiples of 16 bytes, and
    rows in its dtype."""
    if w_ND.is_cpu and w_ND.dtype == torch.bfloat16:
        w_ND = w_ND.float()  # Triton's interpreter would multiply the bits
    step = 16 // w_ND.element_size()
    if w_ND.stride(1) != 1 or w_ND.stride(0) % step or w_ND.data_ptr() % 16:
        N, D = w_ND.shape
        copy_ND = w_ND.new_empty(N, D + -D % step)[:, :D]
        w_ND = copy_ND.copy_(w_ND)
    return [w_ND, *(x_BD.to(w_ND.dtype).contiguous() for x_BD in rows_BD)]


def _multiprocessors(x: Tensor) -> int:
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 8

"""Attention on TPUs: one Pallas kernel for the forward pass, one for the backward pass.

Neither writes scores to memory. Both hold them as (keys, queries), so that the statistics of a
query are rows along the lanes. The backward kernel keeps dq of all queries of a head in VMEM while
the keys pass by, so that it computes the scores once and makes five matmuls of a block, where
separate kernels for dq and for dk and dv need seven. That is possible because Perceiver AR has few
queries; `takes` says how many. Away from TPUs the kernels are interpreted: exact, and slow.

Source: FlashAttention (arXiv 2205.14135), algorithms 1 and 4.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from perceiver_ar_jax.config import PerceiverARConfig
from perceiver_ar_jax.model.attention.fused import fused
from perceiver_ar_jax.model.attention.visibility import LEAST_SUM, MASK_VALUE, Visibility
from perceiver_ar_jax.parallel import platform_in_use
from perceiver_ar_jax.parallel.sharding import device_kind_in_use

LANES = 128
HIDDEN_KEY = -(2**31)  # the segment of keys that no query sees

# Contractions of (keys, H) with (queries, H), and of (keys, H) with (keys, queries).
BY_CHANNEL = (((1,), (1,)), ((), ()))
BY_KEY = (((0,), (0,)), ((), ()))


class Blocks(NamedTuple):
    """How many queries and keys a kernel takes at a time, both multiples of 128."""

    queries: int
    keys: int


# The largest blocks of each pass; an array that is shorter is one block. A (keys, queries) tile of
# float32 scores takes 4 bytes per pair; the backward pass holds about four of each head in a turn.
FORWARD_BLOCKS = Blocks(512, 1024)
BACKWARD_BLOCKS = Blocks(512, 512)


def takes(config: PerceiverARConfig, *, num_queries: int, has_segments: bool) -> bool:
    """Whether dq of one head fits into the VMEM of every chip, beside the blocks."""
    return _round_up(num_queries, LANES) * _round_up(config.head_dim, LANES) <= 4096 * 128


def forward(
    q_BLNH: jax.Array, k_BKNH: jax.Array, v_BKNH: jax.Array, visibility: Visibility
) -> tuple[jax.Array, jax.Array]:
    """Output (B, L, N, H) and log-sum-exp (B, N, L), on one device."""
    call = _Call.of(q_BLNH, k_BKNH, visibility, FORWARD_BLOCKS)
    arrays = call.queries_and_keys(q_BLNH, k_BKNH, v_BKNH) + call.ids(visibility)
    # Keys are the innermost loop: the sums over them stay in VMEM.
    specs = _Specs(call, query_axis=2, key_axis=3)
    out_BLD, lse_BN1L = pl.pallas_call(
        functools.partial(_forward_kernel, call=call),
        name="attention_forward",
        grid=(*call.shape_BN, call.query_blocks, call.key_blocks),
        in_specs=[specs.queries, specs.keys, specs.keys, *specs.ids],
        out_specs=[specs.queries, specs.statistics],
        out_shape=[
            call.like_queries(q_BLNH.dtype),
            jax.ShapeDtypeStruct((call.batch, call.heads, 1, call.padded_queries), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((call.together, 1, call.blocks.queries), jnp.float32),
            pltpu.VMEM((call.together, 1, call.blocks.queries), jnp.float32),
            pltpu.VMEM((call.columns, call.blocks.queries), jnp.float32),
        ],
        compiler_params=_compiler_params("parallel", "arbitrary"),
        cost_estimate=call.cost(
            matmuls=2, query_arrays=2, key_arrays=2 * call.query_blocks, dtype=q_BLNH.dtype
        ),
        interpret=call.interpret,
    )(*arrays)
    return call.unpadded(out_BLD, q_BLNH), lse_BN1L[:, :, 0, : call.num_queries]


def backward(
    q_BLNH: jax.Array,
    k_BKNH: jax.Array,
    v_BKNH: jax.Array,
    visibility: Visibility,
    out_BLNH: jax.Array,
    lse_BNL: jax.Array,
    dout_BLNH: jax.Array,
    dlse_BNL: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of queries, keys and values, on one device."""
    call = _Call.of(q_BLNH, k_BKNH, visibility, BACKWARD_BLOCKS)
    # What the softmax subtracts from the gradient of each score of a query.
    sums_BLN = (dout_BLNH.astype(jnp.float32) * out_BLNH.astype(jnp.float32)).sum(-1)
    sums_BNL = jnp.swapaxes(sums_BLN, 1, 2)
    if dlse_BNL is not None:
        sums_BNL -= dlse_BNL
    arrays = call.queries_and_keys(q_BLNH, k_BKNH, v_BKNH)
    arrays += [call.padded_query_rows(dout_BLNH)]
    arrays += [call.padded_statistics(x_BNL) for x_BNL in (lse_BNL, sums_BNL)]
    arrays += call.ids(visibility)
    specs = _Specs(call, query_axis=3, key_axis=2)
    f32 = functools.partial(pltpu.VMEM, dtype=jnp.float32)
    shape_KD = call.blocks.keys, call.columns
    dq_BLD, dk_BKD, dv_BKD = pl.pallas_call(
        functools.partial(_backward_kernel, call=call),
        name="attention_backward",
        grid=(*call.shape_BN, call.key_blocks, call.query_blocks),
        in_specs=[
            specs.queries,
            specs.keys,
            specs.keys,
            specs.queries,
            specs.statistics,
            specs.statistics,
            *specs.ids,
        ],
        out_specs=[specs.all_queries, specs.keys, specs.keys],
        out_shape=[
            call.like_queries(q_BLNH.dtype),
            call.like_keys(k_BKNH.dtype),
            call.like_keys(v_BKNH.dtype),
        ],
        scratch_shapes=[
            f32((call.query_blocks, call.columns, call.blocks.queries)),
            f32(shape_KD),
            f32(shape_KD),
        ],
        compiler_params=_compiler_params("arbitrary", "arbitrary"),
        cost_estimate=call.cost(
            matmuls=5,
            query_arrays=1 + 2 * (call.key_blocks if call.query_blocks > 1 else 1),
            key_arrays=4,
            dtype=q_BLNH.dtype,
        ),
        interpret=call.interpret,
    )(*arrays)
    return (
        call.unpadded(dq_BLD, q_BLNH),
        call.unpadded(dk_BKD, k_BKNH),
        call.unpadded(dv_BKD, v_BKNH),
    )


attend = fused(forward, backward)


def _forward_kernel(q_ref, k_ref, v_ref, *refs, call):
    *ids, out_ref, lse_ref, max_ref, sum_ref, out_DL_ref = refs
    query_block, key_block = pl.program_id(2), pl.program_id(3)

    @pl.when(key_block == 0)
    def _():
        # As `largest_visible`: a query that sees no key has exponentials of 0.
        max_ref[...] = jnp.full_like(max_ref, MASK_VALUE / 2)
        sum_ref[...] = jnp.zeros_like(sum_ref)
        out_DL_ref[...] = jnp.zeros_like(out_DL_ref)

    def attend(on_diagonal):
        strips = call.strips(on_diagonal)
        # All scores first: the compiler keeps to the order, and so overlaps the strips' work.
        scores = [call.scores(q_ref, k_ref, ids, strip, on_diagonal) for strip in strips]
        for (head, columns, queries, keys), scores_KL in zip(strips, scores, strict=True):
            old_max_1L = max_ref[head, :, queries]
            max_1L = jnp.maximum(old_max_1L, scores_KL.max(axis=0, keepdims=True))
            shrink_1L = jnp.exp(old_max_1L - max_1L)
            exp_KL = jnp.exp(scores_KL - max_1L)
            max_ref[head, :, queries] = max_1L
            sum_1L = exp_KL.sum(axis=0, keepdims=True)
            sum_ref[head, :, queries] = shrink_1L * sum_ref[head, :, queries] + sum_1L
            v_KH = v_ref[keys, columns]
            out_HL = _dot(v_KH, exp_KL.astype(v_KH.dtype), BY_KEY)
            out_DL_ref[columns, queries] = shrink_1L * out_DL_ref[columns, queries] + out_HL

    call.run_where_visible(attend, query_block, key_block)

    @pl.when(key_block == call.key_blocks - 1)
    def _():
        sum_N1L = jnp.maximum(sum_ref[...], LEAST_SUM)
        lse_ref[...] = max_ref[...] + jnp.log(sum_N1L)
        for head in range(call.together):
            columns = call.columns_of(head)
            out_LH = (out_DL_ref[columns] / sum_N1L[head]).T
            out_ref[:, columns] = out_LH.astype(out_ref.dtype)


def _backward_kernel(q_ref, k_ref, v_ref, dout_ref, lse_ref, sums_ref, *refs, call):
    *ids, dq_ref, dk_ref, dv_ref, dq_XDL_ref, dk_KD_ref, dv_KD_ref = refs
    key_block, query_block = pl.program_id(2), pl.program_id(3)

    @pl.when(query_block == 0)
    def _():
        dk_KD_ref[...] = jnp.zeros_like(dk_KD_ref)
        dv_KD_ref[...] = jnp.zeros_like(dv_KD_ref)

    @pl.when(key_block == 0)
    def _():
        dq_XDL_ref[query_block] = jnp.zeros(dq_XDL_ref.shape[1:], jnp.float32)

    def differentiate(on_diagonal):
        strips = call.strips(on_diagonal)
        products = [
            (
                call.scores(q_ref, k_ref, ids, strip, on_diagonal),
                _dot(
                    v_ref[strip.keys, strip.columns],
                    dout_ref[strip.queries, strip.columns],
                    BY_CHANNEL,
                ),
            )
            for strip in strips
        ]
        for strip, (scores_KL, dweights_KL) in zip(strips, products, strict=True):
            head, columns, queries, keys = strip
            weights_KL = jnp.exp(scores_KL - lse_ref[head, :, queries])
            q_LH, dout_LH = q_ref[queries, columns], dout_ref[queries, columns]
            dv_KD_ref[keys, columns] += jnp.dot(
                weights_KL.astype(dout_LH.dtype), dout_LH, preferred_element_type=jnp.float32
            )
            dscores_KL = weights_KL * (dweights_KL - sums_ref[head, :, queries])
            dscores_KL = dscores_KL.astype(q_LH.dtype)
            dk_KH = jnp.dot(dscores_KL, q_LH, preferred_element_type=jnp.float32)
            dk_KD_ref[keys, columns] += dk_KH
            dq_HL = _dot(k_ref[keys, columns], dscores_KL, BY_KEY)
            dq_XDL_ref[query_block, columns, queries] += dq_HL

    call.run_where_visible(differentiate, query_block, key_block)

    @pl.when(query_block == call.query_blocks - 1)
    def _():
        dk_ref[...] = dk_KD_ref[...].astype(dk_ref.dtype)
        dv_ref[...] = dv_KD_ref[...].astype(dv_ref.dtype)

    @pl.when(key_block == call.key_blocks - 1)
    def _():
        size = call.blocks.queries
        rows = pl.ds(pl.multiple_of(query_block * size, size), size)
        dq_ref[rows, :] = dq_XDL_ref[query_block].T.astype(dq_ref.dtype)


class _Call(NamedTuple):
    """The sizes of one call, and how arrays are laid out for it: (B, rows, D), both padded.

    A head's channels are a column of D, as wide as the lanes, so that heads stay where projections
    leave them and nothing is transposed.
    """

    batch: int
    heads: int
    num_queries: int
    num_keys: int
    head_width: int
    together: int  # heads of one turn of the grid
    blocks: Blocks
    causal: bool
    has_hidden_keys: bool
    has_segments: bool
    interpret: bool

    @classmethod
    def of(cls, q_BLNH, k_BKNH, visibility, largest):
        batch, num_queries, heads, head_width = q_BLNH.shape
        num_keys = k_BKNH.shape[1]
        if visibility.causal:  # as many queries as keys; square blocks have one diagonal
            largest = Blocks(min(largest), min(largest))
        blocks = Blocks(_block(num_queries, largest.queries), _block(num_keys, largest.keys))
        return cls(
            batch,
            heads,
            num_queries,
            num_keys,
            head_width,
            2 if _pairs_heads(heads, head_width, num_queries) else 1,
            blocks,
            visibility.causal,
            # The causal mask hides the keys that pad the last block.
            visibility.pad_mask_BK is not None
            or (num_keys % blocks.keys > 0 and not visibility.causal),
            visibility.segment_ids_BK is not None,
            platform_in_use() != "tpu",
        )

    @property
    def width(self):
        return _round_up(self.head_width, LANES)

    @property
    def columns(self):
        return self.together * self.width

    @property
    def shape_BN(self):
        return self.batch, self.heads // self.together

    def columns_of(self, head):
        """Of those heads that one turn of the grid takes."""
        return slice(head * self.width, (head + 1) * self.width)

    @property
    def padded_queries(self):
        return _round_up(self.num_queries, self.blocks.queries)

    @property
    def padded_keys(self):
        return _round_up(self.num_keys, self.blocks.keys)

    @property
    def query_blocks(self):
        return self.padded_queries // self.blocks.queries

    @property
    def key_blocks(self):
        return self.padded_keys // self.blocks.keys

    def like_queries(self, dtype):
        shape_BLD = self.batch, self.padded_queries, self.heads * self.width
        return jax.ShapeDtypeStruct(shape_BLD, dtype)

    def like_keys(self, dtype):
        shape_BKD = self.batch, self.padded_keys, self.heads * self.width
        return jax.ShapeDtypeStruct(shape_BKD, dtype)

    def queries_and_keys(self, q_BLNH, k_BKNH, v_BKNH):
        k_BKD, v_BKD = (self._padded(x_BKNH, self.padded_keys) for x_BKNH in (k_BKNH, v_BKNH))
        return [self.padded_query_rows(q_BLNH), k_BKD, v_BKD]

    def padded_query_rows(self, x_BLNH):
        return self._padded(x_BLNH, self.padded_queries)

    def padded_statistics(self, x_BNL):
        rows = self.padded_queries - self.num_queries
        return jnp.pad(x_BNL, ((0, 0), (0, 0), (0, rows)))[:, :, None]

    def unpadded(self, x_BLD, like_BLNH):
        x_BLNH = x_BLD.reshape(*x_BLD.shape[:2], self.heads, self.width)
        return x_BLNH[:, : like_BLNH.shape[1], :, : self.head_width]

    def _padded(self, x_BLNH, num_rows):
        rows, channels = num_rows - x_BLNH.shape[1], self.width - self.head_width
        x_BLNH = jnp.pad(x_BLNH, ((0, 0), (0, rows), (0, 0), (0, channels)))
        return x_BLNH.reshape(self.batch, num_rows, self.heads * self.width)

    def ids(self, visibility):
        """Segments of keys and of queries, (B, 1, ·), as far as something is hidden by them."""
        if not (self.has_hidden_keys or self.has_segments):
            return []
        ids_BK, pad_mask_BK = visibility.segment_ids_BK, visibility.pad_mask_BK
        if ids_BK is None:
            ids_BK = jnp.zeros((self.batch, self.num_keys), jnp.int32)
        if pad_mask_BK is not None:
            ids_BK = jnp.where(pad_mask_BK, HIDDEN_KEY, ids_BK)
        rows = self.padded_keys - self.num_keys
        ids_BK = jnp.pad(ids_BK, ((0, 0), (0, rows)), constant_values=HIDDEN_KEY)
        if not self.has_segments:
            return [ids_BK[:, None]]
        rows = self.padded_queries - self.num_queries
        return [ids_BK[:, None], jnp.pad(visibility.segment_ids_BL, ((0, 0), (0, rows)))[:, None]]

    def run_where_visible(self, function, query_block, key_block):
        """Calls function(on_diagonal), unless causality hides all keys of a block."""
        if not self.causal:
            function(False)
            return
        pl.when(key_block < query_block)(functools.partial(function, False))
        pl.when(key_block == query_block)(functools.partial(function, True))

    def strips(self, on_diagonal):
        """A block of queries of each head, with the keys that causality lets it see.

        On the diagonal, strips of 128 queries leave out 6 of the 16 tiles of a block of 512. They
        are as wide as a head: with heads of 256, narrower ones would take longer on v6e.
        """
        size = self.width if on_diagonal else self.blocks.queries
        strips = []
        for head in range(self.together):
            for start in range(0, self.blocks.queries, size):
                end = min(start + size, self.blocks.queries)
                keys = slice(0, end if on_diagonal else self.blocks.keys)
                strips.append(_Strip(head, self.columns_of(head), slice(start, end), keys))
        return strips

    def scores(self, q_ref, k_ref, ids, strip, on_diagonal):
        """Scores of a strip, MASK_VALUE at keys that are hidden."""
        _, columns, queries, keys = strip
        scores_KL = _dot(k_ref[keys, columns], q_ref[queries, columns], BY_CHANNEL)
        visible_KL = None
        if on_diagonal:
            query_KL = queries.start + jax.lax.broadcasted_iota(jnp.int32, scores_KL.shape, 1)
            visible_KL = jax.lax.broadcasted_iota(jnp.int32, scores_KL.shape, 0) <= query_KL
        if ids:
            # Made a column before it is cut, so that the strips share it.
            key_ids_K1 = jnp.expand_dims(ids[0][0], -1)[keys]
            if self.has_segments:
                same_KL = key_ids_K1 == ids[1][:, queries]
            else:
                same_KL = key_ids_K1 != HIDDEN_KEY
            visible_KL = same_KL if visible_KL is None else visible_KL & same_KL
        return scores_KL if visible_KL is None else jnp.where(visible_KL, scores_KL, MASK_VALUE)

    def cost(self, *, matmuls, query_arrays, key_arrays, dtype):
        """What the compiler's scheduler and tools/compile_ahead.py know of a call's time.

        Args:
          matmuls: over all pairs of queries and keys.
          query_arrays: how many times arrays of (queries, H) travel between HBM and VMEM.
          key_arrays: the same of (keys, H).
          dtype: of these arrays.
        """
        count = lambda on_diagonal: sum(
            strip.keys.stop * (strip.queries.stop - strip.queries.start)
            for strip in self.strips(on_diagonal)
        )
        blocks = self.query_blocks
        if self.causal:
            pairs = blocks * count(True) + blocks * (blocks - 1) // 2 * count(False)
        else:
            pairs = blocks * self.key_blocks * count(False)
        heads = self.batch * self.heads
        pairs *= heads // self.together
        rows = heads * (query_arrays * self.padded_queries + key_arrays * self.padded_keys)
        return pl.CostEstimate(
            flops=2 * matmuls * pairs * self.width,
            transcendentals=pairs,
            bytes_accessed=rows * self.width * jnp.dtype(dtype).itemsize,
        )


class _Strip(NamedTuple):
    """Queries of one head and the keys that they see, within a block."""

    head: int
    columns: slice  # the head's
    queries: slice
    keys: slice


class _Specs:
    """Blocks of the arrays of a call whose grid is (B, N or half of it, ·, ·)."""

    def __init__(self, call, *, query_axis, key_axis):
        size, width = call.blocks, call.columns
        queries = lambda *grid: (grid[0], grid[query_axis], grid[1])
        keys = lambda *grid: (grid[0], grid[key_axis], grid[1])
        self.queries = pl.BlockSpec((None, size.queries, width), queries)
        self.keys = pl.BlockSpec((None, size.keys, width), keys)
        self.all_queries = pl.BlockSpec(
            (None, call.padded_queries, width), lambda b, n, *_: (b, 0, n)
        )
        self.statistics = pl.BlockSpec(
            (None, call.together, 1, size.queries),
            lambda *grid: (grid[0], grid[1], 0, grid[query_axis]),
        )
        self.ids = []
        if call.has_hidden_keys or call.has_segments:
            self.ids.append(
                pl.BlockSpec((None, 1, size.keys), lambda *grid: (grid[0], 0, grid[key_axis]))
            )
        if call.has_segments:
            self.ids.append(
                pl.BlockSpec((None, 1, size.queries), lambda *grid: (grid[0], 0, grid[query_axis]))
            )


def _pairs_heads(heads, head_width, num_queries):
    """Whether a turn of the grid takes two heads: one's matmuls overlap the other's exponentials.

    The limit of queries is for VMEM; v4 alone would need more cycles (docs/performance.md).
    """
    fits = num_queries <= 512 and head_width <= LANES
    return heads % 2 == 0 and fits and device_kind_in_use() != "TPU v4"


def _block(length, largest):
    """The size of the blocks of a length: few of them, and little padding.

    A turn of a kernel's grid costs about as much as 128 rows of a block.
    """

    def cost(size):
        padded = _round_up(length, size)
        return padded + LANES * (padded // size), padded

    return min(range(LANES, min(largest, _round_up(length, LANES)) + 1, LANES), key=cost)


def _round_up(length, multiple):
    return -(-length // multiple) * multiple


def _dot(a, b, dimensions):
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _compiler_params(*inner):
    return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", *inner))

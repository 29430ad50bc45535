"""The kernel of benchmarks/gluon_matmul.py, which says what it is: one program, three partitions, in Gluon.

A program makes 2 * ROWS output features of BLOCK_M tokens. A producer (1 warp) copies steps of 128 k by TMA into a ring
of STAGES buffers; two consumers (4 warps each) take ROWS of the features each: packed words come from shared memory
into registers in the layout of a wgmma's left operand, become bfloat16 there and are multiplied from there, so that
unpacked weights never touch shared memory.

Barriers   full[stage] is complete when the bytes of a step have arrived, empty[stage] when both consumers have let go
           of it. Either is used once in STAGES steps, so step i waits for phase i // STAGES, and tells it from the one
           before by its parity.
Edges      TMA reads zeros past the end of a tensor and writes nothing there. Scales and zeros are one-dimensional to
           it: past the end of a group it reads the next one's, of rows whose results are not written.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from qkernels.kernels.unpack import _MULTIPLY, _PAIR_HALVES, _slot_asm, _slot_constraints

_MULTIPLY_BF16 = gl.constexpr(_MULTIPLY.value["bf16"])
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.7 renamed it


@gluon.jit
def _producer(
    x_desc, packed_desc, scale_desc, zero_desc, x_ring, packed_ring, scale_ring, zero_ring, full, empty, m0, n0, N,
    steps,
    STAGES: gl.constexpr,
    STEP_BYTES: gl.constexpr,
):  # fmt: skip
    for i in range(steps):
        stage = i % STAGES
        # A barrier that nobody has arrived at is in phase 0, and "the phase before" counts as complete: with the
        # opposite parity the first round passes at once.
        mbarrier.wait(empty.index(stage), (i // STAGES & 1) ^ 1)
        mbarrier.expect(full.index(stage), STEP_BYTES)
        tma.async_copy_global_to_shared(packed_desc, [n0, i * 16], full.index(stage), packed_ring.index(stage))
        tma.async_copy_global_to_shared(scale_desc, [i * N + n0], full.index(stage), scale_ring.index(stage))
        tma.async_copy_global_to_shared(zero_desc, [i * N + n0], full.index(stage), zero_ring.index(stage))
        tma.async_copy_global_to_shared(x_desc, [m0, i * 128], full.index(stage), x_ring.index(stage))


@gluon.jit
def _column(ring, stage, PART: gl.constexpr, ROWS: gl.constexpr, OPERAND: gl.constexpr):
    """(ROWS, 1): a consumer's part of a stage's scales or zeros."""
    part = ring.index(stage).slice(PART * ROWS, ROWS, 0).load(gl.SliceLayout(1, OPERAND))
    return gl.expand_dims(part, 1)


@gluon.jit
def _read_step(
    packed_ring, scale_ring, zero_ring, stage, PART: gl.constexpr, ROWS: gl.constexpr, OPERAND: gl.constexpr
):
    """(words (ROWS, 16) with their halves paired, scale (ROWS, 1), zero operand (ROWS, 1)) as unpack.py has them."""
    words = packed_ring.index(stage).slice(PART * ROWS, ROWS, 0).load(OPERAND)
    words = gl.inline_asm_elementwise(_PAIR_HALVES, "=&r,=&r,r,r", [words], dtype=gl.int32, is_pure=True, pack=2)
    zero = _column(zero_ring, stage, PART, ROWS, OPERAND).to(gl.int32)
    zero = (zero | 0xC300).to(gl.uint16).to(gl.bfloat16, bitcast=True)
    return words, _column(scale_ring, stage, PART, ROWS, OPERAND), zero


@gluon.jit
def _weights(words, scale, zero, SLOT: gl.constexpr):
    """(code - zero) * scale of 16 k, (ROWS, 16) bfloat16, rounded once."""
    asm: gl.constexpr = _slot_asm(4, SLOT, "bf16", None)
    constraints: gl.constexpr = _slot_constraints(4, "bf16", None)
    w = gl.inline_asm_elementwise(
        asm, constraints, [words, words, words, zero], dtype=gl.bfloat16, is_pure=True, pack=2
    )
    return gl.inline_asm_elementwise(_MULTIPLY_BF16, "=r,r,r", [w, scale], dtype=gl.bfloat16, is_pure=True, pack=2)


@gluon.jit
def _step(
    acc, before, i, x_ring, packed_ring, scale_ring, zero_ring, full, empty,
    FIRST: gl.constexpr,
    ACROSS: gl.constexpr,
    PART: gl.constexpr,
    ROWS: gl.constexpr,
    STAGES: gl.constexpr,
    OPERAND: gl.constexpr,
):  # fmt: skip
    """Multiply 128 k: while a wgmma runs, the weights of the next are unpacked.

    `before` are the operands of the wgmma in flight: the compiler must not give their registers to others, so they are
    dependencies of the wait that ends it.
    """
    stage = i % STAGES
    mbarrier.wait(full.index(stage), i // STAGES & 1)
    words, scale, zero = _read_step(packed_ring, scale_ring, zero_ring, stage, PART, ROWS, OPERAND)
    x_step = x_ring.index(stage)
    for t in gl.static_range(8):
        w = _weights(words, scale, zero, t)
        x = x_step.slice(t * 16, 16, 1).permute((1, 0))
        acc = warpgroup_mma(w, x, acc, use_acc=not (FIRST and t == 0), is_async=True)
        if t == 7 and not ACROSS:
            acc, before, w = warpgroup_mma_wait(0, deps=[acc, before, w])
        else:
            acc, before = warpgroup_mma_wait(1, deps=[acc, before])
        before = w
        if ACROSS:
            # Only now the last wgmma of the step before has read its x.
            if t == 0 and not FIRST:
                mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES))
    if not ACROSS:
        mbarrier.arrive(empty.index(stage))
    return acc, before


@gluon.jit
def _consumer(
    y_desc, x_ring, packed_ring, scale_ring, zero_ring, done, full, empty, m0, n0, steps,
    PART: gl.constexpr,
    ROWS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    ACROSS: gl.constexpr,
):  # fmt: skip
    # ROWS / 64 tiles of 64 x BLOCK_M, one below the other
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_M, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    acc = gl.zeros([ROWS, BLOCK_M], gl.float32, SUMS)
    before = gl.zeros([ROWS, 16], gl.bfloat16, OPERAND)
    # The first step is peeled. As part of the loop it would begin with sums and operands that no wgmma made, and where
    # one is in flight from step to step ptxas then cannot tell which registers it uses: it warns (C7515) and waits for
    # each wgmma, which is what this kernel is there to avoid.
    acc, before = _step(
        acc, before, 0, x_ring, packed_ring, scale_ring, zero_ring, full, empty, True, ACROSS, PART, ROWS, STAGES,
        OPERAND,
    )  # fmt: skip
    for i in range(1, steps):
        acc, before = _step(
            acc, before, i, x_ring, packed_ring, scale_ring, zero_ring, full, empty, False, ACROSS, PART, ROWS, STAGES,
            OPERAND,
        )  # fmt: skip
    acc = warpgroup_mma_wait(0, deps=[acc])
    # y is token-major, so sums are written transposed into shared memory, and go out by TMA. There is no room for that
    # but where x was: stage PART of its ring, once both consumers have read all of x (every copy into it has landed, as
    # all were waited for).
    mbarrier.arrive(done)
    mbarrier.wait(done, 0)
    y_buffer = x_ring.index(PART)._reinterpret(gl.bfloat16, [BLOCK_M, ROWS], y_desc.layout)
    y_buffer.permute((1, 0)).store(acc.to(gl.bfloat16))
    fence_async_shared()  # TMA is to see what threads have written
    _barrier()
    tma.async_copy_shared_to_global(y_desc, [m0, n0 + PART * ROWS], y_buffer)
    tma.store_wait(0)


@gluon.jit
def matmul_kernel(
    x_desc, packed_desc, scale_desc, zero_desc, y_desc, N, K,
    ROWS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    ACROSS: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    BLOCK_N: gl.constexpr = 2 * ROWS
    n_blocks = gl.cdiv(N, BLOCK_N)
    n0 = gl.program_id(0) % n_blocks * BLOCK_N
    m0 = gl.program_id(0) // n_blocks * BLOCK_M
    steps = K // 128
    gl.assume(steps > 0)

    x_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_M, 128], x_desc.layout)
    packed_ring = gl.allocate_shared_memory(gl.int32, [STAGES, BLOCK_N, 16], packed_desc.layout)
    scale_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BLOCK_N], scale_desc.layout)
    zero_ring = gl.allocate_shared_memory(gl.uint8, [STAGES, BLOCK_N], zero_desc.layout)
    STEP_BYTES: gl.constexpr = BLOCK_M * 256 + BLOCK_N * (64 + 2 + 1)
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(done, count=2)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    gl.warp_specialize(
        [
            (_consumer, (y_desc, x_ring, packed_ring, scale_ring, zero_ring, done, full, empty, m0, n0, steps,
                         0, ROWS, BLOCK_M, STAGES, ACROSS)),
            (_consumer, (y_desc, x_ring, packed_ring, scale_ring, zero_ring, done, full, empty, m0, n0, steps,
                         1, ROWS, BLOCK_M, STAGES, ACROSS)),
            (_producer, (x_desc, packed_desc, scale_desc, zero_desc, x_ring, packed_ring, scale_ring, zero_ring,
                         full, empty, m0, n0, N, steps, STAGES, STEP_BYTES)),
        ],
        [4, 1],  # warps of the second and the third
        [240, 24],  # registers of their threads: a producer needs few, and what it leaves goes to the consumers
    )  # fmt: skip


def _descriptor(tensor, block, swizzle_bytes):
    layout = gl.NVMMASharedLayout(
        swizzle_byte_width=swizzle_bytes, element_bitwidth=tensor.element_size() * 8, rank=len(block)
    )
    return TensorDescriptor.from_tensor(tensor, block, layout)


def matmul(x, packed, scale, zero, rows, block_m, stages, across):
    """Launch only: y (M, N) like x (M, K); arguments as gluon_matmul.multiply checks them."""
    (M, K), N = x.shape, packed.shape[0]
    y = x.new_empty(M, N)
    descriptors = (
        _descriptor(x, [block_m, 128], 128),
        _descriptor(packed, [2 * rows, 16], 64),
        _descriptor(scale.view(-1), [2 * rows], 0),
        _descriptor(zero.view(-1), [2 * rows], 0),
        _descriptor(y, [block_m, rows], 128),
    )
    grid = (triton.cdiv(M, block_m) * triton.cdiv(N, 2 * rows),)
    matmul_kernel[grid](*descriptors, N, K, rows, block_m, stages, across, num_warps=4)
    return y

"""Triton kernels of the selective scan: forward, and backward by recomputation from saved states.

A program is a single warp. It scans BLOCK channels of one (sequence, group) from the first step to the last. Its state is
a tile [STATES, BLOCK] in registers: each thread holds all states of its own channel, so the sum over states needs no
exchange between threads. Training has thousands of these programs; splitting the steps would gain nothing.

Letters: b sequences, g groups, l steps, n states, e channels per group, m rows of the result.
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _softplus(x):
    # triton.language has no log1p, and log(1 + e) alone loses all digits of small e: Kahan's formula keeps them. Above 20 the
    # function is the identity, as in torch.
    e = tl.exp(tl.minimum(x, 20.0))
    w = 1.0 + e
    log1p = tl.where(w == 1.0, e, tl.log(w) * (e / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.where(x > 20.0, x, log1p)


@triton.jit
def _step_size(raw, bias, valid, SOFTPLUS: tl.constexpr):
    raw = raw + bias
    if SOFTPLUS:
        raw = _softplus(raw)
    # A step of size 0 leaves the state as it is.
    return tl.where(valid, raw, 0.0)


@triton.jit
def scan_forward(
    u_ptr, delta_ptr, a_ptr, b_ptr, c_ptr, d_ptr, bias_ptr, rows_ptr, num_steps_ptr, y_ptr, starts_ptr,
    first_row, max_steps, num_groups, width, num_states, num_chunks,
    stride_ub, stride_ul, stride_ug,
    stride_db, stride_dl, stride_dg,
    stride_bb, stride_bl, stride_bg,
    stride_cb, stride_cl, stride_cg,
    stride_yb, stride_ym, stride_yg,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, BY_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the output y of each step and the state before each chunk.

    With BY_ROWS only the outputs of steps whose row is at least first_row are written, and each sequence ends after its own
    num_steps. The arrays a (g, e, n), d and bias (g, e), rows (b, g, l), num_steps (b) and starts (b, g, chunk, n, e) are
    contiguous; the others are contiguous in their last dimension.
    """
    block = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    sequence, group = pair // num_groups, pair % num_groups
    n = tl.arange(0, STATES)[:, None]
    e = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    n_ok, e_ok = n < num_states, e < width

    channel = group * width + e
    a = tl.load(a_ptr + channel * num_states + n, mask=n_ok & e_ok, other=0.0).to(tl.float32) * _LOG2_E
    bias = tl.zeros([1, BLOCK], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask=e_ok, other=0.0).to(tl.float32)
    skip = tl.zeros([1, BLOCK], tl.float32)
    if HAS_D:
        skip = tl.load(d_ptr + channel, mask=e_ok, other=0.0).to(tl.float32)

    u_ptr += sequence * stride_ub + group * stride_ug
    delta_ptr += sequence * stride_db + group * stride_dg
    b_ptr += sequence * stride_bb + group * stride_bg
    c_ptr += sequence * stride_cb + group * stride_cg
    y_ptr += sequence * stride_yb + group * stride_yg
    starts_ptr += pair * num_chunks * num_states * width
    num_steps = max_steps
    if BY_ROWS:
        num_steps = tl.load(num_steps_ptr + sequence).to(tl.int32)

    state = tl.zeros([STATES, BLOCK], tl.float32)
    for first in range(0, num_steps, CHUNK):
        start_at = starts_ptr + (first // CHUNK) * num_states * width + n * width + e
        tl.store(start_at, state, mask=n_ok & e_ok)
        for step in range(first, tl.minimum(first + CHUNK, num_steps)):
            u = tl.load(u_ptr + step * stride_ul + e, mask=e_ok, other=0.0).to(tl.float32)
            raw = tl.load(delta_ptr + step * stride_dl + e, mask=e_ok, other=0.0).to(tl.float32)
            b = tl.load(b_ptr + step * stride_bl + n, mask=n_ok, other=0.0).to(tl.float32)
            c = tl.load(c_ptr + step * stride_cl + n, mask=n_ok, other=0.0).to(tl.float32)
            delta = _step_size(raw, bias, True, SOFTPLUS)
            state = tl.exp2(delta * a) * state + (delta * u) * b
            y = tl.sum(c * state, axis=0, keep_dims=True) + skip * u
            row = step
            if BY_ROWS:
                row = tl.load(rows_ptr + pair * max_steps + step).to(tl.int32) - first_row
            tl.store(y_ptr + row * stride_ym + e, y.to(y_ptr.dtype.element_ty), mask=e_ok & (row >= 0))


@triton.jit
def scan_backward(
    dy_ptr, u_ptr, delta_ptr, a_ptr, b_ptr, c_ptr, d_ptr, bias_ptr, rows_ptr, num_steps_ptr, starts_ptr,
    du_ptr, ddelta_ptr, da_ptr, db_ptr, dc_ptr, dd_ptr, dbias_ptr,
    first_row, max_steps, num_groups, width, num_states, num_chunks, num_pairs,
    stride_ub, stride_ul, stride_ug,
    stride_db, stride_dl, stride_dg,
    stride_bb, stride_bl, stride_bg,
    stride_cb, stride_cl, stride_cg,
    stride_yb, stride_ym, stride_yg,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, BY_ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STATES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradients of `scan_forward`, from the last chunk to the first; the strides of y are those of dy.

    The arrays du and ddelta (b, g, l, e) are contiguous. Gradients that are summed over programs are written as float32
    parts, so that they can be added in a fixed order. The parts are da (b g, n, e), dd and dbias (b g, e), db and dc
    (channel block, b g, l, n).
    """
    block = tl.program_id(0)
    pair = tl.program_id(1).to(tl.int64)
    sequence, group = pair // num_groups, pair % num_groups
    n = tl.arange(0, STATES)[:, None]
    e = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    n_ok, e_ok = n < num_states, e < width

    channel = group * width + e
    a = tl.load(a_ptr + channel * num_states + n, mask=n_ok & e_ok, other=0.0).to(tl.float32) * _LOG2_E
    bias = tl.zeros([1, BLOCK], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask=e_ok, other=0.0).to(tl.float32)
    skip = tl.zeros([1, BLOCK], tl.float32)
    if HAS_D:
        skip = tl.load(d_ptr + channel, mask=e_ok, other=0.0).to(tl.float32)

    u_ptr += sequence * stride_ub + group * stride_ug
    delta_ptr += sequence * stride_db + group * stride_dg
    b_ptr += sequence * stride_bb + group * stride_bg
    c_ptr += sequence * stride_cb + group * stride_cg
    dy_ptr += sequence * stride_yb + group * stride_yg
    starts_ptr += pair * num_chunks * num_states * width
    du_ptr += pair * max_steps * width
    ddelta_ptr += pair * max_steps * width
    db_ptr += (block * num_pairs + pair) * max_steps * num_states
    dc_ptr += (block * num_pairs + pair) * max_steps * num_states
    num_steps = max_steps
    if BY_ROWS:
        num_steps = tl.load(num_steps_ptr + sequence).to(tl.int32)
        no_channels = tl.zeros([1, BLOCK], tl.float32)
        no_states = tl.zeros([STATES, 1], tl.float32)
        for step in range(num_steps, max_steps):
            tl.store(du_ptr + step * width + e, no_channels.to(du_ptr.dtype.element_ty), mask=e_ok)
            tl.store(ddelta_ptr + step * width + e, no_channels.to(ddelta_ptr.dtype.element_ty), mask=e_ok)
            tl.store(db_ptr + step * num_states + n, no_states, mask=n_ok)
            tl.store(dc_ptr + step * num_states + n, no_states, mask=n_ok)

    da = tl.zeros([STATES, BLOCK], tl.float32)
    dskip = tl.zeros([1, BLOCK], tl.float32)
    dbias = tl.zeros([1, BLOCK], tl.float32)
    # Gradient of a step's state that flows back from the steps after it.
    carry = tl.zeros([STATES, BLOCK], tl.float32)
    num_own_chunks = tl.cdiv(num_steps, CHUNK)
    for chunk_from_last in range(num_own_chunks):
        chunk = num_own_chunks - 1 - chunk_from_last
        start_at = starts_ptr + chunk * num_states * width + n * width + e
        state = tl.load(start_at, mask=n_ok & e_ok, other=0.0)
        before = ()
        for i in tl.static_range(CHUNK):
            step = chunk * CHUNK + i
            valid = step < num_steps
            u = tl.load(u_ptr + step * stride_ul + e, mask=e_ok & valid, other=0.0).to(tl.float32)
            raw = tl.load(delta_ptr + step * stride_dl + e, mask=e_ok & valid, other=0.0).to(tl.float32)
            b = tl.load(b_ptr + step * stride_bl + n, mask=n_ok & valid, other=0.0).to(tl.float32)
            delta = _step_size(raw, bias, valid, SOFTPLUS)
            before = before + (state,)  # noqa: RUF005  (Triton knows no unpacking)
            state = tl.exp2(delta * a) * state + (delta * u) * b
        for i in tl.static_range(CHUNK):
            step = chunk * CHUNK + CHUNK - 1 - i
            valid = step < num_steps
            u = tl.load(u_ptr + step * stride_ul + e, mask=e_ok & valid, other=0.0).to(tl.float32)
            raw = tl.load(delta_ptr + step * stride_dl + e, mask=e_ok & valid, other=0.0).to(tl.float32)
            b = tl.load(b_ptr + step * stride_bl + n, mask=n_ok & valid, other=0.0).to(tl.float32)
            c = tl.load(c_ptr + step * stride_cl + n, mask=n_ok & valid, other=0.0).to(tl.float32)
            row = step
            if BY_ROWS:
                row = tl.load(rows_ptr + pair * max_steps + step, mask=valid, other=-1).to(tl.int32) - first_row
            dy = tl.load(dy_ptr + row * stride_ym + e, mask=e_ok & valid & (row >= 0), other=0.0).to(tl.float32)

            delta = _step_size(raw, bias, valid, SOFTPLUS)
            grad = carry + c * dy
            dc = tl.sum(state * dy, axis=1, keep_dims=True)
            db = tl.sum(grad * (delta * u), axis=1, keep_dims=True)
            dinput = tl.sum(grad * b, axis=0, keep_dims=True)
            carry = tl.exp2(delta * a) * grad
            state = before[CHUNK - 1 - i]
            dlog = carry * state
            da += dlog * delta
            # The kernel keeps a in units of log 2 because exp2 is faster than exp; the gradient is undone here.
            ddelta = tl.sum(dlog * a, axis=0, keep_dims=True) / _LOG2_E + dinput * u
            if SOFTPLUS:
                ddelta = ddelta * tl.sigmoid(raw + bias)
            dbias += tl.where(valid, ddelta, 0.0)
            dskip += dy * u
            du = dinput * delta + dy * skip
            at = step * width + e
            tl.store(du_ptr + at, du.to(du_ptr.dtype.element_ty), mask=e_ok & valid)
            tl.store(ddelta_ptr + at, ddelta.to(ddelta_ptr.dtype.element_ty), mask=e_ok & valid)
            tl.store(db_ptr + step * num_states + n, db, mask=n_ok & valid)
            tl.store(dc_ptr + step * num_states + n, dc, mask=n_ok & valid)

    tl.store(da_ptr + pair * num_states * width + n * width + e, da, mask=n_ok & e_ok)
    if HAS_D:
        tl.store(dd_ptr + pair * width + e, dskip, mask=e_ok)
    if HAS_BIAS:
        tl.store(dbias_ptr + pair * width + e, dbias, mask=e_ok)

"""Triton kernels of the visit: rows in scan order, causal convolution of four taps and SiLU, for both directions at once.

The interleaved sequence TL_1 T_1 TL_2 T_2 ... is never written to memory. A program walks along it, reads each T from the
map, and computes each TL, the mean of a window, from rows that are still in the GPU's cache.

Letters: b sub-images, g directions, p patches (padded), m = p + 1 rows of the map (tokens, then INS), k rows of the table
[TL (p) | T (p) | INS], l steps, e channels per direction.
"""

import triton
import triton.language as tl


@triton.jit
def _window_mean(x_ptr, patch, num_rows, num_columns, stride_m, e, e_ok, HALF: tl.constexpr, BLOCK: tl.constexpr):
    row, column = patch // num_columns, patch % num_columns
    total = tl.zeros([BLOCK], tl.float32)
    count = 0
    for down in tl.static_range(-HALF, HALF + 1):
        for right in tl.static_range(-HALF, HALF + 1):
            inside = (
                (row + down >= 0) & (row + down < num_rows) & (column + right >= 0) & (column + right < num_columns)
            )
            at = x_ptr + (patch + down * num_columns + right) * stride_m + e
            total += tl.load(at, mask=e_ok & inside, other=0.0).to(tl.float32)
            count += inside.to(tl.int32)
    # Round as a summary that is written to memory would be, so that this kernel agrees with the plain torch version.
    return (total / count).to(x_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _visited(
    x_ptr, order_ptr, step, num_patches, num_rows, num_columns, stride_m, e, e_ok,
    HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the row visited at a step; zeros before the first step, as the convolution's padding."""
    row = tl.load(order_ptr + step, mask=step >= 0, other=0).to(tl.int32)
    value = tl.zeros([BLOCK], tl.float32)
    if step >= 0:
        if row < num_patches:
            value = _window_mean(x_ptr, row, num_rows, num_columns, stride_m, e, e_ok, HALF, BLOCK)
        else:
            at = x_ptr + (row - num_patches) * stride_m + e
            value = tl.load(at, mask=e_ok, other=0.0).to(tl.float32)
    return value


@triton.jit
def visit_forward(
    x_ptr, order_ptr, num_steps_ptr, grids_ptr, weight_ptr, bias_ptr, u_ptr,
    num_patches, max_steps, width, stride_b, stride_m, stride_g,
    HALF: tl.constexpr, SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write u (b, l, g, e) = SiLU(conv(rows visited)), zero at padding.

    The channels of x (b, m, ...) are contiguous; those of direction g begin at g * stride_g, and stride_g is 0 if the
    directions share them. The array order (b, g, l) points into the table. It and num_steps (b), grids (b, 2), weight
    (g, e, 4) and bias (g, e) are contiguous.
    """
    block, segment = tl.program_id(0), tl.program_id(1)
    pair = tl.program_id(2).to(tl.int64)
    b, g = pair // 2, pair % 2
    e = block * BLOCK + tl.arange(0, BLOCK)
    e_ok = e < width
    channel = g * width + e
    w0 = tl.load(weight_ptr + channel * 4, mask=e_ok, other=0.0).to(tl.float32)
    w1 = tl.load(weight_ptr + channel * 4 + 1, mask=e_ok, other=0.0).to(tl.float32)
    w2 = tl.load(weight_ptr + channel * 4 + 2, mask=e_ok, other=0.0).to(tl.float32)
    w3 = tl.load(weight_ptr + channel * 4 + 3, mask=e_ok, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=e_ok, other=0.0).to(tl.float32)
    num_steps = tl.load(num_steps_ptr + b).to(tl.int32)
    num_rows = tl.load(grids_ptr + 2 * b).to(tl.int32)
    num_columns = tl.load(grids_ptr + 2 * b + 1).to(tl.int32)
    x_ptr += b * stride_b + g * stride_g
    order_ptr += pair * max_steps
    u_ptr += b * max_steps * 2 * width + channel

    first = segment * SEGMENT
    end = tl.minimum(first + SEGMENT, max_steps)
    real_end = tl.minimum(end, num_steps)
    if first < real_end:
        row0 = _visited(x_ptr, order_ptr, first - 3, num_patches, num_rows, num_columns, stride_m, e, e_ok, HALF, BLOCK)
        row1 = _visited(x_ptr, order_ptr, first - 2, num_patches, num_rows, num_columns, stride_m, e, e_ok, HALF, BLOCK)
        row2 = _visited(x_ptr, order_ptr, first - 1, num_patches, num_rows, num_columns, stride_m, e, e_ok, HALF, BLOCK)
        for step in range(first, real_end):
            row3 = _visited(x_ptr, order_ptr, step, num_patches, num_rows, num_columns, stride_m, e, e_ok, HALF, BLOCK)
            pre = bias + w0 * row0 + w1 * row1 + w2 * row2 + w3 * row3
            tl.store(u_ptr + step * 2 * width, (pre * tl.sigmoid(pre)).to(u_ptr.dtype.element_ty), mask=e_ok)
            row0 = row1
            row1 = row2
            row2 = row3
    nothing = tl.zeros([BLOCK], tl.float32).to(u_ptr.dtype.element_ty)
    for step in range(tl.maximum(first, num_steps), end):
        tl.store(u_ptr + step * 2 * width, nothing, mask=e_ok)


@triton.jit
def visit_backward(
    du_ptr, x_ptr, order_ptr, num_steps_ptr, grids_ptr, weight_ptr, bias_ptr, dtable_ptr, dweight_ptr, dbias_ptr,
    num_patches, max_steps, width, num_segments, first_row, num_table_rows, stride_b, stride_m, stride_g,
    HALF: tl.constexpr, SEGMENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradients of `visit_forward` for the visited rows, the weight and the bias.

    The array du (b, l, g, e) is contiguous. The gradient of each visited row is written to dtable (b, g, k, e) at
    row - first_row; a row is visited at most once. The arrays dweight (b, segment, g, e, 4) and dbias (b, segment, g, e)
    are float32 parts, to be added over sub-images and segments.
    """
    block, segment = tl.program_id(0), tl.program_id(1)
    pair = tl.program_id(2).to(tl.int64)
    b, g = pair // 2, pair % 2
    e = block * BLOCK + tl.arange(0, BLOCK)
    e_ok = e < width
    channel = g * width + e
    w0 = tl.load(weight_ptr + channel * 4, mask=e_ok, other=0.0).to(tl.float32)
    w1 = tl.load(weight_ptr + channel * 4 + 1, mask=e_ok, other=0.0).to(tl.float32)
    w2 = tl.load(weight_ptr + channel * 4 + 2, mask=e_ok, other=0.0).to(tl.float32)
    w3 = tl.load(weight_ptr + channel * 4 + 3, mask=e_ok, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channel, mask=e_ok, other=0.0).to(tl.float32)
    num_steps = tl.load(num_steps_ptr + b).to(tl.int32)
    num_rows = tl.load(grids_ptr + 2 * b).to(tl.int32)
    num_columns = tl.load(grids_ptr + 2 * b + 1).to(tl.int32)
    x_ptr += b * stride_b + g * stride_g
    order_ptr += pair * max_steps
    du_ptr += b * max_steps * 2 * width + channel
    dtable_ptr += pair * num_table_rows * width + e
    part = (b * num_segments + segment) * 2 * width + channel

    dw0 = tl.zeros([BLOCK], tl.float32)
    dw1 = tl.zeros([BLOCK], tl.float32)
    dw2 = tl.zeros([BLOCK], tl.float32)
    dw3 = tl.zeros([BLOCK], tl.float32)
    dbias = tl.zeros([BLOCK], tl.float32)
    first = segment * SEGMENT
    end = tl.minimum(first + SEGMENT, num_steps)
    if first < end:
        # A row also enters the convolution of the three steps after it, so the backward walk begins three steps later.
        last = tl.minimum(end + 3, num_steps) - 1
        dpre1 = tl.zeros([BLOCK], tl.float32)
        dpre2 = tl.zeros([BLOCK], tl.float32)
        dpre3 = tl.zeros([BLOCK], tl.float32)
        row3 = _visited(x_ptr, order_ptr, last, num_patches, num_rows, num_columns, stride_m, e, e_ok, HALF, BLOCK)
        row2 = _visited(x_ptr, order_ptr, last - 1, num_patches, num_rows, num_columns, stride_m, e, e_ok, HALF, BLOCK)
        row1 = _visited(x_ptr, order_ptr, last - 2, num_patches, num_rows, num_columns, stride_m, e, e_ok, HALF, BLOCK)
        for back in range(last + 1 - first):
            step = last - back
            row0 = _visited(
                x_ptr, order_ptr, step - 3, num_patches, num_rows, num_columns, stride_m, e, e_ok, HALF, BLOCK
            )
            pre = bias + w0 * row0 + w1 * row1 + w2 * row2 + w3 * row3
            gate = tl.sigmoid(pre)
            du = tl.load(du_ptr + step * 2 * width, mask=e_ok, other=0.0).to(tl.float32)
            dpre = du * gate * (1.0 + pre * (1.0 - gate))
            if step < end:
                dw0 += dpre * row0
                dw1 += dpre * row1
                dw2 += dpre * row2
                dw3 += dpre * row3
                dbias += dpre
                drow = w3 * dpre + w2 * dpre1 + w1 * dpre2 + w0 * dpre3
                row = tl.load(order_ptr + step).to(tl.int32) - first_row
                tl.store(dtable_ptr + row * width, drow.to(dtable_ptr.dtype.element_ty), mask=e_ok)
            dpre3 = dpre2
            dpre2 = dpre1
            dpre1 = dpre
            row3 = row2
            row2 = row1
            row1 = row0
    tl.store(dweight_ptr + part * 4, dw0, mask=e_ok)
    tl.store(dweight_ptr + part * 4 + 1, dw1, mask=e_ok)
    tl.store(dweight_ptr + part * 4 + 2, dw2, mask=e_ok)
    tl.store(dweight_ptr + part * 4 + 3, dw3, mask=e_ok)
    tl.store(dbias_ptr + part, dbias, mask=e_ok)


@triton.jit
def rows_backward(
    dtable_ptr, grids_ptr, dx_ptr,
    num_patches, width, num_map_rows, num_table_rows,
    SHARED: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write dx (b, m, ...) from dtable (b, g, k, e): a token's own gradient plus its share of each window it is in.

    With SHARED the directions read the same channels, and dx (b, m, e) is their sum; otherwise dx is (b, m, g, e). If no TL
    is visited, HALF is 0 and dtable starts at T.
    """
    block, row = tl.program_id(0), tl.program_id(1)
    sub_image = tl.program_id(2).to(tl.int64)
    if SHARED:
        b, g = sub_image, sub_image * 0
    else:
        b, g = sub_image // 2, sub_image % 2
    e = block * BLOCK + tl.arange(0, BLOCK)
    e_ok = e < width
    num_rows = tl.load(grids_ptr + 2 * b).to(tl.int32)
    num_columns = tl.load(grids_ptr + 2 * b + 1).to(tl.int32)
    first_token = 0
    if HALF > 0:
        first_token = num_patches

    total = tl.zeros([BLOCK], tl.float32)
    for direction in tl.static_range(1 + SHARED):
        table_ptr = dtable_ptr + (2 * b + g + direction) * num_table_rows * width + e
        total += tl.load(table_ptr + (first_token + row) * width, mask=e_ok, other=0.0).to(tl.float32)
        if HALF > 0:
            i, j = row // num_columns, row % num_columns
            for down in tl.static_range(-HALF, HALF + 1):
                for right in tl.static_range(-HALF, HALF + 1):
                    inside = (i + down >= 0) & (i + down < num_rows) & (j + right >= 0) & (j + right < num_columns)
                    # Rows of INS and of padding are in no window.
                    inside = inside & (row < num_rows * num_columns)
                    top, bottom = tl.maximum(i + down - HALF, 0), tl.minimum(i + down + HALF, num_rows - 1)
                    left, right_end = tl.maximum(j + right - HALF, 0), tl.minimum(j + right + HALF, num_columns - 1)
                    count = tl.maximum((bottom - top + 1) * (right_end - left + 1), 1)
                    at = table_ptr + (row + down * num_columns + right) * width
                    total += tl.load(at, mask=e_ok & inside, other=0.0).to(tl.float32) / count
    if SHARED:
        dx_ptr += (b * num_map_rows + row) * width + e
    else:
        dx_ptr += ((b * num_map_rows + row) * 2 + g) * width + e
    tl.store(dx_ptr, total.to(dx_ptr.dtype.element_ty), mask=e_ok)

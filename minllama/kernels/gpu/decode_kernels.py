"""Triton kernels of a decode step, each of which reads its weights once.

A step for one sequence is bound by memory bandwidth, so each matmul also computes what is between
it and the next: the norm before it, RoPE, SwiGLU, the residual after it. The norm's factor is one
number per row, so it is applied to the finished sums (RMSNorm, Zhang & Sennrich 2019, eq. 4).
Attention over the cache is split between programs with separate softmaxes, which are then combined
(Dao et al. 2023, Flash-Decoding).

On compute capability 9.0 and up a kernel starts while the previous one still runs (`EARLY`,
programmatic dependent launch): it prefetches weights, which no kernel writes, and waits for the
rest.

Shapes: D model width, H heads, K key/value heads, C head width, F hidden width. Activations between
kernels are float32 for one sequence, and in the model's dtype before torch's matmuls for several.
Each program computes ROWS rows of a matrix, whose height is a multiple of that.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _begin(EARLY: tl.constexpr):
    """Let the next kernel start; call it first."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def _wait(EARLY: tl.constexpr):
    """Wait for the writes of earlier kernels; every kernel must, since the next relies on it."""
    if EARLY:
        gdc_wait()


@triton.jit
def _tile(matrix, first, start, N: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(ROWS, BLOCK) of a row-major matrix of N columns, from (first, start) on."""
    columns = start + tl.arange(0, BLOCK)
    rows = (first + tl.arange(0, ROWS)).to(tl.int64)
    where = matrix + rows[:, None] * N + columns[None, :]
    if N % BLOCK == 0:
        return tl.load(where, eviction_policy="evict_first")
    return tl.load(where, mask=columns[None, :] < N, other=0.0, eviction_policy="evict_first")


@triton.jit
def _piece(x, start, N: tl.constexpr, BLOCK: tl.constexpr):
    """(BLOCK,) float32 of a vector of N, from start on."""
    columns = start + tl.arange(0, BLOCK)
    if N % BLOCK == 0:
        return tl.load(x + columns).to(tl.float32)
    return tl.load(x + columns, mask=columns < N, other=0.0).to(tl.float32)


@triton.jit
def _product(
    matrix,
    first,
    x,
    gain,
    eps,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    EARLY: tl.constexpr,
):
    """ROWS products of a matrix (., N) with x (N,), normalized before where NORM: float32."""
    tile = _tile(matrix, first, 0, N, ROWS, BLOCK)
    if NORM:
        weight = _piece(gain, 0, N, BLOCK)
    _wait(EARLY)
    piece = _piece(x, 0, N, BLOCK)
    squares = piece * piece
    if NORM:
        piece *= weight
    sums = tile.to(tl.float32) * piece[None, :]
    for start in tl.static_range(BLOCK, N, BLOCK):
        tile = _tile(matrix, first, start, N, ROWS, BLOCK)
        piece = _piece(x, start, N, BLOCK)
        squares += piece * piece
        if NORM:
            piece *= _piece(gain, start, N, BLOCK)
        sums += tile.to(tl.float32) * piece[None, :]
    found = tl.sum(sums, axis=1)
    if NORM:
        found *= tl.rsqrt(tl.sum(squares, axis=0) / N + eps)
    return found


@triton.jit
def _with_bias(found, bias, first, ROWS: tl.constexpr, BIAS: tl.constexpr):
    if BIAS:
        found += tl.load(bias + first + tl.arange(0, ROWS)).to(tl.float32)
    return found


@triton.jit
def _turned(x, position, first, table, C: tl.constexpr, ROWS: tl.constexpr):
    """Pairs of channels of one head's row, rotated (RoFormer, eq. 34): (ROWS,) from `first` on."""
    a, b = tl.split(tl.reshape(x, (ROWS // 2, 2)))
    pair = (first // 2 + tl.arange(0, ROWS // 2)) % (C // 2)
    angle = table + (position * (C // 2) + pair) * 2
    cosine, sine = tl.load(angle), tl.load(angle + 1)
    return tl.reshape(tl.join(a * cosine - b * sine, a * sine + b * cosine), (ROWS,))


@triton.jit
def rope(
    x,
    turned,
    turns,
    n_turns,
    H: tl.constexpr,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rotate all heads of tokens: (tokens, H, C) by (n_turns, C / 2, 2), over and over again."""
    token = tl.program_id(0).to(tl.int64)
    heads, channels = tl.arange(0, HEADS), tl.arange(0, BLOCK)
    inside = (heads[:, None] < H) & (channels[None, :] < C)
    at = (token * H + heads)[:, None] * C + channels[None, :]
    pairs = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    a, b = tl.split(tl.reshape(pairs, (HEADS, BLOCK // 2, 2)))
    half = tl.arange(0, BLOCK // 2)
    angle = turns + ((token % n_turns) * (C // 2) + half) * 2
    cosine = tl.load(angle, mask=half < C // 2, other=0.0)[None, :]
    sine = tl.load(angle + 1, mask=half < C // 2, other=0.0)[None, :]
    pairs = tl.join(a * cosine - b * sine, a * sine + b * cosine)
    pairs = tl.reshape(pairs, (HEADS, BLOCK)).to(turned.dtype.element_ty)
    tl.store(turned + at, pairs, mask=inside)


@triton.jit
def _place(places, layer, row, head, position, like, C: tl.constexpr, LAYERS: tl.constexpr):
    """Address of a sequence's key (with layer + LAYERS its value) of a head and position.

    The addresses of each layer's keys and values and of the table of rotations, and the strides of
    sequences and heads, are in memory, so that a captured graph works for every cache.
    """
    start = tl.load(places + layer).to(tl.pointer_type(like.dtype.element_ty))
    aligned: tl.constexpr = C & -C  # strides are multiples of the heads' width
    start = tl.multiple_of(start, 16)
    row_stride = tl.multiple_of(tl.load(places + 2 * LAYERS + 1), aligned)
    head_stride = tl.multiple_of(tl.load(places + 2 * LAYERS + 2), aligned)
    return start + row * row_stride + head * head_stride + position * C


@triton.jit
def _table(places, LAYERS: tl.constexpr):
    """The rotations: (positions, C / 2, 2) float32, cosines and sines."""
    return tl.load(places + 2 * LAYERS).to(tl.pointer_type(tl.float32))


@triton.jit
def embed(ids, table, h, vocab_size, D: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """Rows of a matrix by index, (B,) -> (B, D); NaN for invalid indices."""
    _begin(EARLY)
    _wait(EARLY)
    row = tl.program_id(0)
    token = tl.load(ids + row)
    columns = tl.arange(0, BLOCK)
    known = (token >= 0) & (token < vocab_size)
    x = tl.load(table + token * D + columns, mask=known & (columns < D), other=float("nan"))
    tl.store(h + row * D + columns, x.to(h.dtype.element_ty), mask=columns < D)


@triton.jit(do_not_specialize=["layer"])
def project_query_key_value(
    h,
    gain,
    w_query,
    w_key,
    w_value,
    b_query,
    b_key,
    b_value,
    query,
    places,
    lengths,
    layer,
    eps,
    D: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    LAYERS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One sequence's rotated query, and its key and value, which are written to the cache."""
    _begin(EARLY)
    start = tl.program_id(0) * ROWS
    if start < H * C:
        matrix, bias, first = w_query, b_query, start
    elif start < (H + K) * C:
        matrix, bias, first = w_key, b_key, start - H * C
    else:
        matrix, bias, first = w_value, b_value, start - (H + K) * C
    matrix = tl.multiple_of(matrix, 16)
    found = _product(matrix, first, h, gain, eps, D, ROWS, BLOCK, True, EARLY)
    found = _with_bias(found, bias, first, ROWS, BIAS)
    position = tl.load(lengths)
    rows = tl.arange(0, ROWS)
    if start < (H + K) * C:
        found = _turned(found, position, first, _table(places, LAYERS), C, ROWS)
    found = found.to(query.dtype.element_ty)
    if start < H * C:
        tl.store(query + first + rows, found)
    else:
        which = layer if start < (H + K) * C else layer + LAYERS
        where = _place(places, which, 0, (first + rows) // C, position, query, C, LAYERS)
        tl.store(where + (first + rows) % C, found)


@triton.jit(do_not_specialize=["layer"])
def rope_and_cache(
    query,
    key,
    value,
    places,
    lengths,
    layer,
    H: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Rotate queries (B, H * C) in place; keys (B, K * C), rotated, and values into the cache."""
    _begin(EARLY)
    _wait(EARLY)
    row, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(lengths + row)
    if position >= 0:
        channels = tl.arange(0, BLOCK)
        inside = channels < C
        if head < H:
            own = query + (row * H + head) * C + channels
            x = tl.load(own, mask=inside, other=0.0).to(tl.float32)
            x = _turned(x, position, 0, _table(places, LAYERS), C, BLOCK)
            tl.store(own, x.to(query.dtype.element_ty), mask=inside)
        elif head < H + K:
            own = key + (row * K + head - H) * C + channels
            x = tl.load(own, mask=inside, other=0.0).to(tl.float32)
            x = _turned(x, position, 0, _table(places, LAYERS), C, BLOCK)
            where = _place(places, layer, row, head - H, position, query, C, LAYERS)
            tl.store(where + channels, x.to(query.dtype.element_ty), mask=inside)
        else:
            own = value + (row * K + head - H - K) * C + channels
            x = tl.load(own, mask=inside, other=0.0).to(tl.float32)
            where = _place(places, layer + LAYERS, row, head - H - K, position, query, C, LAYERS)
            tl.store(where + channels, x.to(query.dtype.element_ty), mask=inside)


@triton.jit
def _add_to_softmax(largest, weights, found, scores, v, PRECISION: tl.constexpr):
    """A running softmax over values, and that with further scores (Milakov & Gimelshein 2018).

    Largest score (GROUP), sum of the weights (GROUP) and weighted values (GROUP, BLOCK), of scores
    (GROUP, SLOTS) and values (SLOTS, BLOCK).
    """
    higher = tl.maximum(largest, tl.max(scores, axis=1))
    shrunk = tl.exp(largest - higher)
    e = tl.exp(scores - higher[:, None])
    weights = weights * shrunk + tl.sum(e, axis=1)
    found = found * shrunk[:, None] + tl.dot(e.to(v.dtype), v, input_precision=PRECISION)
    return higher, weights, found


@triton.jit(do_not_specialize=["layer"])
def attend(
    query,
    partial,
    peak,
    total,
    places,
    lengths,
    layer,
    scale,
    H: tl.constexpr,
    K: tl.constexpr,
    C: tl.constexpr,
    LAYERS: tl.constexpr,
    SPLITS: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Attention over one part of a sequence's slots, for the H / K queries that share a key head.

    Writes the values weighted by the part's softmax, not divided by its sum: partial (B, H, SPLITS,
    C), its largest score and its sum, (B, H, SPLITS), all float32. With only one part, `partial` is
    the result (B, H, C) in its own dtype.
    """
    _begin(EARLY)
    _wait(EARLY)
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.maximum(tl.load(lengths + row) + 1, 0).to(tl.int32)
    part = tl.cdiv(tl.cdiv(length, SPLITS), SLOTS) * SLOTS
    begin, end = split * part, tl.minimum(split * part + part, length)
    members, channels = tl.arange(0, GROUP), tl.arange(0, BLOCK)
    heads = head * (H // K) + members
    inside = (members[:, None] < H // K) & (channels[None, :] < C)
    at = (row * H + heads)[:, None] * C + channels[None, :]
    q = tl.load(query + at, mask=inside, other=0.0)  # (GROUP, BLOCK)
    keys = _place(places, layer, row, head, 0, query, C, LAYERS)
    values = _place(places, layer + LAYERS, row, head, 0, query, C, LAYERS)
    largest = tl.full((GROUP,), float("-inf"), tl.float32)
    weights = tl.zeros((GROUP,), tl.float32)
    found = tl.zeros((GROUP, BLOCK), tl.float32)
    for start in tl.range(begin, end, SLOTS):
        slots = start + tl.arange(0, SLOTS)
        there = (slots[:, None] < end) & (channels[None, :] < C)
        where = slots[:, None] * C + channels[None, :]
        k = tl.load(keys + where, mask=there, other=0.0)  # (SLOTS, BLOCK)
        v = tl.load(values + where, mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # (GROUP, SLOTS)
        scores = tl.where(slots[None, :] < end, scores, float("-inf"))
        largest, weights, found = _add_to_softmax(largest, weights, found, scores, v, PRECISION)
    if SPLITS == 1:
        found = found / tl.where(weights > 0, weights, 1.0)[:, None]
        tl.store(partial + at, found.to(partial.dtype.element_ty), mask=inside)
    else:
        parts = (row * H + heads) * SPLITS + split
        where = parts[:, None] * C + channels[None, :]
        tl.store(partial + where, found, mask=inside)
        tl.store(peak + parts, largest, mask=members < H // K)
        tl.store(total + parts, weights, mask=members < H // K)


@triton.jit
def combine(
    partial,
    peak,
    total,
    attended,
    C: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The parts of `attend` as one softmax: (B, H, SPLITS, C) -> (B, H, C)."""
    _begin(EARLY)
    _wait(EARLY)
    head = tl.program_id(0)
    parts = head * SPLITS + tl.arange(0, SPLITS)
    channels = tl.arange(0, BLOCK)
    peaks = tl.load(peak + parts)
    shares = tl.exp(peaks - tl.max(peaks, axis=0))
    where = parts[:, None] * C + channels[None, :]
    values = tl.load(partial + where, mask=channels[None, :] < C, other=0.0)
    found = tl.sum(values * shares[:, None], axis=0)
    found /= tl.sum(tl.load(total + parts) * shares, axis=0)
    tl.store(attended + head * C + channels, found.to(attended.dtype.element_ty), mask=channels < C)


@triton.jit
def add_product(
    x,
    matrix,
    bias,
    h,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """H += W x + b, for one sequence."""
    _begin(EARLY)
    first = tl.program_id(0) * ROWS
    found = _product(matrix, first, x, x, 0.0, N, ROWS, BLOCK, False, EARLY)
    found = _with_bias(found, bias, first, ROWS, BIAS)
    where = h + first + tl.arange(0, ROWS)
    tl.store(where, tl.load(where) + found)


@triton.jit
def gate(
    h,
    gain,
    w1,
    w3,
    b1,
    b3,
    gated,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """SiLU(W1 x) * W3 x (Shazeer 2020, eq. 6) of one normalized state: (D,) -> (F,)."""
    _begin(EARLY)
    first = tl.program_id(0) * ROWS
    one = _tile(w1, first, 0, D, ROWS, BLOCK)
    three = _tile(w3, first, 0, D, ROWS, BLOCK)
    weight = _piece(gain, 0, D, BLOCK)
    _wait(EARLY)
    piece = _piece(h, 0, D, BLOCK)
    squares = piece * piece
    piece *= weight
    u = one.to(tl.float32) * piece[None, :]
    v = three.to(tl.float32) * piece[None, :]
    for start in tl.static_range(BLOCK, D, BLOCK):
        piece = _piece(h, start, D, BLOCK)
        squares += piece * piece
        piece *= _piece(gain, start, D, BLOCK)
        u += _tile(w1, first, start, D, ROWS, BLOCK).to(tl.float32) * piece[None, :]
        v += _tile(w3, first, start, D, ROWS, BLOCK).to(tl.float32) * piece[None, :]
    factor = tl.rsqrt(tl.sum(squares, axis=0) / D + eps)
    u = tl.sum(u, axis=1) * factor
    v = tl.sum(v, axis=1) * factor
    u = _with_bias(u, b1, first, ROWS, BIAS)
    v = _with_bias(v, b3, first, ROWS, BIAS)
    tl.store(gated + first + tl.arange(0, ROWS), u * tl.sigmoid(u) * v)


@triton.jit
def project_vocabulary(
    h,
    gain,
    matrix,
    logits,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Logits of one state, with the norm: (D,) -> (V,)."""
    _begin(EARLY)
    first = tl.program_id(0) * ROWS
    found = _product(matrix, first, h, gain, eps, D, ROWS, BLOCK, True, EARLY)
    tl.store(logits + first + tl.arange(0, ROWS), found)


@triton.jit
def add_and_normalize(
    h,
    x,
    gain,
    normal,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
    EARLY: tl.constexpr,
):
    """H += x if ADD, and its RMSNorm: (B, D), `normal` in its own dtype."""
    _begin(EARLY)
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    weight = tl.load(gain + columns, mask=inside, other=0.0).to(tl.float32)
    _wait(EARLY)
    y = tl.load(h + row * D + columns, mask=inside, other=0.0)
    if ADD:
        y += tl.load(x + row * D + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(h + row * D + columns, y, mask=inside)
    y = y * tl.rsqrt(tl.sum(y * y, axis=0) / D + eps) * weight
    tl.store(normal + row * D + columns, y.to(normal.dtype.element_ty), mask=inside)


@triton.jit
def swiglu(u, v, gated, n, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """SiLU(u) * v, of n elements each."""
    _begin(EARLY)
    _wait(EARLY)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(u + at, mask=at < n, other=0.0).to(tl.float32)
    b = tl.load(v + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(gated + at, (a * tl.sigmoid(a) * b).to(gated.dtype.element_ty), mask=at < n)

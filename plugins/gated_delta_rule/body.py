"""The ONNX function body of GatedDeltaRule: a Scan over chunks of tokens, with all that needs no state outside it.

Every tensor of the Scan is [chunks, B, G, H / G, C, features]. A chunk has as many tokens, C, as can be up to LONGEST
with the least padding: one token is a chunk of one. The values that a chunk adds to the state are

    v_new = (1 + L)^-1 beta (v - decay_in k S),  L[i, j] = beta[i] k[i] k[j] decay[i, j] below the diagonal,

where decay[i, j] = exp(g[j + 1] + ... + g[i]) and decay_in[i] = exp(g[0] + ... + g[i]) (arXiv 2412.06464).
"""

from __future__ import annotations

from llmexport.plugins.spec import Attribute

L2_EPSILON = 1e-6  # added to the sum of squares in the L2 norm of q and k
LONGEST = 32  # tokens of a chunk, a power of two


def body(attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]) -> str:
    """One body for TensorRT and ONNX Runtime, which before 1.24 wants the shapes of a Scan's outputs said.

    tests/bench/bench_bodies.py, ONNX Runtime 1.31.1, one thread, B = 1, G = 16, H = 32, D = V = 128: 69 ms at T = 512
    and 1.7 ms at T = 1; a Scan over tokens takes 298 and 1.0 ms, LinearAttention of com.microsoft, which
    linear_attention.py has for ONNX Runtime alone, 35 and 0.3 ms.
    """
    g, h, d, v = (sizes[n] for n in "GHDV")
    return f"""
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    tokens = Shape <start = 1, end = 2> (v)
    {_chunk_sizes()}
    {inputs(attributes)}
    {_chunked("q", "q_scaled", g, 1, d)}
    {_chunked("k", "k_unit", g, 1, d)}
    {_chunked("v", "v_wide", g, h // g, v)}
    {_chunked("beta", "beta_wide", g, h // g, 1)}
    {_chunked("g", "g", g, h // g, 1)}
    {_decays()}
    k_columns = Transpose <perm = [0, 1, 2, 3, 5, 4]> (k_chunks)
    kq_chunks = Concat <axis = -2> (k_chunks, q_chunks)
    kq_products = MatMul (kq_chunks, k_columns)
    k_products, q_products = Split <axis = -2, num_outputs = 2> (kq_products)
    q_weights = Mul (q_products, decay)
    k_decayed = Mul (k_products, decay)
    lower = Mul (k_decayed, beta_chunks)
    {_inverse()}
    state_heads = Constant <value_ints = [0, {g}, {h // g}, {d}, {v}]> ()
    state_grouped = Reshape (state, state_heads)
    state_after, y_chunks = Scan <
      num_scan_inputs = 9,
      body = chunk (float[] s, float[] kq_c, float[] k_c, float[] v_c, float[] beta_c, float[] inverse_c,
          float[] weights_c, float[] in_c, float[] out_c, float[] whole_c) => (
          float[rows, {g}, {h // g}, {d}, {v}] s_next, float[rows, {g}, {h // g}, chunk_tokens, {v}] y_c) {{
        kq_s = MatMul (kq_c, s)
        k_s, q_s = Split <axis = -2, num_outputs = 2> (kq_s)
        v_known = Mul (k_s, in_c)
        v_missed = Sub (v_c, v_known)
        v_wanted = Mul (v_missed, beta_c)
        v_new = MatMul (inverse_c, v_wanted)
        y_before = Mul (q_s, in_c)
        y_within = MatMul (weights_c, v_new)
        y_c = Add (y_before, y_within)
        s_old = Mul (s, whole_c)
        v_out = Mul (v_new, out_c)
        s_new = MatMul (k_c, v_out)
        s_next = Add (s_old, s_new)
      }}
    > (state_grouped, kq_chunks, k_columns, v_chunks, beta_chunks, inverse, q_weights, decay_in, decay_out,
       decay_whole)
    y_split = Transpose <perm = [1, 0, 4, 2, 3, 5]> (y_chunks)
    y_heads = Constant <value_ints = [0, -1, {h}, {v}]> ()
    y_padded = Reshape (y_split, y_heads)
    y_wide = Slice (y_padded, zero, tokens, one)
    y = CastLike (y_wide, v)
    next_heads = Constant <value_ints = [0, {h}, {d}, {v}]> ()
    next_state = Reshape (state_after, next_heads)"""


def _chunk_sizes() -> str:
    """Makes `count` chunks of `size` tokens; `missing` of the tokens are past the end."""
    return f"""
    longest = Constant <value_ints = [{LONGEST}]> ()
    tokens_less = Sub (tokens, one)
    count_less = Div (tokens_less, longest)
    count = Add (count_less, one)
    size_less = Div (tokens_less, count)
    size = Add (size_less, one)
    room = Mul (count, size)
    missing = Sub (room, tokens)
    padding = Concat <axis = 0> (zero, missing)"""


def inputs(attributes: dict[str, Attribute]) -> str:
    """q_scaled, k_unit, v_wide and beta_wide: q, k, v and beta in float32, normed and scaled as they are to be."""
    return f"""
    q_wide = Cast <to = 1> (q)
    k_wide = Cast <to = 1> (k)
    v_wide = Cast <to = 1> (v)
    beta_wide = Cast <to = 1> (beta)
    {_normed("q") if attributes["l2_norm"] else "q_unit = Identity (q_wide)"}
    {_normed("k") if attributes["l2_norm"] else "k_unit = Identity (k_wide)"}
    scale = Constant <value_float = {attributes["scale"]}> ()
    q_scaled = Mul (q_unit, scale)"""


def _normed(name: str) -> str:
    return f"""
    {name}_squares = Mul ({name}_wide, {name}_wide)
    {name}_axis = Constant <value_ints = [-1]> ()
    {name}_sum = ReduceSum <keepdims = 1> ({name}_squares, {name}_axis)
    {name}_epsilon = Constant <value_float = {L2_EPSILON}> ()
    {name}_positive = Add ({name}_sum, {name}_epsilon)
    {name}_norm = Sqrt ({name}_positive)
    {name}_unit = Div ({name}_wide, {name}_norm)"""


def _chunked(name: str, source: str, *features: int) -> str:
    """Cuts `source` into chunks. Zeros past the end neither decay the state nor add to it."""
    return f"""
    {name}_padded = Pad ({source}, padding, , one)
    {name}_features = Constant <value_ints = [{", ".join(map(str, features))}]> ()
    {name}_shape = Concat <axis = 0> (zero, count, size, {name}_features)
    {name}_split = Reshape ({name}_padded, {name}_shape)
    {name}_chunks = Transpose <perm = [1, 0, 3, 4, 2, 5]> ({name}_split)"""


def _decays() -> str:
    """Every sum of g is made by itself: differences of running sums would lose small steps after large ones.

    level[i, j] for j < i is the bit length of i ^ j: n if i and j are in two blocks of 2^(n - 1) tokens that make
    one of 2^n. It is 0 on the diagonal and -1 above it.
    """
    levels = [(i ^ j).bit_length() if i >= j else -1 for i in range(LONGEST) for j in range(LONGEST)]
    return f"""
    levels = Constant <value = int64[{LONGEST}, {LONGEST}] {{{", ".join(map(str, levels))}}}> ()
    corner = Concat <axis = 0> (zero, zero)
    level_end = Concat <axis = 0> (size, size)
    level = Slice (levels, corner, level_end)
    level_0 = Constant <value_int = 0> ()
    is_after = Greater (level, level_0)
    is_upto = GreaterOrEqual (level, level_0)
    is_same = Equal (level, level_0)
    nothing = Constant <value_float = 0.0> ()
    rows = Constant <value_int = -2> ()
    g_between = Where (is_after, g_chunks, nothing)
    g_sums = CumSum (g_between, rows)
    decay_square = Exp (g_sums)
    decay = Where (is_upto, decay_square, nothing)
    g_sums_in = CumSum (g_chunks, rows)
    decay_in = Exp (g_sums_in)
    last = Constant <value_ints = [-1]> ()
    beyond = Constant <value_ints = [{2**31 - 1}]> ()
    row_axis = Constant <value_ints = [-2]> ()
    decay_whole = Slice (decay_in, last, beyond, row_axis)
    decay_last = Slice (decay, last, beyond, row_axis)
    decay_out = Transpose <perm = [0, 1, 2, 3, 5, 4]> (decay_last)"""


def _inverse() -> str:
    """(1 + L)^-1, block by block from size 1 up: the inverse of [[P, 0], [R, Q]] is [[P^-1, 0], [-Q^-1 R P^-1, Q^-1]].
    This is forward substitution in another order, and as stable; powers of L are not."""
    top = LONGEST.bit_length() - 1
    steps = ["unit = Cast <to = 1> (is_same)", _corner(1), "inverse_1 = Sub (unit, r_1)"]
    for n in range(2, top + 1):
        steps += [
            _corner(n),
            f"r_p_{n} = MatMul (r_{n}, inverse_{n - 1})",
            f"q_r_p_{n} = MatMul (inverse_{n - 1}, r_p_{n})",
            f"inverse_{n} = Sub (inverse_{n - 1}, q_r_p_{n})",
        ]
    return "\n    ".join([*steps, f"inverse = Identity (inverse_{top})"])


def _corner(n: int) -> str:
    """The part of L below the diagonal blocks of 2^(n - 1) tokens and in those of 2^n."""
    return f"""level_{n} = Constant <value_int = {n}> ()
    is_{n} = Equal (level, level_{n})
    r_{n} = Where (is_{n}, lower, nothing)"""

"""The ONNX function body of MoeExperts: the tokens of each expert in blocks of rows, block by block."""

from __future__ import annotations

from llmexport.plugins.moe_experts.expert import SHARED, check_body, constants, mlp
from llmexport.plugins.moe_experts.products import plain
from llmexport.plugins.spec import Attribute


def body(attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]) -> str:
    """A Loop of as many turns as there can be blocks. A turn that has a block gathers the weights of its expert as they
    are stored, and decodes and casts those alone; the other turns are skipped.

    One form serves both runtimes. TensorRT has neither NonZero nor Unique, cannot add to a tensor by index, and takes
    the number of turns from shapes. ONNX Runtime wants each expert's weights gathered once, as they are.
    """
    check_body(attributes, types)
    dtype = types["x"].replace("float32", "float")
    top_k, hidden = sizes["K"], sizes["C"]
    return f"""
    {constants(attributes, types, sizes)}
    {_blocks(sizes["E"], top_k)}
    rows_shape = Constant <value_ints = [-1, {hidden}]> ()
    rows = Reshape (x, rows_shape)
    scales = Reshape (weights, flat)
    passed, block_outputs = Loop <
      body = turn (int64 b, bool go, int64 pass) => (bool go_on, int64 pass_on, {dtype}[] y_b) {{
        go_on = Constant <value = bool {{1}}> ()
        pass_on = Identity (pass)
        is_block = Less (b, blocks)
        y_b = If (is_block) <
          then_branch = some () => ({dtype}[] y_some) {{{_mlp(attributes, types, sizes)}
          }},
          else_branch = none () => ({dtype}[] y_none) {{
            columns = Constant <value_ints = [{hidden}]> ()
            none_shape = Concat <axis = 0> (size, columns)
            zeros = ConstantOfShape <value = float[1] {{0.0}}> (none_shape)
            y_none = CastLike (zeros, x)
          }}
        >
      }}
    > (most_blocks, , number_zero)
    outputs = Reshape (block_outputs, rows_shape)
    outputs_sorted = Gather <axis = 0> (outputs, place)
    outputs_wide = Cast <to = 1> (outputs_sorted)
    {_weighted(bool(attributes["scale_input"]))}
    by_token_shape = Constant <value_ints = [-1, {top_k}, {hidden}]> ()
    by_token = Reshape (outputs_weighted, by_token_shape)
    total = ReduceSum <keepdims = 0> (by_token, one)
    total_rounded = CastLike (total, x)
    shape = Shape (x)
    y = Reshape (total_rounded, shape)"""


def _blocks(experts: int, top_k: int) -> str:
    """A choice is a token's k-th expert; the choices of an expert fill blocks of `size` rows, and only its last block
    has rows left. `place`: the row of each choice; `choice_at`: the choice in each row, 0 where there is none; `last`:
    the end of each expert's blocks.

    size: half as much again as the choices of an expert would be if all had the same.
    """
    return f"""
    one = Constant <value_ints = [1]> ()
    zero = Constant <value_ints = [0]> ()
    flat = Constant <value_ints = [-1]> ()
    top_k = Constant <value_int = {top_k}> ()
    expert_ids = Constant <value_ints = [{", ".join(map(str, range(experts)))}]> ()
    experts_flat = Reshape (experts, flat)
    chosen = Cast <to = 7> (experts_flat)
    chosen_column = Unsqueeze (chosen, one)
    is_chosen = Equal (chosen_column, expert_ids)
    hits = Cast <to = 6> (is_chosen)
    hits_so_far = CumSum (hits, number_zero)
    own_hits = Mul (hits, hits_so_far)
    nth_narrow = ReduceSum <keepdims = 0> (own_hits, one)
    nth = Cast <to = 7> (nth_narrow)
    before = Sub (nth, number_one)
    counts_narrow = ReduceSum <keepdims = 0> (hits, zero)
    counts = Cast <to = 7> (counts_narrow)
    choices = Shape (chosen)
    three = Constant <value_ints = [3]> ()
    twice_experts = Constant <value_ints = [{2 * experts}]> ()
    thrice = Mul (choices, three)
    size_less_one = Div (thrice, twice_experts)
    size = Add (size_less_one, one)
    counts_up = Add (counts, size_less_one)
    counts_blocks = Div (counts_up, size)
    last = CumSum (counts_blocks, number_zero)
    first = Sub (last, counts_blocks)
    blocks = ReduceMax <keepdims = 0> (last)
    last_block = Sub (blocks, number_one)
    full_blocks = Div (choices, size)
    number_experts = Constant <value_int = {experts}> ()
    many_blocks = Add (full_blocks, number_experts)
    most_blocks_list = Min (many_blocks, choices)
    most_blocks = Squeeze (most_blocks_list)
    block_of_choice = Gather (first, chosen)
    row_of_block = Mul (block_of_choice, size)
    place = Add (row_of_block, before)
    most_rows = Mul (most_blocks_list, size)
    no_choice = ConstantOfShape <value = int64[1] {{0}}> (most_rows)
    number_choices = Squeeze (choices)
    choice = Range (number_zero, number_choices, number_one)
    choice_at_row = ScatterElements <axis = 0> (no_choice, place, choice)
    by_block_shape = Concat <axis = 0> (flat, size)
    choice_at = Reshape (choice_at_row, by_block_shape)"""


def _mlp(attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]) -> str:
    """The expert of block b on its rows. A runtime may run branches not taken: past the last block, b counts as it."""
    scaled = """
          scale = Gather <axis = 0> (scales, choice_b)
          scale_column = Unsqueeze (scale, one)
          inputs = Mul (tokens_b, scale_column)"""
    own = "\n          ".join(f"{n}_e = Gather <axis = 0> ({n}, e)" for n in types if n not in SHARED)
    return f"""
          b_there = Min (b, last_block)
          is_past = LessOrEqual (last, b_there)
          experts_past = Cast <to = 7> (is_past)
          e = ReduceSum <keepdims = 0> (experts_past)
          choice_b = Gather <axis = 0> (choice_at, b_there)
          token_b = Div (choice_b, top_k)
          tokens_b = Gather <axis = 0> (rows, token_b)
          {scaled if attributes["scale_input"] else "inputs = Identity (tokens_b)"}
          {own}
          {mlp(attributes, types, sizes, plain)}
          y_some = Identity (result)"""


def _weighted(scale_input: bool) -> str:
    if scale_input:
        return "outputs_weighted = Identity (outputs_wide)"
    return """scales_wide = Cast <to = 1> (scales)
    scales_column = Unsqueeze (scales_wide, one)
    outputs_weighted = Mul (outputs_wide, scales_column)"""

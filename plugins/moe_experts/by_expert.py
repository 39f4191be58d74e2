"""MoeExperts' function body for ONNX Runtime alone: expert by expert, each on the rows of its own tokens alone."""

from __future__ import annotations

from llmexport.plugins.moe_experts.body import body
from llmexport.plugins.moe_experts.by_nibbles import by_nibbles, is_of_use, nibble_values
from llmexport.plugins.moe_experts.expert import SHARED, check_body, constants, mlp
from llmexport.plugins.moe_experts.products import FEW, by_rows
from llmexport.plugins.spec import Attribute

# How many times as many rows as there are choices the outputs of all experts may take, padded to those of the fullest.
ROOM = 4


def by_expert(attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]) -> str:
    """A Scan over experts, which ONNX Runtime gives each its weights in their place, where any other operator copies
    them first. The turn of an expert that no token chose computes nothing.

    Turns give outputs of one shape, as many rows as the fullest expert has tokens; where that is more than ROOM allows,
    as for a token of many experts, each turn adds its outputs to a sum instead, which copies that sum. One token alone
    needs none of this: a turn adds to its sum, and nothing is looked for. Its row, and that of an expert with one token
    of several, multiplies weights of 4 bits `by_nibbles`.

    An expert that a token chose twice counts once with the sum of its weights; where the weights multiply what goes in,
    that is another number, and the body of blocks stands.
    """
    experts, top_k, hidden = (sizes[n] for n in "EKC")
    if attributes["scale_input"] and top_k > 1:
        return body(attributes, types, sizes)
    check_body(attributes, types)
    nibbles = nibble_values(attributes, types) if is_of_use(attributes, types, sizes) else ""
    return f"""
    {constants(attributes, types, sizes)}{nibbles}
    one = Constant <value_ints = [1]> ()
    flat = Constant <value_ints = [-1]> ()
    number_experts = Constant <value_int = {experts}> ()
    columns = Constant <value_ints = [{experts}]> ()
    rows_shape = Constant <value_ints = [-1, {hidden}]> ()
    rows = Reshape (x, rows_shape)
    scales_any = Cast <to = 1> (weights)
    chosen_any = Cast <to = 7> (experts)
    numbers = Size (x)
    numbers_of_one = Constant <value_int = {hidden}> ()
    is_one = Equal (numbers, numbers_of_one)
    total = If (is_one) <
      then_branch = alone () => (float[] total_one) {{{_one(attributes, types, sizes, "total_one")}
      }},
      else_branch = several () => (float[] total_several) {{{_several(attributes, types, sizes, "total_several")}
      }}
    >
    total_rounded = CastLike (total, x)
    shape = Shape (x)
    y = Reshape (total_rounded, shape)"""


def _one(attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int], total: str) -> str:
    """Of one token, whose rows are those of each expert that it chose."""
    inputs, weighted = "Identity (rows)", "Mul (output_wide, weights_e)"
    if attributes["scale_input"]:
        inputs, weighted = "Mul (rows, weight_rounded)", "Identity (output_wide)"
    some = f"""
          weight_rounded = CastLike (weights_e, x)
          inputs = {inputs}
          {mlp(attributes, types, sizes, by_nibbles)}
          output_wide = Cast <to = 1> (result)
          weighted = {weighted}
          sum_some = Add (sum_before, weighted)"""
    none = """
          sum_none = Identity (sum_before)"""
    read = {"weights_e": ("weights_by_expert", "float")}
    return f"""
    chosen = Reshape (chosen_any, flat)
    scales_wide = Reshape (scales_any, flat)
    no_hits = ConstantOfShape <value = bool[1] {{0}}> (columns)
    choices = Constant <value_ints = [{sizes["K"]}]> ()
    hit = ConstantOfShape <value = bool[1] {{1}}> (choices)
    is_any = ScatterElements <axis = 0> (no_hits, chosen, hit)
    no_weights = ConstantOfShape <value = float[1] {{0.0}}> (columns)
    weights_by_expert = ScatterElements <axis = 0, reduction = "add"> (no_weights, chosen, scales_wide)
    rows_dims = Shape (rows)
    start = ConstantOfShape <value = float[1] {{0.0}}> (rows_dims)
    {total} = {_scan(types, read, some, none, "sum", state=("start", "sum_before"))}"""


def _several(attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int], total: str) -> str:
    experts, top_k = sizes["E"], sizes["K"]
    least, most = FEW[bool(attributes["transposed"])]
    if experts <= ROOM * top_k:
        outputs = _padded(attributes, types, sizes, total)
    else:
        outputs = f"""
    rows_in_all = Mul (most, number_experts)
    chosen_rows = Size (experts)
    room = Constant <value_int = {ROOM}> ()
    most_rows = Mul (chosen_rows, room)
    has_room = LessOrEqual (rows_in_all, most_rows)
    {total} = If (has_room) <
      then_branch = in_room () => (float[] total_padded) {{{_padded(attributes, types, sizes, "total_padded")}
      }},
      else_branch = no_room () => (float[] total_added) {{{_added(attributes, types, sizes, "total_added")}
      }}
    >"""
    return f"""
    choices_shape = Constant <value_ints = [-1, {top_k}]> ()
    scales_wide = Reshape (scales_any, choices_shape)
    chosen = Reshape (chosen_any, choices_shape)
    tokens = Shape <start = 0, end = 1> (rows)
    table = Concat <axis = 0> (tokens, columns)
    no_hits = ConstantOfShape <value = int32[1] {{0}}> (table)
    choices = Shape (chosen)
    hit = ConstantOfShape <value = int32[1] {{1}}> (choices)
    hits = ScatterElements <axis = 1> (no_hits, chosen, hit)
    no_weights = ConstantOfShape <value = float[1] {{0.0}}> (table)
    weights_by_token = ScatterElements <axis = 1, reduction = "add"> (no_weights, chosen, scales_wide)
    weights_by_expert = Transpose <perm = [1, 0]> (weights_by_token)
    is_hit = Cast <to = 9> (hits)
    is_its = Transpose <perm = [1, 0]> (is_hit)
    first_axis = Constant <value_ints = [0]> ()
    counts_narrow = ReduceSum <keepdims = 0> (hits, first_axis)
    counts = Cast <to = 7> (counts_narrow)
    is_any = Greater (counts, number_zero)
    least_few = Constant <value_int = {least}> ()
    most_few = Constant <value_int = {most}> ()
    is_enough = GreaterOrEqual (counts, least_few)
    is_not_many = LessOrEqual (counts, most_few)
    is_few = And (is_enough, is_not_many)
    most = ReduceMax <keepdims = 0> (counts)
    {outputs}"""


def _turn(attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]) -> str:
    """Makes `output_wide` of the rows of an expert's tokens, whose numbers are in `token_e`."""
    scaled = f"""{_WEIGHT}
          weight_rounded = CastLike (weight_e, x)
          inputs = Mul (tokens_e, weight_rounded)"""
    return f"""
          token_row = NonZero (is_its_e)
          token_e = Reshape (token_row, flat)
          tokens_e = Gather <axis = 0> (rows, token_e)
          {scaled if attributes["scale_input"] else "inputs = Identity (tokens_e)"}
          {_outputs(attributes, types, sizes)}"""


def _outputs(attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]) -> str:
    """`output_wide` of an expert's `inputs`, by nibbles if it is a single row and they are of use."""
    several = mlp(attributes, types, sizes, by_rows)
    if not is_of_use(attributes, types, sizes):
        return f"""{several}
          output_wide = Cast <to = 1> (result)"""
    return f"""rows_of_it = Size (token_e)
          is_single = Equal (rows_of_it, number_one)
          output_wide = If (is_single) <
            then_branch = single () => (float[] output_single) {{{mlp(attributes, types, sizes, by_nibbles)}
          output_single = Cast <to = 1> (result)
            }},
            else_branch = more () => (float[] output_more) {{{several}
          output_more = Cast <to = 1> (result)
            }}
          >"""


_WEIGHT = """
          weight_flat = Gather <axis = 0> (weights_e, token_e)
          weight_e = Unsqueeze (weight_flat, one)"""


def _scan(
    types: dict[str, str],
    read: dict[str, tuple[str, str]],
    some: str,
    none: str,
    result: str,
    state: tuple[str, str] | None = None,
) -> str:
    """A Scan whose turn has the weights of one expert. some, none: what makes RESULT_some where tokens chose it, and
    RESULT_none where none did. read: what else a turn reads, and of which value, of what type. state: of what goes from
    turn to turn, the first value and its name in one."""
    own = {f"{n}_e": (n, t.replace("float32", "float")) for n, t in types.items() if n not in SHARED}
    values = read | {"is_any_e": ("is_any", "bool")} | own
    parameters, given = [f"{t}[] {n}" for n, (_, t) in values.items()], [n for n, _ in values.values()]
    if state:
        parameters, given = [f"float[] {state[1]}", *parameters], [state[0], *given]
    return f"""Scan <num_scan_inputs = {len(values)}, body = turn ({", ".join(parameters)}) => (float[] {result}) {{
        {result} = If (is_any_e) <
          then_branch = some () => (float[] {result}_some) {{{some}
          }},
          else_branch = none () => (float[] {result}_none) {{{none}
          }}
        >
      }}> ({", ".join(given)})"""


# What a turn reads where there are several tokens.
_TOKENS = {
    "is_its_e": ("is_its", "bool"),
    "weights_e": ("weights_by_expert", "float"),
    "is_few_e": ("is_few", "bool"),
}


def _padded(attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int], total: str) -> str:
    some = f"""{_turn(attributes, types, sizes)}
          count_e = Shape (token_e)
          empty_list = Sub (most, count_e)
          empty_shape = Concat <axis = 0> (empty_list, hidden)
          empty = ConstantOfShape <value = float[1] {{0.0}}> (empty_shape)
          its_some = Concat <axis = 0> (output_wide, empty)"""
    none = """
          most_list = Reshape (most, flat)
          none_shape = Concat <axis = 0> (most_list, hidden)
          its_none = ConstantOfShape <value = float[1] {0.0}> (none_shape)"""
    weighted = "outputs_weighted = Identity (outputs)"
    if not attributes["scale_input"]:
        weighted = """last_axis = Constant <value_ints = [-1]> ()
    scales_column = Unsqueeze (scales_wide, last_axis)
    outputs_weighted = Mul (outputs, scales_column)"""
    return f"""
    hidden = Constant <value_ints = [{sizes["C"]}]> ()
    by_expert = {_scan(types, _TOKENS, some, none, "its")}
    outputs_flat = Reshape (by_expert, rows_shape)
    hits_so_far = CumSum (hits, number_zero)
    nth_narrow = GatherElements <axis = 1> (hits_so_far, chosen)
    nth = Cast <to = 7> (nth_narrow)
    before = Sub (nth, number_one)
    first = Mul (chosen, most)
    place = Add (first, before)
    outputs = Gather <axis = 0> (outputs_flat, place)
    {weighted}
    {total} = ReduceSum <keepdims = 0> (outputs_weighted, one)"""


def _added(attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int], total: str) -> str:
    weighted = f"""{_WEIGHT}
          result_weighted = Mul (output_wide, weight_e)"""
    some = f"""{_turn(attributes, types, sizes)}
          {"result_weighted = Identity (output_wide)" if attributes["scale_input"] else weighted}
          token_column = Unsqueeze (token_e, one)
          sum_some = ScatterND <reduction = "add"> (sum_before, token_column, result_weighted)"""
    none = """
          sum_none = Identity (sum_before)"""
    return f"""
    rows_dims = Shape (rows)
    start = ConstantOfShape <value = float[1] {{0.0}}> (rows_dims)
    {total} = {_scan(types, _TOKENS, some, none, "sum", state=("start", "sum_before"))}"""

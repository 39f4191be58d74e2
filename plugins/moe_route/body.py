"""The ONNX function body of MoeRoute."""

from __future__ import annotations

from llmexport.plugins.spec import Attribute


def body(attributes: dict[str, Attribute], types: dict[str, str], sizes: dict[str, int]) -> str:
    """All is computed in fp32. TopK breaks ties; in ONNX Runtime it prefers the lower index, as ONNX asks of it."""
    scoring = attributes["scoring"]
    scores = {"softmax": "Softmax <axis = -1>", "sigmoid": "Sigmoid", "softmax_top_k": "Identity"}
    if scoring not in scores:
        raise ValueError(f"MoeRoute knows no scoring {scoring!r}")
    groups, kept, best = (int(attributes[n]) for n in ("groups", "groups_kept", "group_best"))
    last = "weights_chosen"
    steps = f"""
    last_axis = Constant <value_ints = [-1]> ()
    wide = Cast <to = 1> (logits)
    scores = {scores[str(scoring)]} (wide)
    {_choice(groups, kept, best, "bias" in types)}
    top_k = Constant <value_ints = [{attributes["top_k"]}]> ()
    best, experts_wide = TopK <axis = -1, largest = 1, sorted = 1> (choice, top_k)
    experts = Cast <to = 6> (experts_wide)
    weights_chosen = GatherElements <axis = -1> (scores, experts_wide)"""
    if scoring == "softmax_top_k":
        steps += f"""
    weights_soft = Softmax <axis = -1> ({last})"""
        last = "weights_soft"
    if attributes["renormalise"]:
        steps += f"""
    weights_sum = ReduceSum <keepdims = 1> ({last}, last_axis)
    tiny = Constant <value_float = 1e-20> ()
    divisor = Add (weights_sum, tiny)
    weights_normal = Div ({last}, divisor)"""
        last = "weights_normal"
    return f"""{steps}
    scale = Constant <value_float = {attributes["scale"]}> ()
    weights_scaled = Mul ({last}, scale)
    weights = CastLike (weights_scaled, logits)"""


def _choice(groups: int, kept: int, best: int, biased: bool) -> str:
    """The numbers that experts are chosen by: -inf outside the groups that are kept."""
    whole = "choice" if groups == 1 else "choice_whole"
    steps = f"{whole} = Identity (wide)"
    if biased:
        steps = f"""bias_wide = Cast <to = 1> (bias)
    {whole} = Add (scores, bias_wide)"""
    if groups == 1:
        return steps
    return f"""{steps}
    grouped_shape = Constant <value_ints = [0, 0, {groups}, -1]> ()
    grouped = Reshape (choice_whole, grouped_shape)
    group_best = Constant <value_ints = [{best}]> ()
    best_of_group, best_of_group_at = TopK <axis = -1, largest = 1, sorted = 1> (grouped, group_best)
    group_scores = ReduceSum <keepdims = 0> (best_of_group, last_axis)
    groups_kept = Constant <value_ints = [{kept}]> ()
    best_groups, kept = TopK <axis = -1, largest = 1, sorted = 1> (group_scores, groups_kept)
    kept_column = Unsqueeze (kept, last_axis)
    group = Constant <value_ints = [{", ".join(map(str, range(groups)))}]> ()
    is_kept = Equal (kept_column, group)
    is_kept_number = Cast <to = 6> (is_kept)
    slot_axis = Constant <value_ints = [-2]> ()
    kept_times = ReduceMax <keepdims = 0> (is_kept_number, slot_axis)
    is_eligible = Cast <to = 9> (kept_times)
    is_eligible_column = Unsqueeze (is_eligible, last_axis)
    nothing = Constant <value_float = -inf> ()
    eligible = Where (is_eligible_column, grouped, nothing)
    whole_shape = Shape (wide)
    choice = Reshape (eligible, whole_shape)"""

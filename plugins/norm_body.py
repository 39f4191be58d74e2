"""RMSNorm in the ONNX function bodies of ops that have one."""

from __future__ import annotations

from llmexport.plugins.spec import Attribute


def rms_norm(
    source: str, weight: str, target: str, like: str, attributes: dict[str, Attribute], types: dict[str, str]
) -> str:
    """Makes `target` of `source`, in the type of the op's input `like`; names of what is between begin with target's.

    RMSNormalization rounds before the weight; what is rounded after it is normalised in fp32.
    """
    wide = types[like] != "float32" and not attributes["round_before_weight"]
    epsilon, offset = (float(attributes[name]) for name in ("epsilon", "weight_offset"))
    total = f"{target}_total" if wide else source
    shifted = f"""{target}_weight = Cast <to = 1> ({weight})
    {target}_offset = Constant <value_float = {offset}> ()
    {target}_shifted = Add ({target}_weight, {target}_offset)"""
    return f"""
    {f"{total} = Cast <to = 1> ({source})" if wide else ""}
    {shifted if offset else ""}
    {target}_scale = CastLike ({f"{target}_shifted" if offset else weight}, {total})
    {target}_unit = RMSNormalization <axis = -1, epsilon = {epsilon}, stash_type = 1> ({total}, {target}_scale)
    {target} = CastLike ({target}_unit, {like})"""

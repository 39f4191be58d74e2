"""Plugins that sum and norm what MoeExperts makes: MoeExperts, what is added to it, and AddRmsNorm.

    y, sum = AddRmsNorm(MoeExperts(...) [+ [sigmoid(gate) *] shared], residual, norm_weight)

The numbers are those of these operators one after another, each result rounded to the type of y. A plugin's inputs are
MoeExperts' own that every node has, `residual` [B, T, C], `norm_weight` [C], what a shared expert made, as ADDENDS has
it, and the rest of MoeExperts'; its attributes are both ops' and, with a gate, which column of shared_gate [B, T, L] it
is. normed_moe_experts/ has the plugins. Imports neither torch nor TensorRT.
"""

from __future__ import annotations

EXPERTS, NORM = "MoeExperts", "AddRmsNorm"
# What each plugin adds to the experts' sum, before the residual.
ADDENDS: dict[str, tuple[str, ...]] = {
    "NormedMoeExperts": (),
    "NormedSharedMoeExperts": ("shared",),
    "NormedGatedSharedMoeExperts": ("shared", "shared_gate"),
}
GATE_COLUMN = "gate_column"
OWN = 5  # inputs of MoeExperts that every node has


def inputs_of(name: str, experts: list[str]) -> list[str]:
    """The names of a plugin's inputs; `experts` are MoeExperts' own."""
    return [*experts[:OWN], "residual", "norm_weight", *ADDENDS[name], *experts[OWN:]]

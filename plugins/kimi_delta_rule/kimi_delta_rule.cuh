// Two forms of one op: token by token, by GatedDeltaRule's recurrence, and in chunks by two
// kernels.
#pragma once

#include "gated_delta_rule/recurrence.cuh"
#include "kimi_delta_rule/kimi_delta_rule.h"
#include "kimi_delta_rule/prepare.cuh"
#include "kimi_delta_rule/scan.cuh"

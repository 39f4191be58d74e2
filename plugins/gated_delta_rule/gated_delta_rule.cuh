// Two forms of one op: token by token, and in chunks by two kernels.
#pragma once

#include "gated_delta_rule/gated_delta_rule.h"
#include "gated_delta_rule/prepare.cuh"
#include "gated_delta_rule/recurrence.cuh"
#include "gated_delta_rule/scan.cuh"

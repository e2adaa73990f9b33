"""The two ways in which optimizers update weights: the compiled kernel, where this machine can make it, and tensor operations."""

from __future__ import annotations

import pytest

from torchstone.optim.momentum_native import library

HAS_KERNEL = library() is not None
WAYS = {"kernel": True, "tensors": False} if HAS_KERNEL else {"tensors": False}
both_ways = pytest.mark.parametrize("fused", WAYS.values(), ids=list(WAYS))
needs_kernel = pytest.mark.skipif(not HAS_KERNEL, reason="this machine has no C compiler")

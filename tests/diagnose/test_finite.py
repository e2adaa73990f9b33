"""Values that are not finite are reported with the place where they come first."""

from __future__ import annotations

import pytest
import torch

from torchstone.diagnose.finite import require_finite
from torchstone.errors import DataError


def test_the_earliest_token_is_named() -> None:
    values = torch.zeros(2, 3, 5, 4)
    require_finite(2, "blocks.2.mixer", {"keys": values})
    values[0, 1, 4, 0], values[1, 2, 3, 1] = torch.inf, torch.nan
    with pytest.raises(DataError, match=r"layer 2 \(blocks.2.mixer\) has keys .*token 3 of row 1, head 2 "):
        require_finite(2, "blocks.2.mixer", {"queries": torch.zeros(2, 3, 5, 4), "keys": values})

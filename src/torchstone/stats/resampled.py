"""Interval for a mean over random splits of one set of items: the corrected resampled t.

When each "seed" is another random split of the same items into training and test part, the splits share items, so
their mean does not get better as 1/sqrt(splits). Nadeau & Bengio (2003) replace 1/J in the variance of the mean over
J splits by

    1/J + n_test / n_train

which accounts for the overlap of training and of test parts roughly and on the safe side: no unbiased estimate of
this variance exists (Bengio & Grandvalet 2004). docs/statistics.md shows how far on the safe side it is.
"""

from __future__ import annotations

from numpy.typing import ArrayLike

from torchstone.errors import StudyError
from torchstone.stats.contrasts import finite
from torchstone.stats.estimate import Estimate, t_critical, t_estimate


def resampled_estimate(values: ArrayLike, test_share: float, *, level: float = 0.95) -> Estimate:
    """Mean over splits with the corrected resampled t interval.

    Args:
        values: (J,) one contrast per random split.
        test_share: share of the items that each split tests, between 0 and 1.
        level: nominal coverage.

    Raises:
        StudyError: no value, a value that is not finite, or a share outside 0..1.
    """
    values_n = finite(values, "contrasts")
    if not 0 < test_share < 1:
        raise StudyError(f"the share of tested items must lie between 0 and 1; given {test_share!r}.")
    if values_n.size < 2:
        return t_estimate(values_n, level=level)
    inflation = (1 + values_n.size * test_share / (1 - test_share)) ** 0.5
    return t_estimate(values_n, level=level, critical=inflation * t_critical(values_n.size, level))

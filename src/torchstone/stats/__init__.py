"""Statistics of comparisons, as plain functions on arrays (numpy and scipy, no torch).

    contrasts     paired differences and log ratios
    estimate      t interval over seeds
    bootstrap     clustered bootstrap interval over items
    resampled     interval over overlapping random splits
    decision      interval + margin -> holds, fails, inconclusive
    power         minimum detectable effect, units needed
    sequential    adding seeds under a declared group-sequential rule

docs/statistics.md explains each rule and shows its calibration.
"""

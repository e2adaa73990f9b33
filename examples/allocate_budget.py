"""Split a sampling budget over configurations, from a table of successes."""

import numpy as np

import torchstone


def main() -> None:
    # start: allocate
    # two configurations that solve different problems: rows are problems, numbers are successes out of 20 runs
    counts = np.array([[18, 0], [15, 1], [12, 0], [0, 9], [1, 11], [0, 6], [4, 4], [2, 3]])
    allocation = torchstone.allocate(counts, runs=[20, 20], budget=8)
    print(allocation.counts, allocation.train_value, allocation.upper_bound)
    # end: allocate


if __name__ == "__main__":
    main()

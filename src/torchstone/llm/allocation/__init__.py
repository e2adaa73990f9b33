"""Sample allocation: how many samples to draw from which model, temperature or prompt.

Repeated sampling with a verifier solves a problem as soon as one sample is right. Different configurations
solve different problems, so a fixed number of samples is better split over several of them; how, is learned
on problems for which every configuration has been sampled (OSCA; Zhang et al., arXiv 2410.22480, NAACL
2025).
"""

from torchstone.llm.allocation.baselines import (
    CrossValidation,
    cross_validate,
    evaluate_fixed,
    half_split,
    oracle_pure,
    train_selected_pure,
    uniform_mixed,
)
from torchstone.llm.allocation.objectives import pass_at_k
from torchstone.llm.allocation.policy import Allocation, Evaluation, OverlapWarning, allocate, compare
from torchstone.llm.allocation.table import CountTable, read_table

__all__ = [
    "Allocation",
    "CountTable",
    "CrossValidation",
    "Evaluation",
    "OverlapWarning",
    "allocate",
    "compare",
    "cross_validate",
    "evaluate_fixed",
    "half_split",
    "oracle_pure",
    "pass_at_k",
    "read_table",
    "train_selected_pure",
    "uniform_mixed",
]

"""`torchstone eval EVALUATION MODEL`: measure a trained model."""

from __future__ import annotations

from torchstone.cli.analysing import group
from torchstone.evals.catalogue import EVALUATIONS

eval = group("eval", EVALUATIONS, "Measure a torchstone run or a Hugging Face causal language model.")

"""`torchstone diagnose ANALYSIS MODEL`: look inside a trained model, next to a control."""

from __future__ import annotations

from torchstone.cli.analysing import group
from torchstone.diagnose.catalogue import ANALYSES

diagnose = group("diagnose", ANALYSES, "Look inside a torchstone run or a Hugging Face causal language model.")

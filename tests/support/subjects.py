"""A small byte-level decoder as a subject of analyses, and texts for it."""

from __future__ import annotations

from typing import Any

import torch

from torchstone.data.tokenizers import ByteTokenizer
from torchstone.diagnose.adapters import open_subject
from torchstone.diagnose.subject import Subject
from torchstone.models.decoder import DecoderConfig


def byte_subject(seed: int = 0, width: int = 16, **model: Any) -> Subject:
    """Two layers with random weights, large enough to make states differ."""
    config = {
        "width": width,
        "depth": 2,
        "head_dim": 8,
        "initialisation": {"kind": "normal", "std": 0.3},
        **model,
    }
    decoder = DecoderConfig.model_validate(config).build(ByteTokenizer.vocab_size, 32, seed)
    return open_subject(decoder, tokenizer=ByteTokenizer())


def texts(count: int = 24, length: int = 80, seed: int = 0) -> list[str]:
    """Different texts of letters with some regularity: each letter is often followed by the next."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        steps = torch.randint(1, 4, (length,), generator=generator).cumsum(0) % 26
        found.append("".join(chr(97 + int(step)) for step in steps))
    return found

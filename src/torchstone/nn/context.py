"""BuildContext: what a part may know of the model around it when it is built.

A part's own settings are in its configuration; everything it needs from outside (the model's width, which layer it
sits in) arrives here, so that the same configuration serves every layer and every width.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BuildContext:
    """Sizes of the model and the place of the part in it.

    Attributes:
        width: channels of the residual stream (d in `x_btd`).
        head_dim: channels of one attention head, from which mixers without an explicit head count derive theirs.
        depth: number of blocks.
        layer: 0-based index of the block that the part belongs to; 0 for parts outside the blocks.
        vocab_size: number of token ids.
        length: sequence length of training, in tokens.
    """

    width: int
    head_dim: int
    depth: int
    layer: int
    vocab_size: int
    length: int

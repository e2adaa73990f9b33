"""Initial values scaled by what a layer reads, as Griffin and RecurrentGemma have them (De et al., arXiv 2402.19427).

    embeddings N(0, 1/d)      matrices N(0, 1/fan_in)      matrices that write into the residual stream N(0, 2/(L·fan_in))

with variances as second arguments, width d and L blocks; biases are 0. `fan_in` is the number of inputs of one output. What is
no ordinary weight fills itself (gains, gates, convolutions), as under `normal`.

Pitfall: embeddings are small (std 1/√d) because the model multiplies them by √d (`embedding_scale`), while the tied output
matrix is not multiplied.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import nn

from torchstone.nn.initialisation import declared_fills, fill_buffers, generator_for, residual_names
from torchstone.recipe.part import Part


class FanInConfig(Part):
    """`initialisation: fan-in`."""

    family: ClassVar[str] = "initialisation"
    kind: Literal["fan-in"] = "fan-in"

    @torch.no_grad()
    def fill(self, model: nn.Module, depth: int, seed: int) -> None:
        """Give every parameter and every buffer of the model its initial value."""
        own, residual = declared_fills(model), residual_names(model)
        for name, parameter in model.named_parameters():
            value = torch.empty(parameter.shape, dtype=parameter.dtype)
            generator = generator_for(seed, name)
            if name in own:
                own[name](value, generator)
            elif value.dim() < 2:
                value.zero_()
            else:
                fan_in = value.shape[-1]  # of an embedding: the width; experts are stacked, [e, o, i]
                variance = (2 / depth if name in residual else 1.0) / fan_in
                value.normal_(0.0, variance**0.5, generator=generator)
            parameter.copy_(value)
        fill_buffers(model)

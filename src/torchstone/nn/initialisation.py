"""Initial values: every parameter is drawn from a generator of its own, keyed by (seed, parameter name).

So a parameter of equal name and shape starts equal in two models, whatever else differs between them: paired arms of
a comparison share everything that they can share, and adding a layer changes no other layer. Nothing touches torch's
global generator. Values are drawn on the CPU and copied, so they do not depend on the device.

`normal`: weights N(0, std²); token embeddings N(0, embedding_std²); with `scale_residual` the matrices that write into
the residual stream are divided by √(2·depth), so that the stream does not grow with depth (GPT-2). Biases are 0.

Modules speak for themselves through optional methods:
  own_initialisation() -> {local name: fill(tensor, generator)}   what is not an ordinary weight (gains, λ vectors)
  residual_parameters() -> (local name, …)                        weights that write into the residual stream
  fill_buffers()                                                  values of its buffers, which models are built without
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from torchstone.recipe.part import Part

Fill = Callable[[Tensor, torch.Generator], object]


def generator_for(seed: int, name: str) -> torch.Generator:
    """The CPU generator of one named parameter."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def declared_fills(model: nn.Module) -> dict[str, Fill]:
    """Full parameter name → its own way of being filled, from every module that declares one."""
    return {
        f"{prefix}.{local}" if prefix else local: fill
        for prefix, module in model.named_modules()
        for local, fill in getattr(module, "own_initialisation", dict)().items()
    }


def residual_names(model: nn.Module) -> set[str]:
    """Full names of the weights that write into the residual stream."""
    return {
        f"{prefix}.{local}" if prefix else local
        for prefix, module in model.named_modules()
        for local in getattr(module, "residual_parameters", tuple)()
    }


def fill_buffers(model: nn.Module) -> None:
    """Let every module that keeps values beside parameters set them."""
    for module in model.modules():
        getattr(module, "fill_buffers", tuple)()


class NormalConfig(Part):
    """`initialisation: normal`."""

    family: ClassVar[str] = "initialisation"
    kind: Literal["normal"] = "normal"
    std: float = Field(default=0.02, gt=0, description="standard deviation of weights")
    embedding_std: float | None = Field(default=None, gt=0, description="of token embeddings; null: std")
    scale_residual: bool = Field(default=True, description="divide residual outputs by √(2·depth)")

    @torch.no_grad()
    def fill(self, model: nn.Module, depth: int, seed: int) -> None:
        """Give every parameter and every buffer of the model its initial value."""
        own, residual = declared_fills(model), residual_names(model)
        embeddings = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
        embedding_std = self.std if self.embedding_std is None else self.embedding_std
        for name, parameter in model.named_parameters():
            value = torch.empty(parameter.shape, dtype=parameter.dtype)
            generator = generator_for(seed, name)
            if name in own:
                own[name](value, generator)
            elif value.dim() < 2:
                value.zero_()
            elif name in embeddings:
                value.normal_(0.0, embedding_std, generator=generator)
            else:
                scaled = self.scale_residual and name in residual
                value.normal_(0.0, self.std / (2 * depth) ** 0.5 if scaled else self.std, generator=generator)
            parameter.copy_(value)
        fill_buffers(model)

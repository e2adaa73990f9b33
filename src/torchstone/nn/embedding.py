"""Token embedding whose values come from the model's initialisation, not from a constructor.

torch's own embedding draws values when it is made: from the global generator, and on the meta device through code that takes
seconds to import. Shapes: b batch · t tokens · d width.
"""

from __future__ import annotations

from torch import nn

from torchstone.nn.roles import Roles


class TokenEmbedding(nn.Embedding):
    """`nn.Embedding` without values; the initialisation part fills it."""

    def reset_parameters(self) -> None:
        """Nothing: see the module's docstring."""

    def parameter_roles(self) -> Roles:
        """The embedding, which may be the output matrix as well."""
        return {"weight": "embeddings"}

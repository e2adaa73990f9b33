"""Weight decay by role: one number for all matrices, or a number for each role.

    weight_decay: 0.1
    weight_decay: {default: 0.1, attention_qk: 0.0, attention_vo: 0.05}

Decay of the factors of an attention product is a low-rank penalty on the product (arXiv 2410.23819), which is the reason to
give attention a rate of its own. Roles without a number take the default, embeddings too: so a plain number means what it
always meant, the decay of every matrix. Vectors and exempt parameters are never decayed.

Pitfall: the decay of a step is θ ← θ (1 − ηλ) with the scheduled rate η. Two values of λ are to be compared at equal η, and
λ acts only once η · steps · λ is about 1.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from torchstone.recipe.schema import Section

OF_DEFAULT = "null: the default"


class WeightDecay(Section):
    """`optimizer.weight_decay`; a number alone is `default`."""

    plain_form: ClassVar[str] = "number >= 0"
    default: float = Field(default=0.1, ge=0, description="of matrices whose role has no number")
    attention_qk: float | None = Field(default=None, ge=0, description=f"query and key projections; {OF_DEFAULT}")
    attention_vo: float | None = Field(default=None, ge=0, description=f"value and output projections; {OF_DEFAULT}")
    mlp: float | None = Field(default=None, ge=0, description=f"feed-forward layers; {OF_DEFAULT}")
    embeddings: float | None = Field(default=None, ge=0, description=f"embeddings and output matrix; {OF_DEFAULT}")

    @classmethod
    def opened(cls, data: Any) -> Any:
        """A number is the default."""
        return {"default": data} if isinstance(data, int | float) else data

    @model_validator(mode="before")
    @classmethod
    def _from_number(cls, data: Any) -> Any:
        return cls.opened(data)

    @model_serializer(mode="wrap")
    def _as_number(self, handler: SerializerFunctionWrapHandler) -> Any:
        """The number where no role has one, so that equal decay is written, and fingerprinted, in one way."""
        return handler(self) if self.given else self.default

    @property
    def given(self) -> dict[str, float]:
        """Roles that have a number of their own."""
        values = {name: getattr(self, name) for name in type(self).model_fields if name != "default"}
        return {name: value for name, value in values.items() if value is not None}

    def of(self, role: str) -> float:
        """The decay of a role."""
        return self.given.get(role, self.default)

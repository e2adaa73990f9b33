"""DAPE: attention scores processed like a feature map, versions 1 and 2 (Zheng et al., arXiv 2405.14722, 2410.04798).

    X = visible(concat(S, b)),   R = Conv2(LeakyReLU_0.01(Conv1(X))),   processed scores = S + b + R

The maps of all heads are the channels of an image, a row of it the keys of one query. Two small convolutions over the
key axis, which mix heads, read the scores S and the position's bias b (S alone where the position has none: no position,
rotation) and correct the scores. With a kernel of 3 (version 2) a score sees those of the keys to either side, so that
one layer can attend to "the token after the match"; version 1 is the kernel of 1, an MLP over heads for each pair.

`visible` sets to 0 what the query may not see. In the paper that is the lower triangle; here it is the attention's own
mask, so that packed documents, padding, windows and a decoding state give what each sequence alone would give.

Shapes: b batch · u maps · t queries · s keys · d width of the hidden layer · k kernel.

Pitfalls
  causality            the input is cut before the convolution, or key i+1 would be read by query i and training would
                       cheat. The residual S + b is not cut: the softmax's mask does that.
  prefix consistency   after Conv1 the cells just right of the diagonal are not 0 (its bias, and what spills over), and
                       Conv2 reads them, except in the last row, where the padding supplies zeros: the score of the last
                       query for its last (k-1)/2 keys changes when the text goes on, and no decoding step can equal
                       the full pass. `mask_hidden` cuts the hidden layer too, which removes this. Without it the results
                       are those of the authors' code.
  precision            always fp32: a linear bias reaches -4096 at 8k tokens and half types lose its neighbours' distance.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from torchstone.nn.attention.dape_blocked import LARGEST_BLOCK, SLOPE, dape_attention
from torchstone.nn.attention.score_processor import ScoreProcessor
from torchstone.nn.roles import Roles
from torchstone.recipe.part import Part


class DAPE(ScoreProcessor):
    """Two convolutions over the keys of a query; see the module's docstring.

    Args:
        maps: softmax maps per token (heads, or twice as many for differential attention).
        biased: whether the position has a bias, which is then read next to the scores.
        width: channels of the hidden layer.
        kernel: keys that a convolution reads, odd; 1 is version 1.
        mask_hidden: also cut what the query may not see from the hidden layer.
    """

    def __init__(self, maps: int, biased: bool, width: int = 32, kernel: int = 3, mask_hidden: bool = True) -> None:
        super().__init__()
        self.maps, self.biased, self.mask_hidden = maps, biased, mask_hidden
        self.kernel = kernel
        self.reach, self.reads_ahead = kernel // 2, kernel > 1 and not mask_hidden
        padding = (0, self.reach)
        self.conv1 = nn.Conv2d(2 * maps if biased else maps, width, (1, kernel), padding=padding)
        self.conv2 = nn.Conv2d(width, maps, (1, kernel), padding=padding)

    def forward(self, scores_buts: Tensor, bias_buts: Tensor | None, visible_b1ts: Tensor | None) -> Tensor:
        """Processed scores; see `ScoreProcessor`."""
        assert self.biased == (bias_buts is not None)
        with torch.autocast(scores_buts.device.type, enabled=False):
            if bias_buts is None:
                whole_buts, read_bcts = scores_buts, scores_buts
            else:
                bias_buts = bias_buts.to(scores_buts.dtype).expand_as(scores_buts)
                whole_buts, read_bcts = scores_buts + bias_buts, torch.cat([scores_buts, bias_buts], dim=1)
            hidden_bdts = F.leaky_relu(_convolve(self.conv1, _cut(read_bcts, visible_b1ts)), SLOPE)
            if self.mask_hidden:
                hidden_bdts = _cut(hidden_bdts, visible_b1ts)
            return whole_buts + _convolve(self.conv2, hidden_bdts)

    def blocked(
        self,
        q_butd: Tensor,
        k_busd: Tensor,
        v_buse: Tensor,
        bias_buts: Tensor | None,
        allowed_b1ts: Tensor | None,
        scale: float,
    ) -> Tensor | None:
        """On the CPU, by `nn.attention.dape_blocked`."""
        if self.block_rows(q_butd.device) is None:
            return None
        assert self.conv1.bias is not None and self.conv2.bias is not None
        convolutions = self.conv1.weight, self.conv1.bias, self.conv2.weight, self.conv2.bias
        return dape_attention(
            q_butd, k_busd, v_buse, bias_buts, allowed_b1ts, convolutions, scale, self.mask_hidden or self.kernel == 1
        )

    def flops(self, length: int) -> float:
        """Both convolutions over `length` keys."""
        return 2.0 * length * (self.conv1.weight.numel() + self.conv2.weight.numel())

    def kept_values(self, length: int) -> int:
        """By the operator: scores, hidden layer and maps of the keys that a query sees, half of them on average."""
        return (2 * self.maps + self.conv1.out_channels) * length // 2

    def kept_at_once(self, length: int) -> int:
        """Of all keys: what Conv1 reads, the hidden layer before and after its mask, and the maps before and after dropout."""
        return (self.conv1.in_channels + 2 * self.conv1.out_channels + 2 * self.maps) * length

    def block_rows(self, device: torch.device) -> int | None:
        """The operator is the CPU's."""
        return LARGEST_BLOCK if device.type == "cpu" else None

    def parameter_roles(self) -> Roles:
        """Neither product of an attention holds them."""
        return {"conv1.weight": "other", "conv2.weight": "other"}

    def own_initialisation(self) -> dict[str, Callable[[Tensor, torch.Generator], object]]:
        """torch's own initialisation of convolutions, whatever the model's: U(±1/√(inputs · kernel))."""
        convolutions = {"conv1": self.conv1, "conv2": self.conv2}
        return {
            f"{name}.{kind}": _uniform((conv.in_channels * self.kernel) ** -0.5)
            for name, conv in convolutions.items()
            for kind in ("weight", "bias")
        }


def _uniform(bound: float) -> Callable[[Tensor, torch.Generator], object]:
    return lambda value, generator: value.uniform_(-bound, bound, generator=generator)


def _cut(x_bcts: Tensor, visible_b1ts: Tensor | None) -> Tensor:
    """0 where the query may not see."""
    return x_bcts if visible_b1ts is None else x_bcts.masked_fill(~visible_b1ts, 0.0)


def _convolve(conv: nn.Conv2d, x_bcts: Tensor) -> Tensor:
    """The convolution in the precision of its input, whatever its weights are stored in."""
    assert conv.bias is not None
    weight, bias = conv.weight.to(x_bcts.dtype), conv.bias.to(x_bcts.dtype)
    return F.conv2d(x_bcts, weight, bias, padding=(0, weight.shape[-1] // 2))


class DAPEConfig(Part):
    """`score_processor: dape`: convolutions over the scores, which also read the position's bias."""

    family: ClassVar[str] = "score_processor"
    kind: Literal["dape"] = "dape"
    version: Literal["v1", "v2"] = Field(default="v2", description="v1 reads one key at a time, v2 its neighbours too")
    width: int = Field(default=32, gt=0, description="channels of the hidden layer")
    kernel: int | None = Field(default=None, description="odd number of keys that a convolution of v2 reads; null: 3")
    mask_hidden: bool = Field(
        default=True, description="v2: cut what a query may not see from the hidden layer too; false: as published"
    )

    @model_validator(mode="after")
    def _fits(self) -> DAPEConfig:
        if self.version == "v1" and self.kernel is not None:
            raise ValueError(
                f"version v1 reads one key at a time and was given kernel {self.kernel}; leave kernel out, or choose "
                "version v2."
            )
        if self.version == "v1" and not self.mask_hidden:
            raise ValueError("mask_hidden false changes nothing in version v1; leave it out, or choose version v2.")
        if self.kernel is not None and (self.kernel < 1 or self.kernel % 2 == 0):
            raise ValueError(
                f"kernel {self.kernel} has no key in its middle; choose an odd number of at least 1, such as 3."
            )
        if self.kernel == 1 and not self.mask_hidden:
            raise ValueError(
                "mask_hidden false changes nothing with kernel 1, which reads one key at a time; leave mask_hidden out, or "
                "choose kernel 3 or more."
            )
        return self

    def build(self, maps: int, biased: bool) -> DAPE:
        """The module for `maps` maps, whose position has a bias or has none."""
        if self.version == "v1":
            return DAPE(maps, biased, self.width, kernel=1)
        return DAPE(maps, biased, self.width, 3 if self.kernel is None else self.kernel, self.mask_hidden)

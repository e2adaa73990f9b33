"""Cross-entropy of a mixture of softmaxes in chunks: the sibling of `next_token` for heads with several feature vectors.

    loss_n = -log Σ_k π_nk · softmax(W s_nk)[y_n],   γ_nk = π_nk softmax(W s_nk)[y_n] / p_n   (responsibilities)
    ∂loss/∂log π_nk = -γ_nk,   ∂loss/∂(W s_nk) = γ_nk · (softmax(W s_nk) − one-hot(y_n))

so the gradient of a component is that of a plain softmax, weighted by its responsibility. As there, the forward pass
leaves gradients and the backward pass only scales them.

Shapes: n tokens · c tokens of a chunk · k components · d channels of a feature vector · v vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchstone.data.batch import IGNORE


class MixtureCrossEntropy(torch.autograd.Function):
    """(states_nkd, log_prior_nk, weight_vd, targets_n) → (sum of losses, losses_n); with weights_n, a weighted sum."""

    @staticmethod
    def forward(
        ctx: Any,
        states_nkd: Tensor,
        log_prior_nk: Tensor,
        weight_vd: Tensor,
        targets_n: Tensor,
        chunk: int,
        dtype: torch.dtype,
        weights_n: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Losses, and what the backward pass will scale."""
        cast_nkd, cast_vd = states_nkd.to(dtype), weight_vd.to(dtype)
        losses_n = torch.empty_like(targets_n, dtype=torch.float32)
        grad_states_nkd, grad_prior_nk = torch.empty_like(states_nkd), torch.empty_like(log_prior_nk)
        grad_weight_vd = torch.zeros_like(weight_vd, dtype=torch.float32)
        for start in range(0, states_nkd.shape[0], chunk):
            rows = slice(start, start + chunk)
            states_ckd, targets_c = cast_nkd[rows], targets_n[rows]
            valid_c1 = (targets_c != IGNORE).unsqueeze(1)
            log_p_ckv = F.linear(states_ckd, cast_vd).float().log_softmax(-1)
            index_ck1 = targets_c.clamp(min=0)[:, None, None].expand(-1, log_p_ckv.shape[1], 1)
            joint_ck = log_prior_nk[rows].float() + log_p_ckv.gather(2, index_ck1).squeeze(2)
            log_p_c1 = joint_ck.logsumexp(1, keepdim=True)
            losses_n[rows] = torch.where(valid_c1, -log_p_c1, 0.0).squeeze(1)
            scale_c1 = valid_c1 if weights_n is None else valid_c1 * weights_n[rows, None]
            share_ck1 = ((joint_ck - log_p_c1).exp() * scale_c1).unsqueeze(2)
            grad_prior_nk[rows] = -share_ck1.squeeze(2)
            minus_one_ck1 = torch.full_like(index_ck1, -1, dtype=torch.float32)
            grad_ckv = log_p_ckv.exp_().scatter_add_(2, index_ck1, minus_one_ck1).mul_(share_ck1).to(dtype)
            grad_states_nkd[rows] = grad_ckv @ cast_vd
            grad_weight_vd += grad_ckv.flatten(0, 1).t() @ states_ckd.flatten(0, 1)
        ctx.save_for_backward(grad_states_nkd, grad_prior_nk, grad_weight_vd.to(weight_vd.dtype))
        ctx.mark_non_differentiable(losses_n)
        return (losses_n if weights_n is None else losses_n * weights_n).sum(), losses_n

    @staticmethod
    def backward(ctx: Any, grad_sum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Scale what the forward pass left."""
        return *(saved * grad_sum.to(saved.dtype) for saved in ctx.saved_tensors), None, None, None, None

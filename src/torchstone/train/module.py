"""Model and objective as one module whose forward pass is a training step's loss.

DDP hooks and `torch.compile` work on a module's forward pass, so loss and model must be inside one.
"""

from __future__ import annotations

from torch import Tensor, nn

from torchstone.data.batch import Batch


class TrainingModule(nn.Module):
    """`forward(batch) -> (what is minimised, sum of losses)`, both sums over the batch's targets."""

    def __init__(self, model: nn.Module, objective: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Loss of a batch; see `LossOutput` of the objective. The two differ by auxiliary losses."""
        output = self.objective(self.model, batch)
        return output.minimised, output.loss_sum.detach()

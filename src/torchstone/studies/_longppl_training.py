"""Fine-tuning by weighted losses: a model of short rows learns to use long ones, with LongCE or one of its rivals.

A decoder is first trained on rows no longer than the short context, which teaches it everything near and nothing far. Fine-tuning
at the full length then differs in the weights of the loss alone. Two kinds of rows:

    tags    a row begins with one of some tags, and each marker is followed by the tag again; markers are further apart than any
            window reaches, and all other tokens are drawn at random. The tokens after markers are far, by construction.
    text    source code; far tokens are those that an independently trained evaluator finds key.

Shapes: b rows · t tokens.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor

from torchstone.data.batch import IGNORE, Batch
from torchstone.data.cache import cache_folder
from torchstone.data.text import TextConfig
from torchstone.evals.longppl_keys import key_tokens
from torchstone.lab.study import Cell, Measurement, Resources
from torchstone.models.decoder import Decoder, DecoderConfig
from torchstone.objectives.long_context import LongContext, LongContextConfig
from torchstone.objectives.next_token import NextToken, head_scores
from torchstone.recipe.fingerprint import device_class
from torchstone.storage.atomic import atomic_write
from torchstone.train.precision import default_device

EVALUATOR = 10**6  # seed of the evaluator, of no cell
WARMUP, CLIP = 20, 1.0


@dataclass(frozen=True)
class Tags:
    """Rows of tags; ids: tags, fillers, marker."""

    tags: int
    fillers: int
    every: int
    length: int

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.tags + self.fillers + 1

    def batch(self, seed: int, step: int, size: int) -> Batch:
        """Rows of one step of one seed."""
        draw = np.random.default_rng([seed, step])
        tokens = draw.integers(self.tags, self.tags + self.fillers, (size, self.length + 1))
        tokens[:, 0] = draw.integers(self.tags, size=size)
        tokens[:, self.every - 1 :: self.every] = self.vocab_size - 1
        tokens[:, self.every :: self.every] = tokens[:, :1]
        rows = torch.from_numpy(tokens)
        return Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())

    def far(self, batch: Batch) -> Tensor:
        """bool [b, t]: targets that stand after a marker."""
        return batch.tokens_bt == self.vocab_size - 1


def data_of(settings: Mapping[str, Any]) -> Any:
    """The rows of a scale: `Tags`, or text as recipes have it."""
    if "tags" in settings:
        return Tags(settings["tags"], settings["fillers"], settings["every"], settings["row"])
    tokenizer = {"kind": "bpe", "vocab_size": settings["vocabulary"]}
    return TextConfig.model_validate({"tokenizer": tokenizer, "length": settings["row"]}).build(cache_folder())


class Shuffled(LongContext):
    """LongCE's weights given to other targets of the batch: the same numbers at the wrong places."""

    def __init__(self, config: LongContextConfig) -> None:
        super().__init__(config)
        self._draw = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def weigh(self, model: Any, batch: Batch, hidden_btd: Tensor) -> Tensor:
        """See `LongContext`."""
        weights_bt = super().weigh(model, batch, hidden_btd)
        valid_bt = batch.targets_bt != IGNORE
        found_n = weights_bt[valid_bt]
        moved_bt = weights_bt.clone()
        moved_bt[valid_bt] = found_n[torch.randperm(len(found_n), generator=self._draw).to(found_n.device)]
        return moved_bt


class ByLoss(LongContext):
    """min(exp(loss − mean loss), γ): hard tokens, whatever their context."""

    @torch.no_grad()
    def weigh(self, model: Any, batch: Batch, hidden_btd: Tensor) -> Tensor:
        """See `LongContext`."""
        valid_bt = batch.targets_bt != IGNORE
        losses_n, _ = head_scores(model.head, hidden_btd.flatten(0, 1), batch.targets_bt.flatten())
        losses_bt = losses_n.view(valid_bt.shape)
        mean = losses_bt.sum() / valid_bt.sum()
        return (losses_bt - mean).exp().clamp(max=self.pipeline.truncate) * valid_bt

    def flops(self, model: Any, length: int) -> float:
        """No windows: the head once more."""
        return float(model.flops(length) + model.head.flops() / 3)


def objective_of(arm: Mapping[str, Any], settings: Mapping[str, Any]) -> NextToken:
    """The loss of an arm."""
    if arm["weights"] == "none":
        return NextToken()
    config = LongContextConfig(
        trunc_len=settings["short"], stride=settings["step_of_windows"], gamma=arm["gamma"], normalize=arm["normalize"]
    )
    kinds = {"shuffled": Shuffled, "loss": ByLoss}
    return kinds[arm["weights"]](config) if arm["weights"] in kinds else config.build()


def cost(objective: NextToken, model: Decoder, length: int) -> float:
    """Training FLOPs per token."""
    own = getattr(objective, "flops", None)
    return 3.0 * float(model.flops(length) if own is None else own(model, length))


def train_on(model: Decoder, objective: NextToken, batches: Any, steps: int, learning_rate: float) -> float:
    """Train a model in place; the mean weight of its targets."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    device = model.embed.weight.device
    weights: list[float] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / WARMUP)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            found = objective(model, batches(step).to(device))
        found.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if found.weights_bt is not None:
            weights.append(float(found.weights_bt.sum() / found.count))
    model.eval()
    return float(np.mean(weights)) if weights else 1.0


def build(settings: Mapping[str, Any], vocabulary: int, seed: int) -> Decoder:
    """An untrained decoder on the device of this process."""
    sizes = {name: settings[name] for name in ("width", "depth", "head_dim")}
    initialisation = {"kind": "normal", "std": 0.1, "embedding_std": 0.5, "scale_residual": False}
    start = (
        {"initialisation": initialisation} if "tags" in settings else {}
    )  # small widths learn slowly from small weights
    return (
        DecoderConfig.model_validate({**sizes, **start}).build(vocabulary, settings["row"], seed).to(default_device())
    )


def kept(path: Path, settings: Mapping[str, Any], data: Any, seed: int, rows: int, steps: int) -> Decoder:
    """A model trained on rows cut to `rows` tokens, from its file or trained now and written."""
    model = build(settings, data.vocab_size, seed)
    if path.is_file():
        model.load_state_dict(load(path.read_bytes()))
        return model.eval()

    def cut(step: int) -> Batch:
        batch = data.batch(seed + 1, step, settings["batch"])
        start = step * 7919 % max(1, data.length - rows + 1)  # any place of a row, so that positions are no clue
        return Batch(batch.tokens_bt[:, start : start + rows], batch.targets_bt[:, start : start + rows])

    train_on(model, NextToken(), cut, steps, settings["learning_rate"])
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    atomic_write(path, save(state))
    return model


def prepare(settings: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """The models that fine-tuning starts from, and the evaluator where rows are text."""
    data = data_of(settings)
    for seed in range(settings["seeds"]):
        kept(directory / f"base-{seed}.safetensors", settings, data, seed, settings["short"], settings["base_steps"])
    if "tags" not in settings:
        path = directory / "evaluator.safetensors"
        kept(path, settings, data, EVALUATOR, data.length, settings["evaluator_steps"])
    return {"folder": str(directory)}


@torch.no_grad()
def losses_of(model: Decoder, batch: Batch) -> tuple[Tensor, Tensor]:
    """Losses [b, t] and whether targets are ranked first."""
    hidden_btd = model(batch.tokens_bt).hidden_btd
    losses_n, right_n = head_scores(model.head, hidden_btd.flatten(0, 1), batch.targets_bt.flatten())
    return losses_n.view(batch.targets_bt.shape), right_n.view(batch.targets_bt.shape)


def far_targets(settings: Mapping[str, Any], data: Any, batch: Batch, folder: Path) -> Tensor:
    """bool [b, t]: by construction, or the evaluator's key tokens."""
    if isinstance(data, Tags):
        return data.far(batch)
    rows, path = data.length, folder / "evaluator.safetensors"
    judge = kept(path, settings, data, EVALUATOR, rows, settings["evaluator_steps"])
    full_bt, short_bt = judged(judge, batch, settings["short"], settings["step_of_windows"])
    key_bt = key_tokens(full_bt, short_bt, settings["alpha"], settings["beta"])
    return torch.from_numpy(key_bt).to(batch.targets_bt.device) & (batch.targets_bt != IGNORE)


def judged(
    judge: Decoder, batch: Batch, trunc_len: int, stride: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Full and short losses [b, t] of an evaluator; short ones are nan where no window scores a target."""
    windows = LongContextConfig(trunc_len=trunc_len, stride=stride).build()
    full_bt, short_bs = losses_of(judge, batch)[0], windows.short_losses(judge, batch)
    short_bt = torch.full_like(full_bt, torch.nan)
    short_bt[:, full_bt.shape[1] - short_bs.shape[1] :] = short_bs
    return full_bt.cpu().numpy(), short_bt.cpu().numpy()


def resources() -> Resources:
    """One thread on a CPU; the GPUs where there are any."""
    if device_class() != "cuda":
        return Resources()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return Resources(devices=tuple(visible.split(",") if visible else map(str, range(torch.cuda.device_count()))))


def measure(cell: Cell) -> Measurement:
    """Fine-tune one arm from the seed's short-context model and take its numbers."""
    settings, arm = cell.settings, cell.arm.settings
    data, folder = data_of(settings), Path(cell.prepared["folder"])
    model = kept(
        folder / f"base-{cell.seed}.safetensors", settings, data, cell.seed, settings["short"], settings["base_steps"]
    )
    objective = objective_of(arm, settings)
    per_token, steps = cost(objective, model, data.length), settings["steps"]
    if arm["equal_flops"]:
        longce = LongContextConfig(trunc_len=settings["short"], stride=settings["step_of_windows"]).build()
        steps = round(steps * cost(longce, model, data.length) / per_token)
    mean_weight = train_on(
        model,
        objective,
        lambda step: data.batch(cell.seed + 2 * EVALUATOR, step, settings["batch"]),
        steps,
        settings["learning_rate"],
    )
    held_out = data.batch(3 * EVALUATOR, 0, settings["evaluate"]).to(model.embed.weight.device)
    far_bt = torch.cat([far_targets(settings, data, piece, folder) for piece in held_out.split(8)])
    found = [losses_of(model, piece) for piece in held_out.split(8)]
    losses_bt, right_bt = (torch.cat(column) for column in zip(*found, strict=True))
    tokens = steps * settings["batch"] * data.length
    metrics = {
        "loss": float(losses_bt[held_out.targets_bt != IGNORE].mean()),
        "far_loss": float(losses_bt[far_bt].mean()),
        "recall": float(right_bt[far_bt].float().mean()),
    }
    extra = {"mean_weight": mean_weight, "steps": steps}
    return Measurement(metrics=metrics, extra=extra, tokens=tokens, flops=tokens * per_token)

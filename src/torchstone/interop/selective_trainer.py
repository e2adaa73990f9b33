"""Selective language modelling with the Trainer of Hugging Face transformers (Rho-1, arXiv 2404.07965).

    trainer = SelectiveTrainer(model=model, args=args, train_dataset=data, rule=Rule(ratio=0.6), reference=small_model)

Selects the tokens of one optimizer step together, over devices and accumulated batches, and divides by the number selected there,
which is what `num_items_in_batch` is for the plain loss. With several accumulated batches their scores are computed beforehand,
for one more forward pass; `Rule(scope="micro")` does without. Evaluation gives the plain loss.

Logits are never held at once: where the model's output layer stands, losses and their gradients are made in chunks from hidden
states. Models whose logits are not hidden states times one matrix (soft caps, scales, biases) need
`full_logits=True`; the first batch is checked.

Reference losses come from `reference`, a causal language model with the same tokenizer, or from a column of the data set that
holds for each token its loss given those before it, aligned with `labels`: the first one of a row is not used. The collator does
not see this column; it is padded with 0 as the labels are.

`SelectiveMixin` adds the same to another subclass of Trainer: `class Mine(SelectiveMixin, SFTTrainer)`.

Shapes: b rows · t tokens · v vocabulary.

Pitfalls
- With dropout, scores of accumulated batches draw their own; those of a single batch are of the pass that is trained on.
- Refused, because their loss would be another one: label smoothing, `compute_loss_func`, and the auxiliary loss of a router
  (`output_router_logits`).
- Labels that are shifted already (`shift_labels`) are refused. Ties between ranks go to the lower rank.
- One process per GPU: start with torchrun or accelerate. DeepSpeed and FSDP, which share out the output layer, are not supported.
  The path on GPUs is not yet run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchstone.data.batch import IGNORE
from torchstone.errors import ConfigError, DataError, DependencyError
from torchstone.objectives.selection import READS_LOSS, READS_REFERENCE, Evidence, Rule, chosen, scored
from torchstone.objectives.selective_loss import Predictions, shifted, token_entropies, token_losses
from torchstone.train.distributed import World

try:
    from transformers import Trainer
except ImportError as error:
    raise DependencyError("SelectiveTrainer needs transformers: pip install 'torchstone[hf]'") from error

WEIGHTS, COUNT, ROWS = "selective_weights", "selective_count", "selective_rows"
CHECKED = 8  # tokens whose logits are compared with those of the model itself
AGREEMENT = 1e-2


class Reader:
    """Hidden states and output matrix of a causal language model of transformers.

    Args:
        model: the model itself, without wrappers.
        full_logits: take the model's own logits, all at once.
    """

    def __init__(self, model: Any, full_logits: bool = False) -> None:
        self.model, self.full_logits = model, full_logits
        self.checked = full_logits
        self._work: Callable[[Predictions], Tensor] | None = None
        self._taken = torch.compiler.disable(self._take)  # one object, so that a compiled model is not compiled again

    def predictions(self, inputs: Mapping[str, Any]) -> Predictions:
        """Predictions at every token; arguments and errors as in `apply`."""
        if self.full_logits:
            return self.model(**inputs).logits
        return self.apply(lambda found: found[0], inputs), self.model.get_output_embeddings().weight

    def apply(
        self, work: Callable[[Predictions], Tensor], inputs: Mapping[str, Any], call: Callable[..., Any] | None = None
    ) -> Tensor:
        """`work` of the predictions at every token, done where the model's output layer stands.

        There, inside the forward pass, DDP sees that the output matrix is used.

        Args:
            work: differentiable function of the predictions.
            inputs: of the model, without labels.
            call: what runs the model; None: the model itself.

        Raises:
            ConfigError: the model's logits are not its hidden states times its output matrix.
        """
        call = self.model if call is None else call  # a compiled model has a length, and so no truth
        if self.full_logits:
            return work(call(**inputs).logits)
        if not self.checked:
            self._check(inputs)
        head = self.model.get_output_embeddings()
        before, self._work = self._work, work
        head.forward = self._taken
        try:
            return call(**inputs).logits
        finally:
            del head.forward
            self._work = before

    def _take(self, hidden: Tensor) -> Tensor:
        """What stands in the place of the output layer."""
        assert self._work is not None
        return self._work((hidden, self.model.get_output_embeddings().weight))

    @torch.no_grad()
    def _check(self, inputs: Mapping[str, Any]) -> None:
        head = self.model.get_output_embeddings()
        advice = "give full_logits=True, which takes the model's own logits, all at once."
        if not isinstance(head, nn.Linear) or head.bias is not None:
            kind = "bias" if isinstance(head, nn.Linear) else f"{type(head).__name__} as output layer"
            raise ConfigError(
                f"{type(self.model).__name__} has a {kind}, and losses in chunks need one matrix; {advice}"
            )
        few = {"input_ids": inputs["input_ids"][:1, :CHECKED]}
        was_training = self.model.training
        self.model.eval()
        self.checked = True
        try:
            logits = self.model(**few).logits
            ours = self.apply(lambda found: found[0], few).to(head.weight.dtype) @ head.weight.t()
        finally:
            self.checked = False
            self.model.train(was_training)
        if float((logits - ours).abs().max()) > AGREEMENT * float(logits.abs().max()):
            raise ConfigError(
                f"the logits of {type(self.model).__name__} are not its hidden states times its output matrix (a soft cap or a "
                f"scale comes after it); {advice}"
            )
        self.checked = True


class WithReference:
    """A collator that pads stored reference losses, beside another one that does not know of them.

    Args:
        collator: of the other columns.
        column: list of losses, one per token.
        side: on which rows are padded.
    """

    def __init__(self, collator: Callable[[list[Any]], Any], column: str, side: str) -> None:
        self.collator, self.column = collator, column
        self.side = getattr(getattr(collator, "tokenizer", None), "padding_side", side)

    def __call__(self, features: list[Any]) -> Any:
        """The batch; raises DataError for a row that has not one loss per token."""
        if not features or not all(isinstance(one, Mapping) and self.column in one for one in features):
            return self.collator(features)
        batch = self.collator([{name: one[name] for name in one if name != self.column} for one in features])
        width = batch["labels" if "labels" in batch else "input_ids"].shape[1]
        padded_bt = torch.zeros(len(features), width)
        for row, one in enumerate(features):
            losses_t = torch.as_tensor(one[self.column], dtype=torch.float32)
            tokens = len(one["input_ids"])
            if len(losses_t) != tokens or tokens > width:
                raise DataError(
                    f"row {row} of the batch has {tokens} tokens, {len(losses_t)} {self.column}, and {width} places; give one "
                    "loss per token, and rows that the collator does not shorten."
                )
            begin = width - tokens if self.side == "left" else 0
            padded_bt[row, begin : begin + tokens] = losses_t
        batch[self.column] = padded_bt
        return batch


class SelectiveMixin:
    """Selection for a Trainer; see the module's docstring.

    Args:
        rule: which tokens; None: 60 % by excess loss.
        reference: causal language model with the same vocabulary; it is frozen and put into evaluation mode.
        reference_column: column of stored reference losses, used where there is no reference model.
        full_logits: hold all logits, for models whose output is more than one matrix.
        chunk: tokens whose logits exist at once.
        given, settings: of the Trainer.
    """

    data_collator: Any
    loss_is_scaled_for_ga: bool | None = True  # transformers: do not divide by the number of accumulated batches again
    accelerator: Any
    args: Any
    model: Any
    state: Any
    model_accepts_loss_kwargs: bool
    _signature_columns: Any

    def __init__(
        self,
        *given: Any,
        rule: Rule | None = None,
        reference: Any = None,
        reference_column: str = "reference_losses",
        full_logits: bool = False,
        chunk: int | None = None,
        **settings: Any,
    ) -> None:
        self.rule, self.reference_column, self.chunk = rule or Rule(), reference_column, chunk
        super().__init__(*given, **settings)
        self._check_trainer()
        side = getattr(getattr(self, "processing_class", None), "padding_side", "right")
        self.data_collator = WithReference(self.data_collator, reference_column, side)
        self._reader = Reader(self.accelerator.unwrap_model(self.model), full_logits)
        self._reference: Reader | None = None
        if reference is not None:
            self._check_reference(reference)
            reference.eval().requires_grad_(False).to(self.args.device)
            self._reference = Reader(reference, full_logits)
        self._world = World(self.accelerator.process_index, self.accelerator.num_processes, self.args.device)
        self._tally = torch.zeros(4, dtype=torch.float64, device=self.args.device)

    def _check_trainer(self) -> None:
        """Raise what this Trainer cannot do."""
        if self.args.n_gpu > 1:
            raise ConfigError(
                f"one process drives {self.args.n_gpu} GPUs; selection needs a process for each: start with torchrun."
            )
        if self.args.label_smoothing_factor:
            raise ConfigError(
                f"label_smoothing_factor is {self.args.label_smoothing_factor}, and the loss of selected tokens is not smoothed; "
                "set it to 0."
            )
        if getattr(self, "compute_loss_func", None) is not None:
            raise ConfigError(
                "compute_loss_func was given, and SelectiveTrainer has a loss of its own; leave one of them out."
            )
        if getattr(getattr(self.model, "config", None), "output_router_logits", False):
            raise ConfigError(
                f"{type(self.model).__name__} adds an auxiliary loss of its router (output_router_logits), which "
                "SelectiveTrainer does not compute; set model.config.output_router_logits = False to train without it."
            )
        wrapped = [name for name in ("is_deepspeed_enabled", "is_fsdp_enabled") if getattr(self, name, False)]
        if wrapped:
            raise ConfigError(f"SelectiveTrainer does not support {wrapped[0].split('_')[1]}; use DDP.")
        if self.rule.score == "oracle":
            raise ConfigError("score oracle needs flags of noise, which a Trainer's data has not; take another score.")
        if not hasattr(Trainer, "loss_is_scaled_for_ga") and not self.model_accepts_loss_kwargs:
            raise DependencyError(
                f"this transformers would divide the loss of {type(self.model).__name__} twice; pip install -U transformers"
            )

    def _check_reference(self, reference: Any) -> None:
        if self.rule.score not in READS_REFERENCE | {"entropy"}:
            raise ConfigError(f"score {self.rule.score} reads no reference, and a reference was given; leave it out.")
        theirs, ours = (one.get_output_embeddings().weight.shape[0] for one in (reference, self._reader.model))
        if theirs != ours:
            raise ConfigError(
                f"reference vocab {theirs} ≠ model vocab {ours}; give a reference with the model's tokenizer."
            )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        if self._signature_columns is not None and self.reference_column not in self._signature_columns:
            self._signature_columns.append(self.reference_column)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list, Any]:
        """The batches of one optimizer step, with what selection needs to know of all of them."""
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        if samples:
            samples = [dict(sample) for sample in samples]
            self._prepare_step(samples)
        return samples, items

    def _prepare_step(self, samples: list[dict[str, Any]]) -> None:
        valid = [_targets(sample) != IGNORE for sample in samples]
        own = torch.tensor([float(sum(len(one) for one in valid)), float(self._counted(valid))])
        rows, counts = (self._world.gather(one.to(self.args.device)).long().tolist() for one in own[:, None])
        total = sum(counts)
        if not total:
            raise DataError(f"no token of step {self.state.global_step} has a label; check what the collator masks.")
        if self.rule.scope == "global" and self.rule.score != "soft":
            total = self.rule.number(total)
        first = self.state.global_step * sum(rows) + sum(rows[: self._world.rank])
        for sample, one in zip(samples, valid, strict=True):
            sample[COUNT] = total
            sample[ROWS] = range(first, first + len(one))
            first += len(one)
        if len(samples) > 1 and self.rule.scope == "global" and not self.rule.everything:
            for sample, weights_bt in zip(samples, self._plan(samples), strict=True):
                sample[WEIGHTS] = weights_bt

    def _counted(self, valid: list[Tensor]) -> int:
        """What these batches add to the divisor: their targets if all are ranked together, else those selected."""
        if self.rule.scope == "global" or self.rule.score == "soft":
            return sum(int(one.sum()) for one in valid)
        if self.rule.scope == "micro":
            return sum(self.rule.number(int(one.sum())) for one in valid)
        return sum(self.rule.number(count) for one in valid for count in one.sum(1).tolist())

    @torch.no_grad()
    def _plan(self, samples: list[dict[str, Any]]) -> list[Tensor]:
        """Weights of the tokens of accumulated batches, ranked together with those of other ranks."""
        scores = []
        self.model.train()
        for sample in samples:
            inputs = self._prepare_inputs(sample)  # type: ignore[attr-defined]
            losses_bt = None
            if self.rule.score in READS_LOSS:
                targets_bt = _targets(inputs)
                with self.accelerator.autocast():
                    losses_n, _ = token_losses(self._reader.predictions(self._plain(inputs)), targets_bt, self.chunk)
                losses_bt = losses_n.view(targets_bt.shape)
            scores.append(self._scores(inputs, losses_bt))
        return [one.weights_bt for one in chosen(self.rule, scores, self._world)]

    @torch.no_grad()
    def _scores(self, inputs: Mapping[str, Any], losses_bt: Tensor | None) -> Tensor:
        targets_bt = _targets(inputs)
        stored_bt, entropy_bt = inputs.get(self.reference_column), None
        reference_bt = None if stored_bt is None else shifted(stored_bt, 0.0)
        if self._reference is not None:
            with self.accelerator.autocast():
                theirs = self._reference.predictions(self._plain(inputs))
                reference_bt = token_losses(theirs, targets_bt, self.chunk)[0].view(targets_bt.shape)
                if self.rule.score == "entropy":
                    entropy_bt = token_entropies(theirs, self.chunk).view(targets_bt.shape)
        if reference_bt is None and self.rule.score in READS_REFERENCE:
            raise ConfigError(
                f"score {self.rule.score} needs reference losses; give SelectiveTrainer reference=MODEL, or data with the column "
                f"{self.reference_column}."
            )
        rows = inputs.get(ROWS, ())
        return scored(self.rule, Evidence(targets_bt != IGNORE, losses_bt, reference_bt, entropy_bt, None, rows))

    def _plain(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What the model itself takes."""
        ours = {WEIGHTS, COUNT, ROWS, self.reference_column, "labels"}
        return {name: value for name, value in inputs.items() if name not in ours}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of a batch: its selected tokens' losses over the number selected in the whole step.

        Called outside of training by the Trainer (evaluation), it is the plain loss.
        """
        if not model.training:
            plain = {**self._plain(inputs), **{name: inputs[name] for name in ("labels",) if name in inputs}}
            return super().compute_loss(model, plain, return_outputs, num_items_in_batch)  # type: ignore[misc]
        targets_bt = _targets(inputs)
        counts: list[int] = []

        def work(predictions: Predictions) -> Tensor:
            with self.accelerator.autocast():
                losses_n, weighted = token_losses(predictions, targets_bt, self.chunk)
                losses_bt = losses_n.view(targets_bt.shape)
                weights_bt = self._weights(inputs, losses_bt)
                counts.append(self._note(targets_bt, losses_bt, weights_bt))
                return weighted(weights_bt.flatten())

        loss_sum = self._reader.apply(work, self._plain(inputs), model)
        loss = loss_sum / max(inputs.get(COUNT, counts[0]), 1) * self._world.size
        return (loss, {}) if return_outputs else loss

    def _note(self, targets_bt: Tensor, losses_bt: Tensor, weights_bt: Tensor) -> int:
        """Add a batch to what is recorded; returns what its own sum of losses would be divided by."""
        valid_bt, selected_bt = targets_bt != IGNORE, weights_bt > 0
        sums = (valid_bt.sum(), selected_bt.sum(), (losses_bt * selected_bt).sum(), losses_bt.sum())
        tally = torch.stack([one.double() for one in sums])
        self._tally += tally
        return int(tally[0] if self.rule.score == "soft" else tally[1])

    def _weights(self, inputs: Mapping[str, Any], losses_bt: Tensor) -> Tensor:
        if WEIGHTS in inputs:
            return inputs[WEIGHTS]
        if self.rule.everything:
            return (_targets(inputs) != IGNORE).float()
        return chosen(self.rule, [self._scores(inputs, losses_bt)], self._world)[0].weights_bt

    def log(self, logs: dict[str, float], *given: Any, **settings: Any) -> None:
        """Adds to the training record, since the last one: `mean_loss` of all tokens, `selected_share`, `unselected_loss`."""
        if "loss" in logs:
            tokens, selected, selected_loss, loss = self._world.total(self._tally.clone()).tolist()
            self._tally.zero_()
            if tokens:
                logs |= {"mean_loss": loss / tokens, "selected_share": selected / tokens}
            if tokens > selected:
                logs["unselected_loss"] = (loss - selected_loss) / (tokens - selected)
        super().log(logs, *given, **settings)  # type: ignore[misc]


def _targets(inputs: Mapping[str, Any]) -> Tensor:
    """Labels, moved to the position that predicts them."""
    if "labels" not in inputs or "shift_labels" in inputs:
        given = ", ".join(sorted(inputs))
        raise ConfigError(
            f"batches hold {given}; selection needs labels [b, t] that are not shifted yet. Take a collator for causal language "
            "models without padding-free packing."
        )
    return shifted(inputs["labels"], IGNORE)


class SelectiveTrainer(SelectiveMixin, Trainer):
    """transformers' Trainer with selection."""

"""Selection in the real Trainer of transformers, on tiny models: the same tokens and weights however a step is shared.

Run as a program, this file is what each rank of torchrun does: it trains on the rows of a file and saves the weights.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from torchstone.data.batch import IGNORE
from torchstone.errors import ConfigError, DataError
from torchstone.interop.selective_trainer import Reader, SelectiveTrainer, WithReference
from torchstone.objectives.selection import Rule
from torchstone.objectives.selective_loss import selective_loss, shifted, token_losses
from torchstone.recipe.registry import parse_part

VOCAB, LENGTH, ROWS = 31, 10, 16


def llama(seed: int = 0, vocabulary: int = VOCAB) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config)


def gemma() -> Any:
    config = transformers.Gemma2Config(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=32, final_logit_softcapping=1.0, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Gemma2ForCausalLM(config)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(1)
    ids_bt = torch.randint(VOCAB, (ROWS, LENGTH), generator=draw)
    labels_bt = ids_bt.masked_fill(torch.rand(ROWS, LENGTH, generator=draw) < 0.2, IGNORE)
    losses_bt = torch.rand(ROWS, LENGTH, generator=draw) * 6
    return [
        {"input_ids": a.tolist(), "labels": b.tolist(), "reference_losses": c.tolist()}
        for a, b, c in zip(ids_bt, labels_bt, losses_bt, strict=True)
    ]


def make_trainer(
    folder: Path, rows: list[dict[str, Any]], model: Any, size: int = 8, accumulated: int = 1, steps: int = 2,
    plain: bool = False, torch_compile_backend: str | None = None, **settings: Any,
) -> Any:  # fmt: skip
    args = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=size, gradient_accumulation_steps=accumulated,
        max_steps=steps, learning_rate=1e-2, lr_scheduler_type="constant", logging_steps=1, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, seed=3, torch_compile_backend=torch_compile_backend,
    )  # fmt: skip
    kind = transformers.Trainer if plain else SelectiveTrainer
    data = settings.pop("data", rows)
    return kind(model=model, args=args, train_dataset=data, eval_dataset=data, **settings)


@pytest.fixture
def trainer(tmp_path, rows):
    """Makes a Trainer: trainer(model, size=4, accumulated=1, …)."""
    return lambda model, **settings: make_trainer(tmp_path, rows, model, **settings)


def trained(made: Any) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    made.train()
    return made.model.state_dict(), [line for line in made.state.log_history if "loss" in line]


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def tensors(rows: list[dict[str, Any]], part: slice) -> tuple[Tensor, Tensor, Tensor]:
    names = ("input_ids", "labels", "reference_losses")
    return tuple(torch.tensor([row[name] for row in rows[part]]) for name in names)  # type: ignore[return-value]


def test_everything_selected_trains_as_the_plain_trainer(trainer, rows):
    plain_rows = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
    expected, plain_log = trained(trainer(llama(), size=4, accumulated=2, plain=True, data=plain_rows))
    found, log = trained(trainer(llama(), size=4, accumulated=2, rule=Rule(1.0)))
    assert_equal(found, expected)
    for ours, theirs in zip(log, plain_log, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["loss"] == pytest.approx(ours["mean_loss"], rel=1e-4) and ours["selected_share"] == 1


@pytest.mark.parametrize("score", ["excess", "hard", "random", "soft"])
@pytest.mark.parametrize(("size", "accumulated"), [(4, 2), (2, 4)])
def test_accumulation_changes_nothing(trainer, score, size, accumulated):
    rule = Rule(1.0 if score == "soft" else 0.6, score)
    expected, whole = trained(trainer(llama(), rule=rule))
    found, log = trained(trainer(llama(), size=size, accumulated=accumulated, rule=rule))
    assert_equal(found, expected)
    for ours, theirs in zip(log, whole, strict=True):
        for name in ("loss", "mean_loss", "selected_share", "unselected_loss"):
            if score != "soft" or name in ("loss", "mean_loss"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


def test_the_first_step_is_that_of_the_selected_tokens(trainer, rows, monkeypatch):
    """All rows in one batch: loss and gradient against the functional form on the model's own logits."""
    made, model = trainer(llama(), size=ROWS, steps=1, rule=Rule(0.5)), llama()
    ids_bt, labels_bt, stored_bt = tensors(rows, slice(None))
    expected = selective_loss(model(ids_bt).logits, shifted(labels_bt, IGNORE), shifted(stored_bt, 0.0), 0.5)
    expected.loss.backward()
    seen: dict[str, Tensor] = {}
    plain = SelectiveTrainer.training_step

    def step(self: Any, *given: Any, **settings: Any) -> Tensor:
        loss = plain(self, *given, **settings)
        seen.update({name: parameter.grad.clone() for name, parameter in self.model.named_parameters()}, loss=loss)
        return loss

    monkeypatch.setattr(SelectiveTrainer, "training_step", step)
    log = trained(made)[1][0]
    torch.testing.assert_close(seen.pop("loss"), expected.loss.detach(), rtol=1e-5, atol=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-4, atol=1e-6)
    assert log["unselected_loss"] == pytest.approx(float(expected.unselected_loss), rel=1e-4)
    share = expected.mask_bt.sum() / (shifted(labels_bt, IGNORE) != IGNORE).sum()
    assert log["selected_share"] == pytest.approx(float(share), rel=1e-6)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_reference_model_gives_what_could_have_been_stored(trainer, rows, accumulated):
    reference = llama(seed=5)
    ids_bt, labels_bt, _ = tensors(rows, slice(None))
    with torch.no_grad():
        losses_n, _ = token_losses(reference(ids_bt).logits, shifted(labels_bt, IGNORE), None)
    stored_bt = torch.cat([torch.zeros(ROWS, 1), losses_n.view(ROWS, LENGTH)[:, :-1]], dim=1)
    stored = [{**row, "reference_losses": losses.tolist()} for row, losses in zip(rows, stored_bt, strict=True)]
    without = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
    given = {"size": 8 // accumulated, "accumulated": accumulated}
    expected, _ = trained(trainer(llama(), data=stored, **given))
    found, _ = trained(trainer(llama(), data=without, reference=reference.train(), **given))
    assert_equal(found, expected)
    assert not reference.training and not any(parameter.requires_grad for parameter in reference.parameters())


@pytest.mark.parametrize("scope", ["micro", "sequence"])
def test_narrow_scopes_divide_by_what_the_whole_step_selects(trainer, scope):
    log = trained(trainer(llama(), size=4, accumulated=2, steps=1, rule=Rule(0.4, "hard", scope)))[1][0]
    share = log["selected_share"]
    mean = share * log["loss"] + (1 - share) * log["unselected_loss"]
    assert mean == pytest.approx(log["mean_loss"], rel=1e-4) and 0.3 < share <= 0.4


def test_evaluation_is_the_plain_loss(trainer, rows):
    model = llama()
    found = trainer(model).evaluate()["eval_loss"]
    ids_bt, labels_bt, _ = tensors(rows, slice(None))
    halves = [slice(0, 8), slice(8, 16)]
    with torch.no_grad():
        expected = [float(model(ids_bt[half], labels=labels_bt[half]).loss) for half in halves]
    assert found == pytest.approx(sum(expected) / 2, rel=1e-3)


def test_all_logits_are_never_made(trainer, monkeypatch):
    """The output layer is not run on a batch, but for the few tokens that are checked."""
    made, sizes = trainer(llama(), steps=1), []
    plain = nn.Linear.forward

    def forward(self: nn.Linear, x: Tensor) -> Tensor:
        if self is made.model.lm_head:
            sizes.append(x.shape[:-1].numel())
        return plain(self, x)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    made.train()
    assert sizes == [8]
    assert "forward" not in vars(made.model.lm_head)


def test_a_model_that_bounds_its_logits_needs_them_whole(trainer):
    with pytest.raises(ConfigError, match="Gemma2ForCausalLM are not its hidden states.*full_logits=True"):
        trainer(gemma()).train()
    found, log = trained(trainer(gemma(), full_logits=True, rule=Rule(1.0)))
    expected, plain = trained(trainer(gemma(), plain=True))
    assert_equal(found, expected)
    assert log[0]["loss"] == pytest.approx(plain[0]["loss"], rel=1e-4)


def test_an_output_layer_with_a_bias_needs_its_logits_whole():
    model = llama()
    model.lm_head = nn.Linear(16, VOCAB)
    with pytest.raises(ConfigError, match="has a bias.*full_logits=True"):
        Reader(model).predictions({"input_ids": torch.ones(1, 9, dtype=torch.long)})
    assert Reader(model, full_logits=True).predictions({"input_ids": torch.ones(1, 9).long()}).shape == (1, 9, VOCAB)


def test_the_score_entropy_reads_the_reference(trainer, rows):
    log = trained(trainer(llama(), rule=Rule(0.5, "entropy"), reference=llama(seed=5), steps=1))[1][0]
    assert log["selected_share"] == pytest.approx(0.5, abs=0.02)


def test_what_cannot_be_honoured_is_refused(trainer, rows):
    with pytest.raises(ConfigError, match=f"reference vocab 17 ≠ model vocab {VOCAB}"):
        trainer(llama(), reference=llama(vocabulary=17))
    with pytest.raises(ConfigError, match="score hard reads no reference"):
        trainer(llama(), rule=Rule(score="hard"), reference=llama())
    with pytest.raises(ConfigError, match="score oracle needs flags of noise"):
        trainer(llama(), rule=Rule(score="oracle"))
    with pytest.raises(ConfigError, match="ratio is 1.2"):
        trainer(llama(), rule=Rule(1.2))
    bare = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
    with pytest.raises(ConfigError, match="reference=MODEL, or data with the column reference_losses"):
        trainer(llama(), data=bare).train()
    with pytest.raises(ConfigError, match="batches hold input_ids, reference_losses; selection needs labels"):
        trainer(llama(), data=[{name: row[name] for name in ("input_ids", "reference_losses")} for row in rows]).train()
    masked = [{**row, "labels": [IGNORE] * LENGTH} for row in rows]
    with pytest.raises(DataError, match="no token of step 0 has a label"):
        trainer(llama(), data=masked).train()


def test_settings_of_another_loss_are_refused(trainer, rows, tmp_path):
    made = trainer(llama())
    made.args.label_smoothing_factor = 0.1
    with pytest.raises(ConfigError, match="label_smoothing_factor is 0.1"):
        made._check_trainer()
    with pytest.raises(ConfigError, match="compute_loss_func was given"):
        trainer(llama(), compute_loss_func=lambda outputs, labels, num_items_in_batch=None: outputs.logits.sum())
    config = transformers.MixtralConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, output_router_logits=True,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="MixtralForCausalLM adds an auxiliary loss of its router"):
        trainer(transformers.MixtralForCausalLM(config))
    with pytest.raises(ConfigError, match="seed belongs to the score random and score is hard"):
        trainer(llama(), rule=Rule(score="hard", seed=3))


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_compiled_model_trains_as_it_is(trainer, accumulated):
    expected, _ = trained(trainer(llama(), size=4, accumulated=accumulated))
    made = trainer(llama(), size=4, accumulated=accumulated, torch_compile_backend="eager")
    found, _ = trained(made)
    assert_equal(found, expected)


def test_rows_of_unequal_length_are_padded_with_their_losses(trainer, rows):
    """With a collator that cannot pad a column of losses: the same as rows that were padded beforehand."""
    lengths = [LENGTH - row % 4 for row in range(ROWS)]
    short = [{name: one[name][:count] for name in one} for one, count in zip(rows, lengths, strict=True)]

    def padded(one: dict[str, Any]) -> dict[str, Any]:
        gap = LENGTH - len(one["input_ids"])
        filler = {"input_ids": 0, "labels": IGNORE, "reference_losses": 0.0}
        return {name: value + [filler[name]] * gap for name, value in one.items()}

    def collate(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        assert all("reference_losses" not in one for one in features)
        return {
            name: nn.utils.rnn.pad_sequence(
                [torch.tensor(one[name]) for one in features], batch_first=True, padding_value=filler
            )
            for name, filler in (("input_ids", 0), ("labels", IGNORE))
        }

    expected, _ = trained(trainer(llama(), data=[padded(one) for one in short]))
    found, _ = trained(trainer(llama(), data=short, data_collator=collate))
    assert_equal(found, expected)


def test_reference_losses_are_padded_on_the_side_of_the_tokens():
    def left(features: list[dict[str, Any]]) -> dict[str, Tensor]:
        width = max(len(one["input_ids"]) for one in features)
        return {
            "input_ids": torch.tensor([[0] * (width - len(one["input_ids"])) + one["input_ids"] for one in features])
        }

    features = [{"input_ids": [4, 5, 6], "losses": [1.0, 2.0, 3.0]}, {"input_ids": [7, 8], "losses": [4.0, 5.0]}]
    assert WithReference(left, "losses", "left")(features)["losses"].tolist() == [[1, 2, 3], [0, 4, 5]]
    assert WithReference(left, "losses", "right")(features)["losses"].tolist() == [[1, 2, 3], [4, 5, 0]]
    with pytest.raises(DataError, match="row 1 of the batch has 2 tokens, 1 losses"):
        WithReference(left, "losses", "right")([features[0], {**features[1], "losses": [4.0]}])


def test_two_ranks_train_as_one(trainer, rows, tmp_path):
    """With one batch on each and with two accumulated ones."""
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
        "--master-port", str(port), __file__, str(tmp_path),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    expected, log = trained(trainer(llama()))
    for name in (f"{accumulated}-{rank}" for accumulated in (1, 2) for rank in (0, 1)):
        assert_equal(load_file(tmp_path / f"{name}.safetensors"), expected)
        noted = json.loads((tmp_path / f"{name}.json").read_text())
        for ours, theirs in zip(noted, log, strict=True):
            for key in ("loss", "mean_loss", "selected_share", "unselected_loss"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4)


def test_the_guide_runs(project_root, tmp_path, capsys):
    """The Python of docs/token-weighting.md, in order; its objective is one of a recipe."""
    page = (project_root / "docs" / "token-weighting.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    names = {"work": str(tmp_path)}
    for block in blocks:
        exec(block, names)
    assert "74 of 124 targets" in capsys.readouterr().out
    (part,) = (yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL))
    assert parse_part("objective", part["objective"]).kind == "selective"


def _rank() -> None:
    torch.set_num_threads(1)
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    rows = json.loads((folder / "rows.json").read_text())
    for accumulated in (1, 2):
        made = make_trainer(folder / "out", rows, llama(), size=4 // accumulated, accumulated=accumulated)
        weights, log = trained(made)
        save_file(
            {name: value.clone() for name, value in weights.items()}, folder / f"{accumulated}-{rank}.safetensors"
        )
        (folder / f"{accumulated}-{rank}.json").write_text(json.dumps(log))


if __name__ == "__main__":
    _rank()

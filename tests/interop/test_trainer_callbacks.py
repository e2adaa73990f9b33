"""Updates measured under transformers' Trainer: the same numbers as a meter on a plain loop."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from torchstone.diagnose.updates import UpdateMeter
from torchstone.diagnose.updates.series import read_updates
from torchstone.errors import ConfigError
from torchstone.interop.trainer_callbacks import update_callback


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def data(rows: int = 64) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 32, (rows, 12), generator=draw)
    return [{"input_ids": row, "labels": row} for row in tokens]


def trainer(model: Any, folder: Path, *callbacks: Any, **settings: Any) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, learning_rate=3e-3, lr_scheduler_type="constant",
        max_grad_norm=0.0, report_to=[], use_cpu=True, seed=0, disable_tqdm=True,
        **{"max_steps": 8, "save_strategy": "no", "logging_steps": 1, **settings},
    )  # fmt: skip
    return transformers.Trainer(model=model, args=arguments, train_dataset=data(), callbacks=list(callbacks))


class Heard(transformers.TrainerCallback):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
        """Keep a copy."""
        self.logs.append(dict(logs))


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_gives_the_numbers_of_a_plain_loop(tmp_path: Path, make: Any, accumulation: int) -> None:
    torch.manual_seed(0)
    model = make()
    start, seen = copy.deepcopy(model), []
    model.register_forward_pre_hook(lambda module, given, named: seen.append(named["input_ids"]), with_kwargs=True)
    callback = update_callback(every=3, early=2, path=tmp_path / "updates.jsonl")
    trainer(model, tmp_path, callback, gradient_accumulation_steps=accumulation).train()
    assert [record["step"] for record in callback.meter.records] == [1, 2, 4, 7]
    assert read_updates(tmp_path) == callback.meter.records

    optimizer = torch.optim.AdamW(start.parameters(), lr=3e-3, weight_decay=0.0)
    meter = UpdateMeter(start, optimizer, every=3, early=2, batch_size=4 * accumulation)
    start.train()
    for step in range(8):
        optimizer.zero_grad()
        for tokens in seen[step * accumulation : (step + 1) * accumulation]:
            (start(input_ids=tokens, labels=tokens).loss / accumulation).backward()
        optimizer.step()
    for one, other in zip(callback.meter.records, meter.records, strict=True):
        assert set(one) == set(other) and one["matrices"].keys() == other["matrices"].keys()
        for name in set(one) - {"matrices"}:
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), name
        rows = {name for name in one["matrices"] if "rrc" in one["matrices"][name]}
        assert rows == {name for name in one["matrices"] if "wpe" not in name and "embed_tokens" not in name} | (
            {"model.embed_tokens.weight"} if make is llama else {"transformer.wte.weight"}
        )  # the tied matrix by its use in the head


def test_training_is_the_same_bit_for_bit_and_hooks_are_taken_off(tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = llama()
    watched = copy.deepcopy(plain)
    trainer(plain, tmp_path).train()
    callback = update_callback(every=1)
    run = trainer(watched, tmp_path, callback)
    run.train()
    for left, right in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(left, right)
    assert len(callback.meter.records) == 8
    assert not any(module._forward_pre_hooks for module in watched.modules())
    assert not run.optimizer.optimizer._optimizer_step_pre_hooks


def test_logs_of_measured_steps_have_the_numbers(tmp_path: Path) -> None:
    heard = Heard()
    callback = update_callback(every=4, metrics=("angle",), early=0)
    trainer(llama(), tmp_path, callback, heard).train()
    with_numbers = [number for number, logs in enumerate(heard.logs[:8], start=1) if "updates/angle" in logs]
    assert with_numbers == [1, 5]
    assert heard.logs[4]["updates/angle"] == callback.meter.records[1]["angle"]


def test_a_resumed_training_counts_on(tmp_path: Path) -> None:
    path = tmp_path / "updates.jsonl"
    torch.manual_seed(0)
    model = llama()
    trainer(
        model, tmp_path / "out", update_callback(every=2, early=1, path=path), save_strategy="steps", save_steps=4
    ).train()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3, 5, 7]
    torch.manual_seed(0)
    again = trainer(llama(), tmp_path / "out", update_callback(every=2, early=1, path=path))
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3, 5, 7, 5, 7]
    first, second = (
        record["angle"] for record in map(json.loads, path.read_text().splitlines()) if record["step"] == 7
    )
    assert second == pytest.approx(first, rel=1e-3)


def test_other_optimizers_and_metrics(tmp_path: Path) -> None:
    callback = update_callback(every=1, metrics=("l2", "snr"))
    trainer(llama(), tmp_path, callback, optim="sgd", optim_args="momentum=0.9", max_steps=5).train()
    assert callback.meter.records[-1]["snr"] >= 0 and "angle" not in callback.meter.records[-1]


def test_representation_change_under_compilation_is_refused(tmp_path: Path) -> None:
    run = trainer(llama(), tmp_path, update_callback())
    run.args.torch_compile = True
    with pytest.raises(ConfigError, match="leave rrc out of metrics"):
        run.callback_handler.on_train_begin(run.args, run.state, run.control)

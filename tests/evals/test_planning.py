"""Planning and infilling: scores of models whose answers are known, and losses token by token."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torchstone.data.fill_in_the_middle import FillInTheMiddleConfig, FillInTheMiddleSource
from torchstone.data.synthetic.star_graph import StarGraphConfig
from torchstone.errors import DataError
from torchstone.evals import planning as module
from torchstone.evals.infilling import held_out_gaps, infilling_losses, plain_losses
from torchstone.evals.planning import planning
from torchstone.models.belief_generate import prefix_vectors, suffix_vectors
from torchstone.models.belief_state import BeliefStateConfig
from torchstone.models.continuous import Completion
from torchstone.models.decoder import DecoderConfig

END, FIM = 256, 257


@pytest.mark.parametrize("wrong", [None, 1, 3])
def test_paths_count_as_a_whole_and_by_their_first_step(monkeypatch: pytest.MonkeyPatch, wrong: int | None) -> None:
    """Answers that are right but for one token in every second graph."""
    data = StarGraphConfig().build(None)
    rows = [row for batch in data.evaluation(16, 16) for row in batch.tokens_bt.tolist()]
    asked: list[list[int]] = []

    def answers(model: Any, prompts: list[list[int]], *, max_new: int, greedy: bool) -> list[Completion]:
        asked.extend(prompts)
        assert greedy and max_new == 4
        found = []
        for prompt in prompts:
            number = next(place for place, row in enumerate(rows) if row[:21] == prompt)
            path = rows[number][21:25]
            if wrong is not None and number % 2:
                path = [*path[:wrong], (path[wrong] + 1) % 8, *path[wrong + 1 :]]
            found.append(Completion(path, None, "length", [0.0] * 4))
        return found

    monkeypatch.setattr(module, "generate", answers)
    found = planning(None, data, graphs=16, batch=5)
    assert len(asked) == 16 and all(prompt[-1] == 9 for prompt in asked)
    assert found.guess == 0.5
    assert found.accuracy == (1.0 if wrong is None else 0.5)
    assert found.first_step == (0.5 if wrong == 1 else 1.0)


def test_an_untrained_model_finds_no_path() -> None:
    task = StarGraphConfig()
    for config in (
        DecoderConfig(width=16, depth=1, head_dim=8),
        BeliefStateConfig(width=16, depth=1, head_dim=8, end_token=12),
    ):
        model = config.build(task.vocabulary(), task.sequence_length(), 0)
        assert planning(model, task.build(None), graphs=32).accuracy < 0.2


@pytest.fixture
def source(tmp_path: Path) -> FillInTheMiddleSource:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(60):
        text = " ".join(str(number * 17 + place) for place in range(40))
        (folder / f"{number:02d}.txt").write_text(text)
    text: dict[str, Any] = {"kind": "text", "corpus": {"kind": "files", "paths": f"{folder}/*.txt"}, "tokenizer": "bytes",
                            "length": 64, "validation_fraction": 0.3}  # fmt: skip
    return FillInTheMiddleConfig.model_validate({"text": text, "piece": 40, "goal_min": 5, "goal_max": 9}).build(
        tmp_path / "c"
    )


def test_gaps_are_whole_pieces_cut_in_three(source: FillInTheMiddleSource) -> None:
    gaps = held_out_gaps(source, 12, middle=6)
    assert {(len(gap.prefix), len(gap.middle), len(gap.goal)) for gap in gaps} == {(25, 6, 9)}
    held = bytes(source.text.shards.validation.tokens[source.text.shards.validation.tokens < 256].astype("uint8"))
    assert all(bytes([*gap.prefix, *gap.middle, *gap.goal]) in held for gap in gaps)
    assert len({tuple(gap.prefix) for gap in gaps}) == 12
    with pytest.raises(DataError, match="and 100000 with a middle of 6 and a goal of 9 are asked for"):
        held_out_gaps(source, 100_000, middle=6)
    with pytest.raises(DataError, match="a middle of 31"):
        held_out_gaps(source, 2, middle=31)


def test_losses_of_middles_are_those_of_single_tokens(source: FillInTheMiddleSource) -> None:
    gaps = held_out_gaps(source, 3, middle=6)
    init = {"kind": "normal", "std": 0.1}
    belief = BeliefStateConfig.model_validate(
        {"width": 16, "depth": 1, "head_dim": 8, "end_token": END, "initialisation": init}
    )
    decoder = DecoderConfig.model_validate({"width": 16, "depth": 1, "head_dim": 8, "initialisation": init})
    ours = belief.build(source.vocab_size, 64, 0).eval()
    theirs = decoder.build(source.vocab_size, 64, 0).eval()

    def of_pairs(row: list[int], goal: list[int]) -> Tensor:
        return ours.head.pair_logits(prefix_vectors(ours, [row]), suffix_vectors(ours, [[*goal, END]]))[0][0]

    def of_decoder(row: list[int], goal: list[int]) -> Tensor:
        return theirs.logits(theirs(torch.tensor([[*goal, FIM, *row[1:]]])).hidden_btd[0, -1])

    asked: list[tuple[Any, Callable[[list[int], list[int]], Tensor]]] = [(ours, of_pairs), (theirs, of_decoder)]
    for model, logits in asked:
        for gap, found in zip(gaps, infilling_losses(model, gaps, FIM, END, batch=2), strict=True):
            said, total = [*gap.middle, END], 0.0
            for place, token in enumerate(said):
                with torch.no_grad():
                    row = [END, *gap.prefix, *gap.middle[:place]]
                    total -= float(logits(row, gap.goal).log_softmax(-1)[token])
            assert found == pytest.approx(total / len(said), rel=1e-5)
        whole = torch.tensor([[*gap.prefix, *gap.middle, *gap.goal] for gap in gaps])
        with torch.no_grad():
            log_p = model.logits(model(whole[:, :-1]).hidden_btd).log_softmax(-1)
        wanted = -log_p.gather(-1, whole[:, 1:, None]).squeeze(-1).mean(1)
        assert plain_losses(model, gaps, batch=2) == pytest.approx(wanted.tolist(), rel=1e-5)

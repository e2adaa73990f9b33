"""The landscape of a run's checkpoints, through Python and the command line."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from torchstone.cli.main import main
from torchstone.diagnose.adapters import open_subject
from torchstone.diagnose.landscape.curvature import curvature, curvature_by_differences
from torchstone.diagnose.landscape.decay_split import require_reference
from torchstone.diagnose.landscape.directions import projections
from torchstone.diagnose.landscape.finding import landscape_finding, token_loss
from torchstone.diagnose.landscape.interpolate import interpolate, line_of_alphas, loss_of, walk
from torchstone.diagnose.landscape.states import blend, difference, own_names, parameters_of, state_of, with_ties
from torchstone.errors import ConfigError
from torchstone.objectives.next_token import NextTokenConfig
from torchstone.recipe.load import load_recipe
from torchstone.train.run import load_run, train

TEXTS = ["".join(chr(97 + (7 * i * i + j) % 26) for i in range(60)) for j in range(6)]
SMALL = {"length": 24, "sequences": 6, "curvature_sequences": 2, "alphas": (0.25,)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run that kept four checkpoints."""
    recipe = load_recipe(
        {
            "model": {"kind": "decoder", "width": 16, "depth": 1, "head_dim": 8},
            "data": {"kind": "text", "tokenizer": "bytes", "length": 32},
            "optimizer": {"kind": "adamw", "learning_rate": 1e-2},
            "budget": {"steps": 12},
            "batch": {"sequences": 2},
            "evaluation": {"every": None, "sequences": 4},
            "checkpoint": {"every": 3, "keep": 9},
            "precision": "fp32",
            "compile": False,
        }
    )
    directory = tmp_path_factory.mktemp("landscape") / "run"
    train(recipe, directory, progress=lambda state: None)
    return directory


def test_a_run_is_compared_with_its_first_checkpoint(run: Path) -> None:
    subject = open_subject(run)
    before = state_of(subject.model)
    finding = landscape_finding(subject, TEXTS, before_decay="9", **SMALL)
    assert all(torch.equal(value, before[name]) for name, value in subject.model.state_dict().items())
    line, shape, directions, checkpoints = finding.tables
    rows = {row[0]: row for row in line.rows}
    assert sorted(rows) == [0.0, 0.25, 0.5, 1.0]
    assert [rows[0.0][i] for i in (2, 3, 4)] == pytest.approx(
        [rows[0.0][1]] * 3
    )  # all lines start at the other checkpoint
    for alpha in (0.25, 0.5, 1.0):
        assert rows[alpha][3] < rows[alpha][2] < rows[alpha][4]
    numbers = {row[0]: row[1] for row in shape.rows}
    assert numbers["midpoint"] == pytest.approx(rows[0.5][1] - min(rows[0.0][1], rows[1.0][1]))
    assert numbers["climb"] == pytest.approx(max(rows[0.25][1], rows[0.5][1]) - rows[0.0][1])
    assert set(numbers) == {"midpoint", "bulge", "climb"}
    assert finding.answer.startswith("From step 3 (") and "8 random directions changes the loss by" in finding.answer
    assert ("is below both ends (a valley crossed)" in finding.answer) == (numbers["midpoint"] < 0)
    assert "curvature on the first 2" in finding.notes[0] and "from step 3 (α = 0)" in finding.notes[1]
    tokens_nt = torch.tensor([subject.encode(text)[:24] for text in TEXTS])
    assert rows[1.0][1] == pytest.approx(float(subject.losses(tokens_nt).mean()), rel=1e-6)
    first = load_run(run, 3)[1].state_dict()
    subject.model.load_state_dict(blend(first, before, 0.25))
    assert rows[0.25][1] == pytest.approx(float(subject.losses(tokens_nt).mean()), rel=1e-6)
    for row in directions.rows:
        assert row[1] > 0 and row[2] == pytest.approx(row[3], rel=0.05, abs=2e-3)
        assert row[5] < row[4] < row[6]
    assert [row[0] for row in checkpoints.rows] == [3, 6, 9, 12]
    by_step = {row[0]: dict(zip(checkpoints.columns, row, strict=True)) for row in checkpoints.rows}
    assert by_step[3]["distance"] == 0 and by_step[12]["cosine progress"] == pytest.approx(1.0)
    assert by_step[12]["share"] == pytest.approx(1.0) and 0 < by_step[6]["share"] <= 1
    assert "cosine of the two directions" in directions.note


def test_the_tools_work_on_checkpoints_of_a_run(run: Path) -> None:
    # start: tools
    _, model, data = load_run(run)
    earlier, plateau, decayed = (load_run(run, step)[1].state_dict() for step in (3, 9, 12))
    batch, objective = next(data.evaluation(4, 4)), NextTokenConfig().build()

    line = interpolate(earlier, decayed, line_of_alphas(), loss_of(model, lambda: objective(model, batch).loss.item()))
    print(line.barrier, line.midpoint, line.falls)

    directions = {"progress": difference(decayed, earlier), "decay": difference(decayed, plateau)}
    seen = projections([plateau, decayed], earlier, directions)
    print(seen[0].along, seen[0].cosine, seen[0].share)

    subject = open_subject(model)
    loss, parameters = token_loss(subject, batch.tokens_bt), parameters_of(model)
    steepness = {name: curvature(loss, parameters, direction) for name, direction in directions.items()}
    # end: tools
    assert line.at(1.0) == pytest.approx(objective(model, batch).loss.item()) and seen[1].share == pytest.approx(1.0)
    assert steepness["decay"] == pytest.approx(
        curvature_by_differences(loss, parameters, directions["decay"]), rel=0.05, abs=2e-3
    )


def test_checkpoints_have_names(run: Path) -> None:
    def distance(against: str) -> float:
        return float(landscape_finding(open_subject(run), TEXTS, against=against, **SMALL).tables[2].rows[0][1])  # type: ignore[arg-type]

    assert distance("6") == distance(f"{run}@6") != distance("3")
    with pytest.raises(ConfigError, match="has no checkpoint of step 7; it kept 3, 6, 9, 12"):
        distance("7")
    with pytest.raises(ConfigError, match="the checkpoint 12 has the very weights of the model"):
        distance("12")
    with pytest.raises(
        ConfigError, match="nosuch@3 names a step of a run, and there is no run at .*nosuch; give the folder"
    ):
        distance(f"{run.parent / 'nosuch'}@3")
    with pytest.raises(ConfigError, match="has no checkpoint of step 7; it kept 3, 6, 9, 12"):
        distance(f"{run}@7")


def test_the_first_checkpoint_is_compared_with_the_second(run: Path) -> None:
    finding = landscape_finding(open_subject(run, step=3), TEXTS, **SMALL)
    assert finding.answer.startswith("From step 6 (")


def test_progress_and_decay_are_two_directions(run: Path) -> None:
    for before in ("6", f"{run}@6"):
        with pytest.raises(ConfigError, match="against.*before_decay.* progress and decay are one direction"):
            landscape_finding(open_subject(run), TEXTS, against="6", before_decay=before, **SMALL)


def test_narrow_weights_are_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match="holds weights in bfloat16, whose gradients are too coarse .* float32"):
        landscape_finding(open_subject(run, dtype=torch.bfloat16), TEXTS, **SMALL)


def test_curvature_on_more_rows_than_there_are_says_how_many(run: Path) -> None:
    finding = landscape_finding(open_subject(run), TEXTS, **{**SMALL, "curvature_sequences": 50})
    assert "6 rows of 24 tokens; curvature on the first 6. " in finding.notes[0]


def test_tied_weights_count_once_and_move_together() -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("scale", torch.ones(2))

    model = Tied()
    assert own_names(model) == ("embed.weight",)
    assert {"embed.weight", "head.weight", "scale"} == set(model.state_dict())
    moved = with_ties(model, {"embed.weight": torch.ones(5, 3)})
    assert set(moved) == {"embed.weight", "head.weight"} and moved["head.weight"] is moved["embed.weight"]
    seen = []
    walk(state_of(model), moved, [2.0], loss_of(model, lambda: seen.append(model.embed.weight.detach().clone()) or 0.0))
    torch.testing.assert_close(seen[0], model.embed.weight.detach() + 2)


def test_a_model_in_memory_needs_the_name_of_another(run: Path) -> None:
    subject = open_subject(load_run(run)[1], tokenizer=load_run(run)[2].tokenizer)
    with pytest.raises(ConfigError, match="0 checkpoint.s. of a run, and a line needs two"):
        landscape_finding(subject, TEXTS, **SMALL)
    with pytest.raises(ConfigError, match="3 is a step, and decoder is no run directory"):
        landscape_finding(subject, TEXTS, against="3", **SMALL)
    assert landscape_finding(subject, TEXTS, against=f"{run}@3", **SMALL).analysis == "landscape"
    with pytest.raises(ConfigError, match="curvature_sequences was given as 0"):
        landscape_finding(subject, TEXTS, against=f"{run}@3", **{**SMALL, "curvature_sequences": 0})


def test_hugging_face_models_have_landscapes_too(family_folder: Callable[[str], Path], tmp_path: Path) -> None:
    subject, other = open_subject(family_folder("Llama")), open_subject(family_folder("Llama"))
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    other.model.save_pretrained(tmp_path)
    subject.encode = lambda text: [ord(letter) - 94 for letter in text]  # type: ignore[method-assign]
    finding = landscape_finding(subject, TEXTS, against=str(tmp_path), **SMALL)
    exact, differences = finding.tables[2].rows[0][2:4]
    assert exact == pytest.approx(differences, rel=0.05, abs=2e-3)
    assert len(finding.tables) == 3  # no run, no trajectory


def test_tokens_that_the_decay_helped_are_sorted_by_another_models_entropy(run: Path) -> None:
    subject, reference = open_subject(run), f"{run.parent / 'reference'}"
    shutil.copytree(run, reference)
    with pytest.raises(ConfigError, match="reference .* has the very weights of .* give another model"):
        landscape_finding(subject, TEXTS, before_decay="9", reference=reference, **SMALL)
    shutil.rmtree(Path(reference) / "checkpoints")
    shutil.copytree(
        run / "checkpoints", Path(reference) / "checkpoints", ignore=shutil.ignore_patterns("*12*", "latest")
    )
    finding = landscape_finding(subject, TEXTS, before_decay="9", reference=reference, **SMALL)
    table = finding.tables[-1]
    assert table.title == "Tokens that the decay helped" and [row[0] for row in table.rows] == list(range(1, 11))
    entropies = [row[1] for row in table.rows]
    assert entropies == sorted(entropies) and entropies[0] < entropies[-1]
    tokens_nt = torch.tensor([subject.encode(text)[:24] for text in TEXTS])
    change = subject.losses(tokens_nt).mean() - open_subject(run, step=9).losses(tokens_nt).mean()
    assert sum(row[2] for row in table.rows) / 10 == pytest.approx(float(change), rel=1e-4)
    with pytest.raises(ConfigError, match="no before_decay says where the decay begins"):
        landscape_finding(subject, TEXTS, reference=reference, **SMALL)


def test_a_reference_of_another_vocabulary_is_refused(run: Path, family_folder: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="token ids and .* a reference model reads the same tokens"):
        landscape_finding(open_subject(run), TEXTS, before_decay="9", reference=str(family_folder("Llama")), **SMALL)


def test_a_reference_with_another_tokenizer_of_equal_size_is_refused(run: Path) -> None:
    subject, reference = open_subject(run), open_subject(run, step=9)
    tokens_nt = torch.tensor([subject.encode(text)[:24] for text in TEXTS])
    require_reference(subject, reference, tokens_nt)
    turned = [(code + 1) % 256 for code in range(256)]
    reference.encode = lambda text: [turned[code] for code in text.encode()]  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="make other tokens of the same text .* give one of the same tokenizer"):
        require_reference(subject, reference, tokens_nt)


def test_the_command_writes_a_report(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXTS))
    words = ["diagnose", "landscape", str(run), str(text), "--against", "3", "--alphas", "0.25,0.75", "--length", "24"]
    words += ["--sequences", "4", "--curvature-sequences", "1", "--out", str(tmp_path / "out"), "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    assert "Curvature at the model" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "out" / "loss-along-the-line.csv").read_text().count("\n") == 6

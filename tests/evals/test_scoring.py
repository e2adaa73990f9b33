"""Scoring: stores equal the model's own losses and continue after a kill; texts are scored once per token by any two models."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchstone.data.batch import IGNORE
from torchstone.data.loss_store import LossStore
from torchstone.data.scored import ScoredSource
from torchstone.data.text import TextSource
from torchstone.data.tokenizers import ByteTokenizer
from torchstone.diagnose.adapters import open_subject
from torchstone.diagnose.subject import Subject
from torchstone.errors import ConfigError, DataError
from torchstone.evals import scoring
from torchstone.evals.scoring import identity, score_data, score_text, weights_hash, windows_of
from torchstone.evals.scoring_command import Asked, Loading, score_files, score_recipe
from torchstone.evals.scoring_finding import pieces, records, score_texts, token_texts
from torchstone.models.decoder import DecoderConfig
from torchstone.objectives.next_token import NextTokenConfig
from torchstone.recipe.load import load_recipe
from torchstone.recipe.yaml import dump_yaml
from torchstone.train.run import load_run, train

Recipes = Callable[..., dict[str, Any]]


def decoder(seed: int = 0, vocab_size: int = 257, length: int = 32) -> Any:
    config = {"width": 16, "depth": 1, "head_dim": 8, "initialisation": {"kind": "normal", "std": 0.3}}
    return DecoderConfig.model_validate(config).build(vocab_size, length, seed)


def subject(seed: int = 0, **sizes: int) -> Subject:
    return open_subject(decoder(seed, **sizes), tokenizer=ByteTokenizer())


def source_of(recipe: dict[str, Any], cache: Path) -> TextSource:
    return load_recipe(recipe).data.build(cache)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text_recipe: Recipes) -> Path:
    path = tmp_path_factory.mktemp("scoring") / "reference"
    train(text_recipe(steps=5), path, progress=lambda state: None)
    return path


@pytest.mark.parametrize("masked", [False, True])
def test_a_store_holds_the_models_own_losses(
    run: Path, text_recipe: Recipes, story_cache: Path, tmp_path: Path, masked: bool
) -> None:
    source = source_of(text_recipe(masked=masked), story_cache)
    reference = open_subject(run)
    store = score_data(source, reference, tmp_path / "store", about=identity(reference), precision="float32")
    batch = ScoredSource(source, store).batch(3, 2, 16)
    with torch.no_grad():
        expected_bt = NextTokenConfig().build()(load_run(run)[1], batch).per_token_bt
    assert batch.reference_bt is not None
    torch.testing.assert_close(batch.reference_bt, expected_bt, atol=2e-6, rtol=0)
    assert (batch.reference_bt == 0).equal(batch.targets_bt == IGNORE)
    about = store.header.reference
    assert (about["step"], about["weights"]) == (5, weights_hash(reference.model)) and len(about["run"]) == 16
    half = score_data(source, reference, tmp_path / "half", about=identity(reference))
    difference = (half.losses(np.arange(20)) - store.losses(np.arange(20))).__abs__()
    assert difference.max() <= 0.004 and half.header.dtype == "float16"


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {folder!r})
import torchstone.data.loss_store as stores
from torchstone.evals import scoring, scoring_command
scoring.BLOCK_TOKENS = {tokens}
written = stores.write_block
def write(path, losses):
    written(path, losses)
    if path.name == "block-00000003":
        os.kill(os.getpid(), signal.SIGKILL)
stores.write_block = write
scoring_command.score_recipe(Path(sys.argv[1]), [], sys.argv[2], Path(sys.argv[3]), loading=scoring_command.Loading("cpu"))
"""


def test_a_killed_command_continues_and_ends_bit_equal(
    run: Path, text_recipe: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_yaml(load_recipe(text_recipe())))
    monkeypatch.setattr(scoring, "BLOCK_TOKENS", 40 * 32)
    whole = score_recipe(recipe, [], str(run), tmp_path / "whole", loading=Loading("cpu"))
    assert whole.header.blocks > 5
    words = [sys.executable, "-c", KILLED.format(folder=str(Path(__file__).parent), tokens=40 * 32)]
    ended = subprocess.run([*words, str(recipe), str(run), str(tmp_path / "cut")], env={**os.environ}, check=False)
    assert ended.returncode == -signal.SIGKILL
    with pytest.raises(DataError, match=f"4 of {whole.header.blocks} blocks are there"):
        LossStore(tmp_path / "cut")
    seen: list[tuple[int, int]] = []
    found = score_recipe(
        recipe, [], str(run), tmp_path / "cut", loading=Loading("cpu"), report=lambda *at: seen.append(at)
    )
    assert seen[0] == (160, whole.header.windows) and seen[-1] == (whole.header.windows, whole.header.windows)
    assert found.fingerprint == whole.fingerprint
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()


def test_training_on_stored_losses_is_training_with_the_reference(
    run: Path, text_recipe: Recipes, story_cache: Path, tmp_path: Path
) -> None:
    recipe = text_recipe(steps=4)
    score_data(source_of(recipe, story_cache), open_subject(run), tmp_path / "store", about=identity(open_subject(run)),
               precision="float32")  # fmt: skip
    stored = {**recipe, "data": {"kind": "scored", "source": recipe["data"], "scores": str(tmp_path / "store")}}
    losses = []
    for data, objective in (
        (stored, {"kind": "selective", "ratio": 0.5}),
        (recipe, {"kind": "selective", "ratio": 0.5, "reference": str(run)}),
    ):
        summary = train({**data, "objective": objective}, tmp_path / f"run{len(losses)}", progress=lambda state: None)
        losses.append(summary.history["train"]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_another_reference_data_or_tokenizer_is_refused(
    run: Path, text_recipe: Recipes, story_cache: Path, tmp_path: Path
) -> None:
    source, reference = source_of(text_recipe(), story_cache), open_subject(run)
    score_data(source, reference, tmp_path / "store", about=identity(reference))
    with pytest.raises(ConfigError, match="another reference"):
        score_data(source, subject(), tmp_path / "store", about=identity(subject()))
    masked = source_of(text_recipe(masked=True), story_cache)
    with pytest.raises(ConfigError, match="another data source"):
        score_data(masked, reference, tmp_path / "store", about=identity(reference))
    with pytest.raises(ConfigError, match="reference vocab 40 ≠ model vocab 257"):
        score_data(source, subject(vocab_size=40), tmp_path / "new", about={})

    class Other(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            return super().encode(text.upper())

    with pytest.raises(ConfigError, match="tokenizers of the reference .* differ: .* token 1 is not the same"):
        score_data(source, open_subject(decoder(), tokenizer=Other()), tmp_path / "new", about={})
    assert not (tmp_path / "new").exists()


def test_recipes_that_cannot_be_scored_are_refused(run: Path, text_recipe: Recipes, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_yaml(load_recipe(text_recipe(), ["data=noisy-trigram"])))
    with pytest.raises(ConfigError, match="noisy-trigram was given.*objective.reference"):
        score_recipe(recipe, [], str(run), tmp_path / "store", loading=Loading("cpu"))
    with pytest.raises(ConfigError, match="precision is 'int8'; allowed: float16, float32"):
        score_recipe(recipe, [], str(run), tmp_path / "store", "int8", loading=Loading("cpu"))


@pytest.mark.parametrize(
    ("count", "window", "stride"), [(1, 8, 4), (2, 8, 4), (8, 8, 4), (9, 8, 1), (31, 8, 4), (32, 8, 7)]
)
def test_windows_score_each_token_but_the_first_once(count: int, window: int, stride: int) -> None:
    places = windows_of(count, window, stride)
    scored = [token for begin, first in places for token in range(first, min(begin + window, count))]
    assert scored == list(range(1, count))
    assert all(first - begin >= window - stride for begin, first in places[1:])


def test_long_texts_are_scored_as_window_by_window(monkeypatch: pytest.MonkeyPatch) -> None:
    model = subject()
    ids = model.encode("The quick brown fox jumps over the lazy dog, and the dog does not mind at all.")
    expected = np.full(len(ids), np.nan, dtype=np.float32)
    for begin, first in windows_of(len(ids), 16, 6):
        row = torch.tensor([ids[begin : begin + 16]])
        expected[first : begin + 16] = model.losses(row)[0, first - begin - 1 :].numpy()
    monkeypatch.setattr(scoring, "ROW_TOKENS", 48)
    found = score_text(model, ids, window=16, stride=6)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.isnan(found[0]) and not np.isnan(found[1:]).any()


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (8, 0), (8, 8), (0, 1)])
def test_windows_that_do_not_fit_are_refused(window: int, stride: int) -> None:
    with pytest.raises(ConfigError, match=f"window {window} and stride {stride}"):
        score_text(subject(), [1, 2, 3], window=window, stride=stride)


TEXTS = [
    ("one", "A first text, with Ünïcode."),
    ("two", "x"),
    ("three", "And a third one that is somewhat longer. " * 3),
]


def test_the_selection_is_the_top_share_of_all_tokens(tmp_path: Path) -> None:
    model, reference = subject(0), subject(1)
    found = score_texts(model, reference, TEXTS, ratio=0.3, window=24, kept=tmp_path)
    excess = np.concatenate([one.excess_n for one in found])
    valid = np.flatnonzero(np.isfinite(excess))
    assert len(valid) == sum(len(text.encode()) - 1 for _, text in TEXTS)
    number = int(0.3 * len(valid) + 1e-6)
    best = sorted(valid, key=lambda i: (-excess[i], i))[:number]
    assert set(np.flatnonzero(np.concatenate([one.selected_n for one in found]))) == set(best)
    for one, (_, text) in zip(found, TEXTS, strict=True):
        assert "".join(pieces(one)) == text
        np.testing.assert_allclose(one.model_n, score_text(model, one.ids, window=24, stride=12), atol=0)
    rows = list(records(found))
    assert [row["selected"] for row in rows] == np.concatenate([one.selected_n for one in found]).tolist()
    assert rows[0]["loss"] is None and rows[1]["excess"] == pytest.approx(
        rows[1]["loss"] - rows[1]["reference"], abs=1e-6
    )
    json.dumps(rows, allow_nan=False)


def count_passes(monkeypatch: pytest.MonkeyPatch, *models: Subject) -> list[int]:
    """A list that gets an item for every pass of some models."""
    calls: list[int] = []
    for one in models:
        plain = one.losses
        monkeypatch.setattr(one, "losses", lambda tokens, plain=plain: (calls.append(1), plain(tokens))[1])
    return calls


def test_a_long_text_continues_within_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "ROW_TOKENS", 32)
    monkeypatch.setattr(scoring, "BLOCK_TOKENS", 64)
    model, reference, text = subject(0), subject(1), "many words in a row, " * 20
    plain = score_texts(model, reference, [("long", text)], window=16, stride=8)[0]
    whole = score_texts(model, reference, [("long", text)], window=16, stride=8, kept=tmp_path)[0]
    np.testing.assert_array_equal(whole.model_n, plain.model_n)
    blocks = sorted(tmp_path.iterdir())
    assert len(blocks) > 20
    blocks[3].unlink()
    blocks[-1].write_bytes(b"damaged")
    calls = count_passes(monkeypatch, model, reference)
    again = score_texts(model, reference, [("long", text)], window=16, stride=8, kept=tmp_path)[0]
    assert len(calls) <= 4
    np.testing.assert_array_equal(again.model_n, plain.model_n)
    np.testing.assert_array_equal(again.reference_n, plain.reference_n)


def test_a_text_that_is_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="again is the same text as one"):
        score_texts(subject(0), subject(1), [*TEXTS, ("again", TEXTS[0][1])])


def test_a_finding_holds_the_tokens_of_a_page_and_says_what_it_leaves_out() -> None:
    found = score_texts(subject(0), subject(1), TEXTS)
    drawn = token_texts(found, most=40)
    assert [len(one.spans) for one in drawn] == [len(found[0].ids), 1, 40 - len(found[0].ids) - 1]
    assert drawn[0].note == "" and drawn[2].note.startswith(
        f"The first {len(drawn[2].spans)} of {len(found[2].ids)} tokens"
    )
    assert "".join(span.text for span in drawn[2].spans) == TEXTS[2][1][: len(drawn[2].spans)]
    assert len(token_texts(found, most=5)) == 1


def test_the_hash_of_a_model_covers_its_settings() -> None:
    first, same = decoder(), decoder()
    assert weights_hash(first) == weights_hash(same) != weights_hash(decoder(seed=1))
    config = {"width": 16, "depth": 1, "head_dim": 16, "initialisation": {"kind": "normal", "std": 0.3}}
    other = DecoderConfig.model_validate(config).build(257, 32, 0)
    other.load_state_dict(first.state_dict())
    assert weights_hash(other) != weights_hash(first)


def test_finished_texts_are_not_scored_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = subject(0), subject(1)
    whole = score_texts(model, reference, TEXTS, kept=tmp_path)
    sorted(tmp_path.iterdir())[2].unlink()
    calls = count_passes(monkeypatch, model, reference)
    again = score_texts(model, reference, TEXTS, kept=tmp_path)
    assert len(calls) == 1
    for one, other in zip(whole, again, strict=True):
        np.testing.assert_array_equal(one.model_n, other.model_n)
        np.testing.assert_array_equal(one.reference_n, other.reference_n)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"ratio": 0.0}, ConfigError, "ratio is 0.0"),
        ({"ratio": 1.2}, ConfigError, "ratio is 1.2"),
        ({"texts": [("a", " ")]}, DataError, "no text to score"),
        ({"texts": [("a", "x")]}, DataError, "no token has one before it"),
    ],
)
def test_bad_requests_are_refused(change: dict[str, Any], error: type[Exception], words: str) -> None:
    texts = change.pop("texts", TEXTS)
    with pytest.raises(error, match=words):
        score_texts(subject(0), subject(1), texts, **change)


def test_models_of_other_tokens_are_refused_by_both_names() -> None:
    with pytest.raises(ConfigError, match="reference vocab 300 ≠ model vocab 257"):
        score_texts(subject(0), subject(1, vocab_size=300), TEXTS)


def test_hugging_face_models_are_scored_too(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=257, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    models = [open_subject(GPT2LMHeadModel(config), tokenizer=ByteTokenizer()) for _ in range(2)]
    mixed = score_texts(models[0], subject(0), TEXTS)
    both = score_texts(*models, TEXTS, ratio=0.5)
    for one, other in zip(mixed, both, strict=True):
        np.testing.assert_array_equal(one.model_n, other.model_n)
    ids = models[0].encode(TEXTS[0][1])
    with torch.no_grad():
        logits = models[0].model(torch.tensor([ids])).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
    np.testing.assert_allclose(mixed[0].model_n[1:], expected.numpy(), atol=1e-5)
    with pytest.raises(ConfigError, match="reads at most 32"):
        score_texts(*models, TEXTS, window=64)


def test_a_hugging_face_reference_scores_training_data(text_recipe: Recipes, story_cache: Path, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=257, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    reference = open_subject(GPT2LMHeadModel(config), tokenizer=ByteTokenizer())
    source = source_of(text_recipe(), story_cache)
    store = score_data(source, reference, tmp_path / "store", about=identity(reference), precision="float32")
    batch = source.window(np.asarray([5, 9]))
    tokens_bt = torch.cat([batch.tokens_bt, batch.targets_bt[:, -1:]], dim=1)
    np.testing.assert_allclose(store.losses(np.asarray([5, 9])), reference.losses(tokens_bt).numpy(), atol=1e-5)
    with pytest.raises(ConfigError, match="mask_documents"):
        score_data(source_of(text_recipe(masked=True), story_cache), reference, tmp_path / "masked", about={})
    with pytest.raises(ConfigError, match="reads at most 16"):
        short = GPT2Config(
            vocab_size=257, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
        )
        score_data(
            source, open_subject(GPT2LMHeadModel(short), tokenizer=ByteTokenizer()), tmp_path / "short", about={}
        )


def test_files_become_a_report(run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXTS[2][1])
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two <b>"}\n')
    files = (str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl"))
    page, finding = score_files(Asked(files, str(run), str(run), ratio=0.4, loading=Loading("cpu")), tmp_path / "out")
    assert [row[0] for row in finding.tables[0].rows] == [files[0], f"{files[1]}, text 1", f"{files[1]}, text 2"]
    assert all(row[4] == 0 for row in finding.tables[0].rows)  # a model beside itself
    assert "--ratio 0.4" in finding.command and page.is_file()
    lines = [json.loads(line) for line in (tmp_path / "out" / "tokens.jsonl").read_text().splitlines()]
    assert len(lines) == sum(len(text.spans) for text in finding.token_texts)
    assert Asked(files, "m", "r").folder() != Asked(files, "m", "r", ratio=0.5).folder()


def test_progress_is_a_plain_line_off_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "SECONDS", 0.0)
    with scoring.counting("scoring the data") as report:
        report(3, 1200)
    assert capsys.readouterr().err.startswith("scoring the data: 3 of 1,200 windows, 0 s")

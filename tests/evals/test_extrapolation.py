"""The same last tokens at every length, context that is only made longer, and the foreign-context control."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import tiny_model
from torch import Tensor

from torchstone.data.tokenizers import ByteTokenizer
from torchstone.diagnose.adapters import open_subject
from torchstone.diagnose.subject import Subject
from torchstone.errors import ConfigError, DataError
from torchstone.evals.extrapolation import Extrapolation, Windows, extrapolation, held_out_windows, text_windows
from torchstone.evals.extrapolation_finding import default_lengths, extrapolation_finding
from torchstone.models.decoder import DecoderConfig
from torchstone.recipe.load import load_recipe

WINDOWS = Windows(torch.arange(5 * 65).view(5, 65), torch.tensor([0, 0, 1, 1, 2]))
TOKENS = WINDOWS.tokens_nt


class Reader:
    """Stands for a model: keeps what it reads; its loss is 1 / context length."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, tokens_bt: Tensor, last: int) -> Tensor:
        self.seen.append(tokens_bt)
        return torch.full((tokens_bt.shape[0], last), 1 / (tokens_bt.shape[1] - 1))


def test_every_length_ends_in_the_same_tokens() -> None:
    reader = Reader()
    found = extrapolation(reader, WINDOWS, [32, 8, 64], last=8)
    assert found.lengths == (8, 32, 64)
    assert [part.shape[1] for part in reader.seen] == [9, 33, 65]
    for part in reader.seen:
        assert torch.equal(part[:, -9:], TOKENS[:, -9:])
    assert found.means == pytest.approx({8: 1 / 8, 32: 1 / 32, 64: 1 / 64})


def test_long_windows_are_read_a_few_at_a_time() -> None:
    reader = Reader()
    extrapolation(reader, Windows(torch.zeros(3, 8193, dtype=torch.long), torch.arange(3)), [8192], last=4)
    assert [tuple(part.shape) for part in reader.seen] == [(1, 8193)] * 3


def test_foreign_context_is_of_another_document_and_keeps_what_is_near() -> None:
    reader = Reader()
    extrapolation(reader, WINDOWS, [16, 64], last=8, near=16)
    short, long = reader.seen
    assert torch.equal(short, TOKENS[:, -17:])
    assert torch.equal(long[:, -17:], TOKENS[:, -17:])
    assert torch.equal(long[:, :-17], TOKENS[[2, 2, 4, 4, 0], :-17])  # the next window of another document
    assert WINDOWS.strangers().tolist() == [2, 2, 4, 4, 0]


def test_slope_is_per_doubling_and_paired_by_window() -> None:
    level_n = np.linspace(1, 3, 12)
    found = Extrapolation((8, 16, 64), np.stack([level_n, level_n - 0.5, level_n - 1.5]))
    np.testing.assert_allclose(found.slopes_n, -0.5)
    assert found.slope().effect == pytest.approx(-0.5)
    rise = found.rise(64)
    assert (rise.effect, rise.n) == (pytest.approx(-1.5), 12)
    assert rise.high < -1.49  # the spread between windows cancels
    assert found.items(16)["window 0"] == 0.5


@pytest.mark.parametrize("lengths", [[4], [65], []])
def test_lengths_that_do_not_fit_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ConfigError, match="lengths"):
        extrapolation(Reader(), WINDOWS, lengths, last=8)


def test_one_length_has_no_slope_and_one_document_no_stranger() -> None:
    with pytest.raises(ConfigError, match="two lengths"):
        _ = extrapolation(Reader(), WINDOWS, [16], last=8).slopes_n
    with pytest.raises(DataError, match="two documents"):
        extrapolation(Reader(), Windows(TOKENS, torch.zeros(5)), [16], last=8, near=8)


def test_a_table_of_positions_that_is_too_short_is_explained() -> None:
    def model(tokens_bt: Tensor, last: int) -> Tensor:
        raise IndexError("index out of range in self")

    with pytest.raises(ConfigError, match="cannot read 64 tokens"):
        extrapolation(model, WINDOWS, [64], last=8)


def test_windows_are_held_out_text_inside_one_document() -> None:
    data = load_recipe("recipes/tiny.yaml", ["data.tokenizer=bytes", "data.length=64"]).data
    windows = held_out_windows(data, 256, 8)
    assert windows.tokens_nt.shape == (8, 257)
    source = data.build(None)
    end = source.tokenizer.end_of_document
    assert not (windows.tokens_nt == end).any()
    assert torch.equal(windows.tokens_nt, held_out_windows(data, 256, 8).tokens_nt)
    tokens = source.shards.validation.read(0, len(source.shards.validation.tokens)).astype(np.uint16)
    whole = tokens.tobytes()
    for row, document in zip(windows.tokens_nt, windows.documents_n.tolist(), strict=True):
        at = whole.index(row.numpy().astype(np.uint16).tobytes()) // 2
        assert int((tokens[:at] == end).sum()) == document
    with pytest.raises(DataError, match="inside one document"):
        held_out_windows(data, 256, 10**6)


def bytes_subject(length: int = 32) -> Subject:
    return open_subject(DecoderConfig(width=16, depth=1, head_dim=8).build(257, length, 0), tokenizer=ByteTokenizer())


TEXTS = ["".join(chr(97 + (i * i + 7 * n) % 26) for i in range(700)) for n in range(6)]


def test_windows_of_texts_come_from_as_many_texts_as_there_are() -> None:
    windows = text_windows(bytes_subject(), TEXTS, 64, 8)
    assert windows.documents_n.tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    assert bytes(windows.tokens_nt[6].tolist()).decode() == TEXTS[0][65:130]
    with pytest.raises(DataError, match="8 windows of 701 tokens are asked for, and the 6 texts have 0 .*700 tokens"):
        text_windows(bytes_subject(), TEXTS, 700, 8)


def test_a_finding_has_curve_control_and_intervals() -> None:
    subject = bytes_subject()
    found = extrapolation_finding(subject, TEXTS, count=12, last=8)
    assert [row[0] for row in found.tables[0].rows] == [64, 128]  # trained on 32: 64 at least, 4 times at most
    own = extrapolation(subject, text_windows(subject, TEXTS, 128, 12), [64, 128], last=8)
    assert [row[1] for row in found.tables[0].rows] == pytest.approx(list(own.means.values()))
    assert (
        "for every doubling" in found.answer and "foreign text" in found.answer and "another document" in found.control
    )


def test_one_length_says_nothing_of_foreign_text() -> None:
    found = extrapolation_finding(bytes_subject(), TEXTS, lengths=(32,), count=12, last=8)
    assert found.answer.startswith("With 32 tokens") and "foreign" not in found.answer


def test_default_lengths_shrink_to_the_texts_and_to_the_models_table() -> None:
    found = extrapolation_finding(bytes_subject(length=512), TEXTS, count=6, last=8)
    assert [row[0] for row in found.tables[0].rows] == [128, 256, 512]
    assert any("Left out" in note and "1024" in note for note in found.notes)
    assert default_lengths(131072, None) == (256, 512, 1024, 2048, 4096)
    assert default_lengths(1024, 1024) == (256, 512, 1024)
    assert default_lengths(16, None) == (64,)


class Letters:
    """Every letter is a token of a vocabulary of 48."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % 45 + 3 for letter in text]

    def __len__(self) -> int:
        return 48


def test_hugging_face_models_and_their_tables() -> None:
    llama = open_subject(tiny_model("Llama"), tokenizer=Letters())
    found = extrapolation_finding(llama, TEXTS, lengths=(32, 128), count=4, last=8)
    assert [row[0] for row in found.tables[0].rows] == [32, 128]  # it says 64 of itself: rotary goes beyond
    gpt2 = open_subject(tiny_model("GPT2"), tokenizer=Letters())
    with pytest.raises(ConfigError, match="learned table of 64 positions"):
        extrapolation_finding(gpt2, TEXTS, lengths=(32, 128), count=4, last=8)
    inside = extrapolation_finding(gpt2, TEXTS, count=4, last=8)
    assert [row[0] for row in inside.tables[0].rows] == [64]


def test_a_models_first_token_stands_before_every_context(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, seen = bytes_subject(), []
    monkeypatch.setattr(subject, "first_tokens", lambda: [256])
    monkeypatch.setattr(
        subject, "losses", lambda tokens_bt, last: seen.append(tokens_bt) or torch.ones(len(tokens_bt), last)
    )
    windows = text_windows(subject, TEXTS, 64, 4)
    extrapolation(subject, windows, [16, 64], last=8, near=16)
    assert all((part[:, 0] == 256).all() for part in seen)
    assert torch.equal(seen[0][:, 1:], windows.tokens_nt[:, -16:])


def test_tasks_have_no_longer_windows() -> None:
    with pytest.raises(ConfigError, match="recall"):
        held_out_windows(load_recipe("recipes/tiny.yaml", ["data=recall"]).data, 64, 4)

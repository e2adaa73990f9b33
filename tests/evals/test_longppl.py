"""LongPPL beyond the published vectors: any T, K and S, tokenizers that differ, the cache, intervals in files, and bad input."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers as hf
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from torchstone.data.tokenizers import ByteTokenizer
from torchstone.diagnose.adapters import open_subject
from torchstone.errors import ConfigError, DataError
from torchstone.evals.longppl import LongPPL, longppl
from torchstone.evals.longppl_cache import read_intervals, write_intervals
from torchstone.evals.longppl_finding import longppl_finding
from torchstone.evals.longppl_keys import (
    bigram_distances,
    format_intervals,
    inside,
    key_intervals,
    key_tokens,
    near_threshold,
    parse_intervals,
)
from torchstone.evals.longppl_scorer import full_losses, scorer_of, short_losses
from torchstone.models.decoder import Decoder, DecoderConfig

LOOSE = {"trunc_len": 16, "stride": 8, "alpha": 0.0, "beta": -9.0}  # so that models with random weights have key tokens
TEXTS = ["the cat sat on the mat, the cat sat on the hat. " * 2, "one two three four one two three four. " * 3]


def decoder(seed: int = 0, width: int = 16) -> Decoder:
    return DecoderConfig(width=width, depth=2, head_dim=8).build(257, 64, seed).eval()


def subject(seed: int = 0) -> Any:
    return open_subject(decoder(seed), tokenizer=ByteTokenizer())


def official(logits: Any, ids: list[int], trunc_len: int, stride: int) -> np.ndarray:
    """Short losses by the published loop, one window and one token at a time."""
    found = np.full(len(ids), np.nan, dtype=np.float32)
    for start in range(0, len(ids) - trunc_len, stride):
        end = min(start + trunc_len + stride, len(ids))
        window_wv = logits(torch.tensor([ids[start:end]]))[0]
        for target in range(start + trunc_len, end):
            found[target] = F.cross_entropy(window_wv[target - start - 1], torch.tensor(ids[target])).item()
    return found


@settings(max_examples=40, deadline=None)
@given(length=st.integers(2, 70), trunc_len=st.integers(1, 40), stride=st.integers(1, 30))
def test_short_losses_are_those_of_the_window_loop(length: int, trunc_len: int, stride: int) -> None:
    model = decoder()
    ids = torch.randint(0, 257, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    with torch.no_grad():
        expected = official(lambda x_bt: model.logits(model(x_bt).hidden_btd), ids, trunc_len, stride)
        found = short_losses(scorer_of(open_subject(model)), ids, trunc_len, stride)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_last_window_of_one_token() -> None:
    ids = list(range(41))  # (41 - 16) mod 8 = 1
    found = short_losses(scorer_of(subject()), ids, 16, 8)
    assert int(np.isfinite(found).sum()) == 41 - 16
    assert np.isfinite(found[-1])


def test_special_tokens_before_every_window_if_asked() -> None:
    model, ids = decoder(), [256, *range(40)]
    scorer = scorer_of(open_subject(model))
    plain, first = short_losses(scorer, ids, 16, 8), short_losses(scorer, ids, 16, 8, [256])
    np.testing.assert_array_equal(plain[:24], first[:24])  # the first window has it already
    with torch.no_grad():
        window = model.logits(model(torch.tensor([[256, *ids[8:24]]])).hidden_btd)[0, -1]
    assert first[24] == pytest.approx(F.cross_entropy(window, torch.tensor(ids[24])).item(), abs=1e-5)
    assert first[24] != plain[24]


def test_thresholds_are_strict_and_near_ones_are_counted() -> None:
    full = np.array([np.nan, 1.0, 1.0, 2.0, 1.0, 1.98], dtype=np.float32)
    short = np.array([np.nan, 3.0, 3.02, 9.0, np.nan, 9.0], dtype=np.float32)
    assert key_tokens(full, short, 2.0, -2.0).tolist() == [False, False, True, False, False, True]
    assert near_threshold(full, short, 2.0, -2.0) == 4


def test_intervals_join_only_where_they_touch() -> None:
    spans = [(0, 0), (0, 2), (2, 3), (4, 6), (6, 6), (6, 7)]
    assert key_intervals(np.array([True] * 6), spans) == ((0, 3), (4, 7))
    assert key_intervals(np.array([False] * 6), spans) == ()


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 6)), max_size=8), st.integers(0, 30), st.integers(0, 8))
def test_inside_is_containment_in_one_interval(pairs: list[tuple[int, int]], start: int, size: int) -> None:
    intervals = [(a, a + n) for a, n in pairs]
    expected = size > 0 and any(a <= start and start + size <= b for a, b in intervals)
    assert bool(inside([(start, start + size)], intervals)[0]) == expected


def test_distances_to_the_bigram_before_the_window() -> None:
    ids = [1, 2, *range(10, 30), 1, 2, 7, 8]
    key = np.zeros(len(ids), dtype=bool)
    key[[23, 25]] = True
    assert bigram_distances(ids, key, 8, 4) == [22, None]
    assert bigram_distances(ids, key, 22, 4) == [None, None]  # the window of 23 begins at 0 and holds both


def test_corpus_weighs_key_tokens_alike_and_keeps_texts_without(tmp_path: Path) -> None:
    texts, path = [*TEXTS, "abcdefghijklmnopqrstuvwxyz"], tmp_path / "keys.txt"
    write_intervals(path, texts, [((2, 5), (10, 30)), ((3, 9),), ()])
    found = longppl(texts, subject(1), intervals=path)
    assert [len(one.key_index) for one in found.documents] == [23, 6, 0]
    assert found.documents[2].longppl is None
    with_keys = [one for one in found.documents if len(one.key_index)]
    total = sum(len(one.key_index) * math.log(one.longppl) for one in with_keys)
    assert found.longppl == pytest.approx(math.exp(total / found.key_tokens))
    losses = np.concatenate([one.losses_t for one in found.documents])
    assert found.ppl == pytest.approx(math.exp(losses.astype(np.float64).mean()))
    assert found.tokens == sum(len(text.encode()) for text in TEXTS) + 26


def test_no_key_token_is_no_longppl() -> None:
    found = longppl(TEXTS[0], subject(1), subject(0), trunc_len=16, stride=8)
    assert found.longppl is None and found.interval is None and found.key_tokens == 0
    assert found.ppl is not None and found.ppl > 1
    assert "insufficient: 0 key tokens" in found.warnings[0]
    assert "trunc_len (16) is long for these texts" in found.warnings[1]


def test_many_documents_have_an_interval_around_the_value() -> None:
    texts = [f"{n} {n * n} {n + 7} again {n} {n * n} {n + 7} and more of {n}" for n in range(100, 112)]
    found = longppl(texts, subject(1), subject(0), **LOOSE)
    assert found.interval is not None and found.longppl is not None
    assert found.interval[0] < found.longppl < found.interval[1]
    assert found.sufficient


def test_the_same_model_as_evaluator_gives_the_same_values() -> None:
    one, other = decoder(), decoder()
    shared = open_subject(one, tokenizer=ByteTokenizer())
    same = longppl(TEXTS, shared, shared, **LOOSE)
    apart = longppl(TEXTS, open_subject(other, tokenizer=ByteTokenizer()), shared, **LOOSE)
    assert same.longppl == apart.longppl
    assert same.documents[0].losses_t.tobytes() == apart.documents[0].losses_t.tobytes()


def words() -> Any:
    """A fast tokenizer of words and spaces with a special token before every text."""
    vocabulary = {"<s>": 0, "<unk>": 1}
    for text in TEXTS:
        for word in text.split(" "):
            for piece in (word, "▁" + word):
                vocabulary.setdefault(piece, len(vocabulary))
    inner = hf.Tokenizer(hf.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = hf.pre_tokenizers.Metaspace()
    inner.post_processor = hf.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")


def test_a_hugging_face_evaluator_and_a_model_of_bytes(tmp_path: Path) -> None:
    tokenizer = words()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = longppl(TEXTS, subject(), str(tmp_path), trunc_len=5, stride=3, alpha=0.0, beta=-9.0)
    for document, text in zip(found.documents, TEXTS, strict=True):
        assert document.evidence is not None
        assert document.evidence.ids[0] == 0  # the evaluator reads its special token
        assert document.tokens == len(text.encode())  # the model does not
        keys = {at for start, end in document.intervals for at in range(start, end)}
        assert set((document.key_index + 1).tolist()) == {at for at in keys if at > 0}
    assert found.key_tokens > 0


def test_a_plain_function_needs_a_tokenizer() -> None:
    def uniform(tokens_bt: Tensor) -> Tensor:
        return torch.zeros(*tokens_bt.shape, 257)

    found = longppl(TEXTS[0], uniform, subject(), **LOOSE, tokenizer=ByteTokenizer())
    assert found.ppl == pytest.approx(257) and found.longppl == pytest.approx(257)
    with pytest.raises(ConfigError, match="a plain function has no tokenizer"):
        longppl(TEXTS[0], uniform, subject(), **LOOSE)
    with pytest.raises(ConfigError, match="a int is no model"):
        longppl(TEXTS[0], 3, subject(), **LOOSE)


def check_equal(one: LongPPL, other: LongPPL) -> None:
    assert one.longppl == other.longppl and one.intervals == other.intervals
    for left, right in zip(one.documents, other.documents, strict=True):
        assert left.evidence is not None and right.evidence is not None
        assert left.evidence.full_t.tobytes() == right.evidence.full_t.tobytes()
        assert left.evidence.short_t.tobytes() == right.evidence.short_t.tobytes()


def test_cached_and_online_are_equal_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    online = longppl(TEXTS, subject(1), subject(0), **LOOSE)
    check_equal(online, longppl(TEXTS, subject(1), subject(0), **LOOSE, cache=tmp_path))
    monkeypatch.setattr("torchstone.evals.longppl_cache.short_losses", None)  # the evaluator is not asked again
    check_equal(online, longppl(TEXTS, subject(1), subject(0), **LOOSE, cache=tmp_path))


def test_the_cache_is_bound_to_text_evaluator_and_rule(tmp_path: Path) -> None:
    longppl(TEXTS[0], subject(1), subject(0), **LOOSE, cache=tmp_path)
    for change in ({"alpha": 0.1}, {"beta": -8.0}, {"stride": 4}, {"trunc_len": 17}):
        longppl(TEXTS[0], subject(1), subject(0), **{**LOOSE, **change}, cache=tmp_path)
    longppl(TEXTS[0] + "!", subject(1), subject(0), **LOOSE, cache=tmp_path)
    longppl(TEXTS[0], subject(1), subject(2), **LOOSE, cache=tmp_path)
    longppl(TEXTS[0], subject(3), subject(0), **LOOSE, cache=tmp_path)  # another evaluated model reads the first one's
    assert len(list(tmp_path.iterdir())) == 7


def test_kept_losses_of_another_text_are_refused(tmp_path: Path) -> None:
    longppl(TEXTS[0], subject(1), subject(0), **LOOSE, cache=tmp_path / "a")
    longppl(TEXTS[1], subject(1), subject(0), **LOOSE, cache=tmp_path / "b")
    (one,), (other,) = (list((tmp_path / name).iterdir()) for name in "ab")
    other.write_bytes(one.read_bytes())
    with pytest.raises(DataError, match="found for another text.*Remove it"):
        longppl(TEXTS[1], subject(1), subject(0), **LOOSE, cache=tmp_path / "b")
    other.write_bytes(one.read_bytes()[:100])
    with pytest.raises(DataError, match="holds no key tokens that can be read"):
        longppl(TEXTS[1], subject(1), subject(0), **LOOSE, cache=tmp_path / "b")


def test_a_plain_function_is_kept_under_its_own_name_only(tmp_path: Path) -> None:
    class Uniform:
        def __call__(self, tokens_bt: Tensor) -> Tensor:
            return torch.zeros(*tokens_bt.shape, 257)

    judge = Uniform()
    asked = {**LOOSE, "cache": tmp_path, "evaluator_tokenizer": ByteTokenizer()}
    with pytest.raises(ConfigError, match="give it an attribute `identity`"):
        longppl(TEXTS[0], subject(), judge, **asked)
    judge.identity = "uniform 1"  # type: ignore[attr-defined]
    longppl(TEXTS[0], subject(), judge, **asked)
    assert len(list(tmp_path.iterdir())) == 1


def test_intervals_of_a_file_stand_for_an_evaluator(tmp_path: Path) -> None:
    online = longppl(TEXTS, subject(1), subject(0), **LOOSE)
    path = tmp_path / "keys.txt"
    write_intervals(path, TEXTS, online.intervals)
    offline = longppl(TEXTS, subject(1), intervals=path, trunc_len=16, stride=8)
    assert offline.longppl == online.longppl and offline.intervals == online.intervals
    assert offline.near is None
    with pytest.raises(DataError, match="line 1, holds intervals that were found for another text than document 0"):
        longppl([TEXTS[0] + "!", TEXTS[1]], subject(1), intervals=path)
    with pytest.raises(DataError, match="2 lines of intervals and there are 1 texts"):
        longppl(TEXTS[:1], subject(1), intervals=path)


def test_published_lines_have_no_hash_and_must_lie_inside_the_text(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    path.write_text("[1, 3];[5, 9];\n\n")
    assert read_intervals(path, ["a" * 9, "b"]) == [((1, 3), (5, 9)), ()]
    with pytest.raises(DataError, match=r"holds the interval \[5, 9\], and the text has 8 characters"):
        read_intervals(path, ["a" * 8, "b"])
    with pytest.raises(DataError, match="'1-3', which is no interval"):
        parse_intervals("1-3", 9, "keys.txt, line 1,")
    with pytest.raises(DataError, match="cannot be read"):
        read_intervals(tmp_path / "missing", ["a"])


@given(st.lists(st.integers(1, 5), max_size=12))
def test_intervals_survive_their_text(steps: list[int]) -> None:
    edges = np.cumsum(steps).tolist()
    intervals = tuple(zip(edges[::2], edges[1::2], strict=False))
    assert parse_intervals(format_intervals(intervals), sum(steps) + 1, "here") == intervals


def test_bad_input_is_named() -> None:
    judge = subject()
    with pytest.raises(DataError, match=r"document 1 has 16 tokens; LongPPL needs more than trunc_len = 16"):
        longppl([TEXTS[0], "a" * 16], judge, judge, **LOOSE)
    for name in ("stride", "trunc_len"):
        with pytest.raises(ConfigError, match=f"{name} was given as 0; it must be at least 1"):
            longppl(TEXTS, judge, judge, **{**LOOSE, name: 0})
    with pytest.raises(ConfigError, match="alpha was given as nan"):
        longppl(TEXTS, judge, judge, **{**LOOSE, "alpha": math.nan})
    with pytest.raises(ConfigError, match="exactly one of evaluator and intervals"):
        longppl(TEXTS, judge)
    with pytest.raises(DataError, match="no text was given"):
        longppl([], judge, judge)


def test_windows_beyond_a_models_maximum() -> None:
    config = transformers.GPT2Config(vocab_size=257, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    short = open_subject(transformers.GPT2LMHeadModel(config), tokenizer=ByteTokenizer())
    with pytest.raises(ConfigError, match=r"trunc_len \+ stride = 24 \+ 16 = 40 tokens and .* reads at most 32"):
        longppl(TEXTS, subject(), short, trunc_len=24, stride=16)
    with pytest.raises(DataError, match="the evaluator .* reads at most 32"):
        longppl(TEXTS, subject(), short, trunc_len=16, stride=8)
    with pytest.raises(DataError, match="has a table of 32 positions"):
        longppl(TEXTS, short, subject(), trunc_len=16, stride=8)


def test_the_full_losses_of_a_text() -> None:
    model = decoder()
    ids = list(TEXTS[0].encode())
    logits = model.logits(model(torch.tensor([ids])).hidden_btd)[0, :-1]
    expected = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").detach()
    found = full_losses(scorer_of(open_subject(model)), ids)
    np.testing.assert_allclose(found[1:], expected, atol=1e-5)
    assert math.isnan(found[0])


def test_the_finding_has_controls_tables_and_coloured_texts(tmp_path: Path) -> None:
    folder = tmp_path / "judge"
    config = transformers.GPT2Config(vocab_size=259, n_positions=200, n_embd=16, n_layer=1, n_head=2)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    transformers.ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    texts = [*TEXTS, "short"]
    asked = {**LOOSE, "evaluator": str(folder), "cache": str(tmp_path / "kept")}
    with pytest.raises(DataError, match="document 2 has 6 tokens"):
        longppl_finding(subject(), texts, **asked)
    found = longppl_finding(subject(), texts, **asked, skip_short=True)
    titles = ["Documents", "Why tokens are key", "Long-short difference", "What the far context is worth"]
    assert [table.title for table in found.tables] == titles
    assert "As many tokens chosen by chance" in found.answer
    assert "1 were too short" in " ".join(found.notes)
    documents = found.tables[0].rows
    for text, shown, row in zip(TEXTS, found.token_texts, documents, strict=True):
        assert "".join(span.text for span in shown.spans) == text
        assert sum(span.marked for span in shown.spans) == row[2] > 0
        assert all(span.value is not None and span.value > 0 for span in shown.spans if span.marked)
    histogram = found.tables[2]
    assert sum(row[2] for row in histogram.rows) == sum(len(text) + 1 - 16 for text in TEXTS)


def test_the_finding_refuses_what_it_cannot_honour() -> None:
    with pytest.raises(ConfigError, match="documents was given as 0"):
        longppl_finding(subject(), TEXTS, evaluator="decoder", documents=0)
    with pytest.raises(ConfigError, match="skip_short needs an evaluator"):
        longppl_finding(subject(), TEXTS, intervals="keys.txt", skip_short=True)
    with pytest.raises(DataError, match="none of the 1 texts has more than trunc_len = 16"):
        longppl_finding(subject(), ["short"], evaluator="decoder", trunc_len=16, skip_short=True)
    with pytest.raises(ConfigError, match="exactly one of evaluator and intervals"):
        longppl_finding(subject(), TEXTS)

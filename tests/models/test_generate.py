"""Generation: equal to repeated full passes, fair to every prompt of a batch, exact about stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_recipe

from torchstone.cli.main import main
from torchstone.errors import ConfigError
from torchstone.models.decoder import Decoder, DecoderConfig
from torchstone.models.generate import generate
from torchstone.models.sampling import Sampling, choose_each
from torchstone.train.run import load_run, train

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [3]]
MIXERS: list[Any] = [
    "attention",
    {"kind": "attention", "window": 3},
    "differential",
    {"kind": "differential", "version": "v2", "window": 4},
]


def build(mixer: Any = "attention") -> Decoder:
    config = {
        "width": 32,
        "depth": 2,
        "head_dim": 8,
        "block": {"mixer": mixer},
        "initialisation": {"kind": "normal", "std": 0.3},
    }
    return DecoderConfig.model_validate(config).build(50, 16, 0)


@torch.no_grad()
def _by_full_passes(model: Decoder, prompt: list[int], max_new: int) -> tuple[list[int], list[float]]:
    """The most likely continuation, with a fresh full pass for every token."""
    tokens, logprobs = list(prompt), []
    for _ in range(max_new):
        logits_v = model.logits(model(torch.tensor([tokens])).hidden_btd[0, -1])
        tokens.append(int(logits_v.argmax()))
        logprobs.append(float(logits_v.log_softmax(-1)[tokens[-1]]))
    return tokens[len(prompt) :], logprobs


@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_greedy_equals_full_passes(mixer: Any) -> None:
    model = build(mixer)
    for prompt, completion in zip(PROMPTS, generate(model, PROMPTS, max_new=9, greedy=True), strict=True):
        tokens, logprobs = _by_full_passes(model, prompt, 9)
        assert completion.tokens == tokens
        assert completion.logprobs == pytest.approx(logprobs, abs=1e-4)
        assert completion.finish_reason == "length" and completion.text is None


@pytest.mark.parametrize("mixer", MIXERS, ids=str)
def test_samples_do_not_depend_on_the_batch(mixer: Any) -> None:
    model = build(mixer)
    settings: dict[str, Any] = {"max_new": 8, "temperature": 1.3, "top_k": 20, "top_p": 0.9}
    together = generate(model, PROMPTS, seed=[5, 6, 7], **settings)
    for prompt, own, completion in zip(PROMPTS, (5, 6, 7), together, strict=True):
        assert generate(model, [prompt], seed=[own], **settings)[0].tokens == completion.tokens
    assert [c.tokens for c in generate(model, PROMPTS[::-1], seed=[7, 6, 5], **settings)] == [
        c.tokens for c in together[::-1]
    ]


def test_seeds() -> None:
    model = build()
    first, second, other = (generate(model, PROMPTS, max_new=8, seed=seed) for seed in (1, 1, 2))
    assert first == second != other
    twins = generate(model, [[1], [1]], max_new=8, seed=0)
    assert twins[0].tokens != twins[1].tokens
    before = torch.random.get_rng_state()
    generate(model, PROMPTS, max_new=2)
    assert torch.equal(before, torch.random.get_rng_state())


def test_stop_sequences_may_span_steps() -> None:
    model = build()
    tokens = generate(model, PROMPTS[:1], max_new=8, greedy=True)[0].tokens
    ended = generate(model, PROMPTS[:1], max_new=8, greedy=True, stop=[[49, 49], tokens[3:6]])[0]
    place = next(i for i in range(3, 9) if tokens[i - 3 : i] == tokens[3:6])
    assert ended.tokens == tokens[: place - 3]
    assert len(ended.logprobs) == len(ended.tokens)
    assert ended.finish_reason == "stop"
    # one row stops, the others go on as they would have
    rows = generate(model, PROMPTS, max_new=8, greedy=True, stop=[tokens[3:6]])
    alone = [generate(model, [prompt], max_new=8, greedy=True, stop=[tokens[3:6]])[0].tokens for prompt in PROMPTS]
    assert [row.tokens for row in rows] == alone


def test_the_last_token_may_complete_a_stop() -> None:
    model = build()
    tokens = generate(model, [[7, 9]], max_new=4, greedy=True)[0].tokens
    if tokens[2:] in (tokens[0:2], tokens[1:3]):
        pytest.fail("the fixture repeats itself; choose another prompt")
    completion = generate(model, [[7, 9]], max_new=4, greedy=True, stop=[tokens[2:]])[0]
    assert (completion.tokens, completion.finish_reason) == (tokens[:2], "stop")


def test_training_mode_is_kept() -> None:
    model = build({"kind": "attention", "dropout": 0.5}).train()
    assert generate(model, PROMPTS, max_new=4, greedy=True) == generate(model, PROMPTS, max_new=4, greedy=True)
    assert model.training
    assert generate(model, [], max_new=3) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new": 0}, "at least one token"),
        ({"prompts": [[1], []]}, "prompt 1 is empty"),
        ({"prompts": [[1, 50]]}, "holds token 50; this model knows 0 to 49"),
        ({"temperature": 0.0}, "greedy=True"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"greedy": True, "top_k": 3}, "remove temperature, top_k and top_p"),
        ({"stop": [[]]}, "stop sequence is empty"),
        ({"seed": [1, 2, 3]}, "3 seeds were given for 1 prompts"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    settings = {"prompts": [[1, 2]], "max_new": 2, **change}
    with pytest.raises(ConfigError, match=message):
        generate(build(), settings.pop("prompts"), **settings)


def test_top_k_and_top_p_keep_the_most_likely() -> None:
    logits_bv = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    torch.testing.assert_close(Sampling(top_k=2).probabilities(logits_bv)[0], torch.tensor([4, 3, 0, 0]).double() / 7)
    kept = Sampling(top_p=0.65).probabilities(logits_bv)[0]
    torch.testing.assert_close(kept, torch.tensor([4, 3, 0, 0]).double() / 7)
    assert (Sampling(top_p=0.01).probabilities(logits_bv)[0] > 0).sum() == 1
    cold = Sampling(temperature=0.5).probabilities(logits_bv)[0]
    torch.testing.assert_close(cold, torch.tensor([16, 9, 4, 1]).double() / 30)


def test_draws_follow_the_distribution() -> None:
    logits_bv = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    generator = torch.Generator().manual_seed(0)
    draws = [int(Sampling().choose(logits_bv, [generator])) for _ in range(4000)]
    share = torch.bincount(torch.tensor(draws), minlength=4) / 4000
    torch.testing.assert_close(share, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03, rtol=0)


@pytest.mark.parametrize("mixer", MIXERS, ids=str)
@pytest.mark.parametrize("prefill", [1, 3, 64])
def test_prompts_may_be_read_in_chunks(mixer: Any, prefill: int) -> None:
    model = build(mixer)
    whole = generate(model, PROMPTS, max_new=6, seed=3)
    chunked = generate(model, PROMPTS, max_new=6, seed=3, prefill=prefill)
    assert [completion.tokens for completion in chunked] == [completion.tokens for completion in whole]
    for one, other in zip(chunked, whole, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_rows_may_be_sampled_in_different_ways() -> None:
    logits_bv = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    ways = [Sampling(greedy=True), Sampling(top_k=3), Sampling(temperature=0.5), Sampling(top_k=3)]
    together = choose_each(logits_bv, ways, [torch.Generator().manual_seed(row) for row in range(4)])
    for row, way in enumerate(ways):
        assert together[row] == way.choose(logits_bv[row : row + 1], [torch.Generator().manual_seed(row)])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained for a few steps on text."""
    place = tmp_path_factory.mktemp("generate")
    (place / "notes.txt").write_text("".join(f"row {n} of many rows, " for n in range(900)))
    data = {
        "kind": "text",
        "corpus": {"kind": "files", "paths": [str(place / "notes.txt")]},
        "tokenizer": "bytes",
        "length": 32,
    }
    train(tiny_recipe(data=data, evaluation={"every": None, "sequences": 4}), place / "run")
    return place / "run"


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(("generate", *words))
    found = capsys.readouterr()
    return (caught.value.code if isinstance(caught.value.code, int) else 0), found.out, found.err


def test_several_prompts_receive_what_they_would_in_one_batch(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["row 1", "many rows, row", "o", "row 77 of many rows, row 78"]
    lines = tmp_path / "prompts.txt"
    lines.write_text("\n".join(texts[1:]) + "\n\n")
    objects = tmp_path / "prompts.jsonl"
    objects.write_text("\n".join([json.dumps({"prompt": texts[1], "id": 3}), *map(json.dumps, texts[2:])]))
    settings = ("--max-new", "6", "--seed", "3", "--rows", "2", "--prefill", "5")
    shown = {}
    for file in (lines, objects):
        code, out, err = command(capsys, str(run), "--prompt", texts[0], "--prompts", str(file), *settings)
        assert code == 0 and "generate: 4/4 prompts" in err
        shown[file] = [json.loads(line) for line in out.splitlines()]
    assert shown[lines] == shown[objects]
    assert [line["prompt"] for line in shown[lines]] == texts
    out = tmp_path / "out.jsonl"
    words = [word for text in texts for word in ("--prompt", text)]
    code, printed, _ = command(capsys, str(run), *words, *settings, "--out", str(out))
    assert (code, printed) == (0, f"{out}\n")
    assert [json.loads(line) for line in out.read_text().splitlines()] == shown[lines]
    _, model, data = load_run(run)
    encoded = [data.tokenizer.encode(text) for text in texts]
    wanted = generate(model, encoded, max_new=6, seed=3, temperature=0.8, stop=[[data.tokenizer.end_of_document]])
    assert [line["completion"] for line in shown[lines]] == [data.tokenizer.decode(one.tokens) for one in wanted]
    assert [line["tokens"] for line in shown[lines]] == [len(one.tokens) for one in wanted]


def test_one_prompt_prints_its_text_alone(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = command(capsys, str(run), "--prompt", "row 1", "--max-new", "5", "--greedy")
    assert (code, err) == (0, "") and not out.startswith("{")


@pytest.mark.parametrize(
    ("name", "content", "words", "code", "message"),
    [
        ("none.txt", "\n\n", [], 2, "nothing to continue"),
        ("bad.jsonl", '{"prompt": "x"}\n{"text": "y"}', [], 3, "bad.jsonl, line 2 holds no prompt"),
        ("bad.jsonl", '"x"\n{', [], 3, "line 2 is no JSON"),
        ("rows.txt", "x", ["--rows", "0"], 2, "max_rows is 0"),
        ("rows.txt", "x", ["--max-new", "0"], 2, "at least one token"),
    ],
)
def test_prompts_that_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, words: list[str], code: int,
    message: str,
) -> None:  # fmt: skip
    (tmp_path / name).write_text(content)
    found, out, err = command(capsys, str(run), "--prompts", str(tmp_path / name), *words)
    assert (found, out) == (code, "") and message in err
    missing, _, err = command(capsys, str(run), "--prompts", str(tmp_path / "nowhere.txt"))
    assert missing == 3 and "nowhere.txt" in err

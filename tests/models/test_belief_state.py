"""The belief-state model: two directions, documents, decoding of either, and its use as a decoder."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from torchstone.data.batch import Batch
from torchstone.errors import ConfigError
from torchstone.models.belief_beam import beam_search
from torchstone.models.belief_generate import infill, prefix_vectors, prepend, score_goal, suffix_vectors
from torchstone.models.belief_state import BeliefStateConfig
from torchstone.models.counts import count
from torchstone.models.decoder import DecoderConfig
from torchstone.models.generate import generate
from torchstone.nn.span import Span
from torchstone.objectives.next_token import NextTokenConfig

VOCAB, END, LENGTH = 11, 10, 12
MIXERS: dict[str, Any] = {
    "attention": "attention",
    "grouped window": {"kind": "attention", "kv_heads": 1, "window": 4},
    "differential": "differential",
    "kerple": {"kind": "attention", "position": "kerple"},
    "hgrn2": "hgrn2",
    "rglru": "rglru",
}
every_mixer = pytest.mark.parametrize("mixer", MIXERS.values(), ids=list(MIXERS))


def config_of(mixer: Any = "attention", **changes: Any) -> BeliefStateConfig:
    settings = {"width": 32, "depth": 2, "backward_depth": 1, "head_dim": 8, "pair": {"hidden": 24}, "end_token": END}
    init = {"kind": "normal", "std": 0.25}
    return BeliefStateConfig.model_validate({**settings, "block": {"mixer": mixer}, "initialisation": init, **changes})


def model_of(mixer: Any = "attention", **changes: Any) -> Any:
    return config_of(mixer, **changes).build(VOCAB, LENGTH, 0).eval()


def rows(count: int = 4, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


def close(ours: Tensor, theirs: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-4)


@every_mixer
@torch.no_grad()
def test_prefixes_see_back_to_their_end_token_and_suffixes_on_to_theirs(mixer: Any) -> None:
    model = model_of(mixer)
    tokens_bt = torch.tensor([[1, 2, 3, END, 4, 5, 6, END, 7, 8]])
    before, behind = model(tokens_bt).hidden_btd[0], model.suffixes(tokens_bt).hidden_btd[0]
    for place in range(10):
        changed = tokens_bt.clone()
        changed[0, place] = 9
        if tokens_bt[0, place] == END:
            continue
        left, right = (place // 4 * 4 - 1, place // 4 * 4 + 3)
        moved = (model(changed).hidden_btd[0] - before).abs().amax(-1) > 1e-6
        assert moved.nonzero().flatten().tolist() == list(range(place, min(right, 10)))
        moved = (model.suffixes(changed).hidden_btd[0] - behind).abs().amax(-1) > 1e-6
        assert moved.nonzero().flatten().tolist() == list(range(max(left + 1, 0), place + 1))


@every_mixer
@torch.no_grad()
def test_states_of_both_directions_continue_where_they_end(mixer: Any) -> None:
    model, tokens_bt = model_of(mixer), rows()
    for read, backward in ((model.forward, False), (model.backwards, True)):
        whole = read(tokens_bt).hidden_btd
        state = model.new_state(4, LENGTH, backward=backward)
        steps = [read(tokens_bt[:, start:stop], None, state).hidden_btd for start, stop in ((0, 5), (5, 6), (6, 12))]
        close(torch.cat(steps, dim=1), whole)
        assert state.length == LENGTH


@torch.no_grad()
def test_states_are_selected_joined_and_copied() -> None:
    model, tokens_bt = model_of(), rows(3)
    whole = model(tokens_bt).hidden_btd
    state = model.new_state(3, LENGTH)
    model(tokens_bt[:, :7], None, state)
    kept = copy.deepcopy(state)
    picked = state.select(torch.tensor([2, 0]))
    close(model(tokens_bt[[2, 0], 7:], None, picked).hidden_btd, whole[[2, 0], 7:])
    joined = kept.select(torch.tensor([1])).join(kept.select(torch.tensor([0, 2])))
    close(model(tokens_bt[[1, 0, 2], 7:], None, joined).hidden_btd, whole[[1, 0, 2], 7:])
    assert joined.nbytes() > 0 and torch.equal(kept.position_b, state.position_b)


@torch.no_grad()
def test_left_padding_is_invisible() -> None:
    model, tokens_bt = model_of(), rows(2)
    padded = torch.cat([torch.full((2, 3), END), tokens_bt], dim=1)
    valid_bt = (torch.arange(LENGTH + 3) >= 3).expand(2, -1)
    close(model(padded, Span(valid_bt=valid_bt)).hidden_btd[:, 3:], model(tokens_bt).hidden_btd)
    behind = torch.cat([tokens_bt, torch.full((2, 3), 1)], dim=1)
    found = model.suffixes(behind, Span(valid_bt=valid_bt.flip(1))).hidden_btd[:, :-3]
    close(found, model.suffixes(tokens_bt).hidden_btd)


@torch.no_grad()
def test_given_documents_add_borders_only_where_no_end_token_stands() -> None:
    model = model_of()
    tokens_bt = torch.tensor([[1, 2, END, 3, 4, 5]])
    same = torch.tensor([[0, 0, 0, 1, 1, 1]])
    close(model(tokens_bt, Span(documents_bt=same)).hidden_btd, model(tokens_bt).hidden_btd)
    more = torch.tensor([[0, 0, 0, 1, 2, 2]])
    cut = model(tokens_bt, Span(documents_bt=more)).hidden_btd
    close(cut[:, :4], model(tokens_bt).hidden_btd[:, :4])
    close(cut[:, 4:], model(tokens_bt[:, 4:]).hidden_btd)
    close(
        model.suffixes(tokens_bt, Span(documents_bt=more)).hidden_btd[:, 3:4],
        model.suffixes(tokens_bt[:, 3:4]).hidden_btd,
    )
    with pytest.raises(ConfigError, match="takes documents from its end token while it decodes"):
        model(tokens_bt, Span(documents_bt=more), model.new_state(1, 6))


@torch.no_grad()
def test_as_a_decoder_it_speaks_before_the_empty_suffix() -> None:
    model, tokens_bt = model_of(), rows()
    hidden_btd = model(tokens_bt).hidden_btd
    alone = model.suffixes(torch.tensor([[END]])).hidden_btd[0, 0]
    close(model.logits(hidden_btd), model.head.pair_logits(hidden_btd, alone)[0])
    tables = model.head.tables(hidden_btd[0], alone.expand(LENGTH, -1))
    both = torch.cat([hidden_btd[0], alone.expand(LENGTH, -1)], dim=-1)
    weight = torch.cat([model.head.w_gate.weight, model.head.w_up.weight])
    close(tables[0] + tables[1], both @ weight.t())


def test_it_trains_on_next_tokens_in_every_parameter() -> None:
    model, tokens_bt = model_of().train(), rows()
    output = NextTokenConfig().build()(model, Batch(tokens_bt, tokens_bt.roll(-1, 1)))
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    silent = {name for name, parameter in model.named_parameters() if not parameter.grad.abs().any()}  # type: ignore[union-attr]
    # one token attends to itself alone, whatever its query and key
    assert silent == {f"backward_encoder.blocks.0.mixer.w_{letter}.weight" for letter in "qk"}


def test_prompts_of_any_length_are_continued_as_if_alone() -> None:
    model = model_of()
    prompts = [[1, 2, 3], [END, 4], [5], [6, 7, 8, END, 9]]
    together = generate(model, prompts, max_new=6, greedy=True)
    for prompt, completion in zip(prompts, together, strict=True):
        tokens = list(prompt)
        for token in completion.tokens:
            with torch.no_grad():
                logits_v = model.logits(model(torch.tensor([tokens])).hidden_btd[0, -1])
            assert token == int(logits_v.argmax())
            tokens.append(token)
    assert [len(completion.tokens) for completion in together] == [6] * 4
    empty = [one.tokens for one in infill(model, prompts, max_new=6, greedy=True)]
    assert empty == [one.tokens for one in generate(model, prompts, max_new=6, greedy=True, stop=[[END]])]


@every_mixer
@torch.no_grad()
def test_infilling_is_greedy_in_the_pair_of_prefix_and_goal(mixer: Any) -> None:
    model = model_of(mixer)
    prefixes, goals = [[1, 2, 3], [END, 4], [5, 6]], [[7, END], [8, 9, 1, END], [END]]
    for backward, write in ((False, infill), (True, prepend)):
        found = write(model, prefixes, goals, max_new=7, greedy=True)
        for prefix, goal, completion in zip(prefixes, goals, found, strict=True):
            front, back, wanted = list(prefix), list(goal), []
            for _ in range(7):
                pair = prefix_vectors(model, [front]), suffix_vectors(model, [back])
                token = int(model.head.pair_logits(*pair)[backward].argmax())
                if token == END:
                    break
                wanted.append(token)
                front, back = (front, [token, *back]) if backward else ([*front, token], back)
            assert completion.tokens == (wanted[::-1] if backward else wanted)


def test_sampling_does_not_depend_on_the_batch() -> None:
    model = model_of()
    prefixes, goals = [[1, 2, 3], [END, 4], [5, 6]], [[7, END], [8, 9, 1, END], [END]]
    seeds = [3, 1, 2]
    together = infill(model, prefixes, goals, max_new=8, seed=seeds)
    alone = [
        infill(model, [prefix], [goal], max_new=8, seed=[seed])[0]
        for prefix, goal, seed in zip(prefixes, goals, seeds, strict=True)
    ]
    assert [one.tokens for one in together] == [one.tokens for one in alone]


@pytest.mark.parametrize("side", ["next", "prev"])
@torch.no_grad()
def test_goals_are_scored_by_the_pairs_around_each_token(side: Any) -> None:
    model, goal = model_of(), [3, 1, 4, END]
    texts = [[1, 2], [END, 5, 6, 7], [8]]
    found = score_goal(model, texts, goal, side)
    for text, value in zip(texts, found, strict=True):
        tokens, total = [*text, *goal], 0.0
        for place in range(len(text), len(tokens) - 1):
            pair = prefix_vectors(model, [tokens[:place]]), suffix_vectors(model, [tokens[place + 1 :]])
            total += float(model.head.pair_logits(*pair)[side == "prev"].log_softmax(-1)[0, tokens[place]])
        assert float(value) == pytest.approx(total / 3, abs=1e-5)


def test_beam_search_finds_more_likely_texts_than_greed() -> None:
    model, prefix, goal = model_of(), [1, 2], [3, END]
    greedy = infill(model, [prefix], [goal], max_new=5, greedy=True)[0]
    beams = beam_search(model, prefix, goal, max_new=5, rollouts=24)
    assert beams[0].score >= beams[-1].score and len({tuple(beam.tokens) for beam in beams}) == len(beams)
    assert greedy.tokens in [beam.tokens for beam in beams]
    for beam in beams[:3]:
        with torch.no_grad():
            rows = [*prefix, *beam.tokens]
            hidden_td = model(torch.tensor([rows])).hidden_btd[0, len(prefix) - 1 :]
            log_p_tv = model.head.pair_logits(hidden_td, suffix_vectors(model, [goal])[0])[0].log_softmax(-1)
        said = [*beam.tokens, END] if beam.finished else beam.tokens
        wanted = sum(float(log_p_tv[place, token]) for place, token in enumerate(said)) / len(said)
        assert beam.score == pytest.approx(wanted, abs=1e-5)
    assert beam_search(model, prefix, goal, max_new=5, rollouts=1)[0].tokens == greedy.tokens


def test_equal_names_start_equal_to_a_decoders() -> None:
    init = {"kind": "normal", "std": 0.25}
    decoder = DecoderConfig.model_validate({"width": 32, "depth": 2, "head_dim": 8, "initialisation": init}).build(
        VOCAB, LENGTH, 0
    )
    ours, theirs = model_of().state_dict(), decoder.state_dict()
    shared = set(ours) & set(theirs)
    assert len(shared) == len(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in shared)


def test_counts() -> None:
    config = config_of()
    counts, model = count(config, VOCAB, LENGTH), config.build(VOCAB, LENGTH, 0)
    assert counts.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert counts.parameters - counts.non_embedding == 2 * VOCAB * 32
    assert counts.forward_flops_per_token == model.stack_flops(LENGTH) + model.head.flops()
    assert config_of(backward_depth=None).build(VOCAB, LENGTH, 0).diagnostics() == {}


def test_the_heads_width_has_a_floor() -> None:
    widths = [8, 24, 32, 64, 768]
    found = [config_of(pair={}).pair.width_of(width) for width in widths]
    assert found == [128, 128, 128, 384, 4096]


def test_mistakes_are_told() -> None:
    with pytest.raises(ConfigError, match=r"model.end_token is not set, and this model needs the id, 0 to 10 here"):
        config_of(end_token=None).build(VOCAB, LENGTH, 0)
    with pytest.raises(ConfigError, match=r"model.end_token is 11"):
        config_of(end_token=11).skeleton(VOCAB, LENGTH)
    decoder = DecoderConfig(width=16, depth=1, head_dim=8).build(VOCAB, LENGTH, 0)
    with pytest.raises(ConfigError, match="a goal needs a model with a backward encoder, and Decoder has none"):
        infill(decoder, [[1]], [[END]], max_new=1)  # type: ignore[arg-type]
    model = model_of()
    with pytest.raises(ConfigError, match="a goal ends with the end token, 10, and this one ends with 3"):
        infill(model, [[1]], [[2, 3]], max_new=1)
    with pytest.raises(ConfigError, match="and this one is empty"):
        prepend(model, [[1]], [[]], max_new=1)
    with pytest.raises(ConfigError, match="before its last place"):
        infill(model, [[1]], [[2, END, 3, END]], max_new=1)
    with pytest.raises(ConfigError, match="the goal holds token 99"):
        infill(model, [[1]], [[99, END]], max_new=1)
    with pytest.raises(ConfigError, match="2 goals were given for 1 prefixes"):
        infill(model, [[1]], [[END], [END]], max_new=1)
    with pytest.raises(ConfigError, match="prefix 0 is empty"):
        prepend(model, [[]], [[END]], max_new=1)
    with pytest.raises(ConfigError, match="prompt 0 is empty"):
        infill(model, [[]], [[END]], max_new=1)
    with pytest.raises(ConfigError, match="there is nothing to score"):
        score_goal(model, [[1]], [END])
    with pytest.raises(ConfigError, match="candidate 0 is empty"):
        score_goal(model, [[]], [1, END])
    assert infill(model, [], max_new=1) == [] and score_goal(model, [], [1, END]).shape == (0,)

"""Speed of LongPPL by batched windows against the published window loop, on the same model, with equal values.

    python benchmarks/longppl.py [--threads 1] [--rounds 5] [--cpu] [--json PATH]

The peer is the published loop, written plainly: windows one at a time, logits of all positions of a window and of the text,
losses of the scored ones, a Python loop over the flags of tokens, and one more pass of the evaluated model. Ours stacks equal
windows, computes logits of the scored positions alone, compares all tokens at once, and uses the pass over the whole text twice,
since the model is its own evaluator here. Both give LongPPL and perplexity of the same text with the same decoder, losses within
1e-4 nats and key tokens equal.

The goal of 3 holds where calls, not arithmetic, take the time (the first case). Elsewhere matrix products and attention are 80 %
of ours, every window has to be read by both, and the layers of a window cost both the same. With a trunk of t and a head of h
FLOPs per token, windows gain at most (K + S)(t + h) / ((K + S)t + S h) and the full passes 2, whatever the implementation: with a
vocabulary of 32k and 4 layers of 256 (the last case) about 2. Batching gains nothing on one thread of a CPU, where a single
window fills the core. What is left is the last layer's feed-forward and queries for positions that are not scored, about a tenth
of that case, which needs a decoder that can drop positions before its last layer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from alternating import measure, parser_of, ratio, started
from numpy.typing import NDArray
from torch import Tensor

from torchstone.data.tokenizers import ByteTokenizer
from torchstone.diagnose.adapters import open_subject
from torchstone.evals.longppl import LongPPL, longppl
from torchstone.models.decoder import Decoder, DecoderConfig

CASES = {  # name: width, depth, vocabulary, tokens of the text, trunc_len, stride, goal
    "2 layers of 32, 257 ids": (32, 2, 257, 1024, 64, 16, 3.0),
    "2 layers of 64, 4k ids": (64, 2, 4096, 1024, 64, 16, None),
    "4 layers of 192, 8k ids": (192, 4, 8192, 2048, 256, 64, None),
    "4 layers of 256, 32k ids": (256, 4, 32768, 8192, 2048, 512, None),
}
TOLERANCE = 1e-4
ALPHA, BETA = 0.01, -20.0  # of a model with random weights, so that there are key tokens


@dataclass
class Peer:
    """What the published code finds."""

    full_t: NDArray[np.float32]
    short_t: NDArray[np.float32]
    key_t: NDArray[np.bool_]
    longppl: float
    ppl: float


@torch.no_grad()
def window_loop(model: Decoder, ids: list[int], trunc_len: int, stride: int) -> Peer:
    """The published loop, and the evaluated model's pass after it."""
    ids_1t = torch.tensor([ids])
    length = len(ids)

    def logits(tokens_1t: Tensor) -> Tensor:
        return model.logits(model(tokens_1t).hidden_btd).float()

    full_1tv = logits(ids_1t)
    full_t, short_t = np.full(length, np.nan, np.float32), np.full(length, np.nan, np.float32)
    keys = []
    for start in range(0, length - trunc_len, stride):
        end, first = min(start + trunc_len + stride, length), start + trunc_len
        targets_s = ids_1t[0, first:end]
        short_1wv = logits(ids_1t[:, start:end])
        full_s = F.cross_entropy(full_1tv[0, first - 1 : end - 1], targets_s, reduction="none")
        short_s = F.cross_entropy(short_1wv[0, trunc_len - 1 : -1], targets_s, reduction="none")
        for at, is_key in enumerate((short_s - full_s > ALPHA) & (full_s < -BETA)):
            if is_key:
                keys.append(first + at)
        full_t[first:end], short_t[first:end] = full_s, short_s
    key_t = np.isin(np.arange(length), keys)
    losses_t = F.cross_entropy(logits(ids_1t)[0, :-1], ids_1t[0, 1:], reduction="none")
    chosen_t = losses_t[torch.from_numpy(key_t[1:])]
    return Peer(full_t, short_t, key_t, float(chosen_t.mean().exp()), float(losses_t.mean().exp()))


def case(name: str) -> tuple[Callable[[], LongPPL], Callable[[], Peer]]:
    """Ours and the peer."""
    width, depth, vocabulary, length, trunc_len, stride, _ = CASES[name]
    model = DecoderConfig(width=width, depth=depth, head_dim=32).build(vocabulary, length, 0).eval()
    subject = open_subject(model, tokenizer=ByteTokenizer())
    text = "".join(chr(32 + code) for code in np.random.default_rng(0).integers(0, 95, length))
    ids = subject.encode(text)

    def ours() -> LongPPL:
        return longppl(text, subject, subject, trunc_len, stride, ALPHA, BETA)

    return ours, lambda: window_loop(model, ids, trunc_len, stride)


def compared(ours: LongPPL, peer: Peer) -> int:
    """Key tokens that differ, after values within the tolerance."""
    evidence = ours.documents[0].evidence
    assert evidence is not None
    scored_t = ~np.isnan(peer.short_t)
    np.testing.assert_allclose(evidence.full_t[scored_t], peer.full_t[scored_t], atol=TOLERANCE)
    np.testing.assert_allclose(evidence.short_t[scored_t], peer.short_t[scored_t], atol=TOLERANCE)
    np.testing.assert_allclose([ours.longppl or np.nan, ours.ppl or np.nan], [peer.longppl, peer.ppl], rtol=1e-3)
    return int((evidence.key_t != peer.key_t).sum())


def main() -> int:
    """Print a line per case; 1 where a goal is missed."""
    parser = parser_of(__doc__, rounds=5, quick=2)
    parser.add_argument("--case", choices=list(CASES), action="append", help="only this case; may be repeated")
    given, clock = started(parser)
    found = {}
    missed = False
    for name in given.case or CASES:
        ours, peer = case(name)
        one, goal = ours(), CASES[name][-1]
        differing = compared(one, peer())
        seconds = measure({"ours": ours, "window loop": peer}, given.rounds, clock)
        faster = ratio(seconds["window loop"], seconds["ours"])
        found[name] = {"ratio": faster, "seconds": seconds, "key tokens": one.key_tokens, "that differ": differing}
        wanted = "no goal" if goal is None else f"goal {goal:g}"
        print(f"{name}: {faster:.2f}x the window loop ({wanted}), {one.key_tokens} key tokens, {differing} differ")
        missed |= differing > 0 or (goal is not None and faster < goal)
    if given.json:
        given.json.write_text(json.dumps({"threads": given.threads, "cases": found}, indent=2))
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())

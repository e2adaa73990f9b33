"""The analyses that the command line and `torchstone.diagnose.analyses` know, by name. Strings only: listing imports nothing.

An analysis is a function `(subject, texts, *, settings…) -> Finding`. It leaves out `subject` or `texts` if it needs none.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Analysis:
    """Where an analysis is (`module:function`) and its one-line help."""

    target: str
    help: str


ANALYSES: dict[str, Analysis] = {
    "rope-usage": Analysis(
        "torchstone.diagnose.rotary.rope_usage:rope_usage_finding",
        "Which rotary frequencies carry queries and keys, and which heads look at a fixed offset.",
    ),
    "positional-heads": Analysis(
        "torchstone.diagnose.distance.positional_heads:positional_heads_finding",
        "Which heads move to slow rotary dimensions as distance grows.",
    ),
    "attention-rank": Analysis(
        "torchstone.diagnose.ranks.attention_rank:attention_rank_finding",
        "Spectra, ranks and balance of the query-key and value-output products of every head.",
    ),
    "anisotropy": Analysis(
        "torchstone.diagnose.bottleneck.anisotropy:anisotropy_finding",
        "How far hidden states point in one common direction, layer by layer.",
    ),
    "head-spectrum": Analysis(
        "torchstone.diagnose.bottleneck.head_spectrum:head_spectrum_finding",
        "Singular values of the output matrix.",
    ),
    "rank-sweep": Analysis(
        "torchstone.diagnose.bottleneck.rank_sweep:rank_sweep_finding",
        "Loss against the rank of the output matrix, with the rest of the model frozen.",
    ),
    "ngram-rank": Analysis(
        "torchstone.diagnose.bottleneck.ngram_rank:ngram_rank_finding",
        "Rank of the text's own next-token table, and what a low rank costs.",
    ),
    "layer-gradients": Analysis(
        "torchstone.diagnose.gradients.layer_gradients:layer_gradients_finding",
        "Spectra of the gradient of every projection for responses of different kinds.",
    ),
    "updates": Analysis(
        "torchstone.diagnose.updates.finding:updates_finding",
        "Length, angle and effect of a run's updates, step by step, beside another run (train --updates N).",
    ),
    "landscape": Analysis(
        "torchstone.diagnose.landscape.finding:landscape_finding",
        "Loss along the line between checkpoints, and curvature along decay and progress directions.",
    ),
    "expert-load": Analysis(
        "torchstone.diagnose.expert_load:expert_load_finding",
        "Which experts tokens go to, by class of token, and which are never used.",
    ),
    "memory": Analysis(
        "torchstone.diagnose.memory:memory_finding",
        "How many tokens hgrn2 and rglru layers remember, and the bytes of the state by context length.",
    ),
    "token-usage": Analysis(
        "torchstone.diagnose.token_usage:token_usage_finding",
        "How much of the output each parameter token of a Pattention layer carries.",
    ),
}

"""Methods of the digest of 2024-10-14."""

from __future__ import annotations

from torchstone.methods.method import Method

# fmt: off
RECORDS = (
    Method(
        slug="positional-heads", arxiv="2410.08703", digest="2024-10-14",
        title="On the token distance modeling ability of higher RoPE attention dimension",
        authors="Hong, Jiang, Qi, et al. (Findings of EMNLP 2024)",
        tags=("positional-encoding", "long-context"),
        claim=(
            "A few heads use the slow rotary dimensions for distant tokens, and ablating them hurts long "
            "contexts most."
        ),
        vectors=("positional-heads.npz",),
        parts=(
            "src/torchstone/diagnose/distance/heads.py", "src/torchstone/diagnose/distance/scores.py",
            "src/torchstone/diagnose/distance/sums.py", "src/torchstone/diagnose/rotary/pairs.py",
            "src/torchstone/diagnose/distance/attended_pairs.py", "src/torchstone/diagnose/distance/ablation.py",
            "src/torchstone/diagnose/distance/positional_heads.py", "src/torchstone/data/mixture.py",
            "src/torchstone/data/synthetic/gap_recall.py",
        ),
        study="torchstone.studies.positional_heads:PositionalHeads",
        status="done",
    ),
    Method(
        slug="flp", arxiv="2410.08527", digest="2024-10-14",
        title="Scaling Laws for Predicting Downstream Performance in LLMs",
        authors="Chen, Huang, Gao, Wang, Yang, Ji",
        tags=("scaling-law",),
        claim=(
            "Predicting benchmark scores through the pre-training loss errs less than predicting them "
            "from FLOPs directly."
        ),
        vectors=("flp.npz",),
    ),
    Method(
        slug="elastic-tok", arxiv="2410.08368", digest="2024-10-14",
        title="ElasticTok: Adaptive Tokenization for Image and Video",
        authors="Yan, Mnih, Faust, Zaharia, Abbeel, Liu",
        tags=("vq",),
        claim=(
            "Choosing the number of tokens per frame meets an error target with fewer tokens than a "
            "fixed number."
        ),
        vectors=("elastic-tok.npz",),
    ),
    Method(
        slug="journey-learning", arxiv="2410.18982", digest="2024-10-14",
        title="O1 Replication Journey: A Strategic Progress Report, Part 1",
        authors="Qin, Li, Zou, et al.",
        tags=("reasoning", "search"),
        claim=(
            "Fine-tuning on whole searches with backtracking beats fine-tuning on the shortest "
            "solutions, at equal tokens."
        ),
        vectors=("journey-learning.json",),
    ),
)
# fmt: on

"""Methods of the digest of 2024-10-08."""

from __future__ import annotations

from torchstone.methods.method import Method

# fmt: off
RECORDS = (
    Method(
        slug="dape-v2", arxiv="2410.04798", digest="2024-10-08",
        title="DAPE V2: Process Attention Score as Feature Map for Length Extrapolation",
        authors="Zheng et al. (ACL 2025)",
        tags=("long-context", "attention", "positional-encoding"),
        claim=(
            "Convolving attention scores over keys keeps the loss from rising far beyond the training "
            "length."
        ),
        vectors=("dape-v2.npz",),
        parts=(
            "src/torchstone/nn/attention/dape.py", "src/torchstone/nn/attention/processed.py",
            "src/torchstone/nn/position/alibi.py", "src/torchstone/nn/position/kerple.py",
            "src/torchstone/nn/position/fire.py", "src/torchstone/evals/extrapolation.py",
        ),
        study="torchstone.studies.dape_v2:DapeV2",
        status="done",
    ),
    Method(
        slug="differential-transformer", arxiv="2410.05258", digest="2024-10-08",
        title="Differential Transformer",
        authors="Ye, Dong, Xia, Sun, Zhu, Huang, Wei (ICLR 2025)",
        tags=("transformer", "long-context", "attention"),
        claim=(
            "Subtracting two attention maps puts less attention on irrelevant tokens and lowers the loss "
            "at equal parameters."
        ),
        vectors=("differential-transformer.npz",),
        parts=(
            "src/torchstone/nn/attention/differential.py", "src/torchstone/nn/attention/differential_v1.py",
            "src/torchstone/nn/attention/differential_v2.py",
            "src/torchstone/nn/attention/adaptive_temperature.py", "src/torchstone/data/synthetic/recall.py",
            "src/torchstone/diagnose/attention_mass.py", "src/torchstone/evals/ar_loss.py",
        ),
        study="torchstone.studies.differential_transformer:DifferentialTransformer",
        status="done",
    ),
    Method(
        slug="wsd-s", arxiv="2410.05192", digest="2024-10-08",
        title="Understanding Warmup-Stable-Decay Learning Rates: a River Valley Loss Landscape Perspective",
        authors="Wen, Li, Wang, Hall, Liang, Ma",
        tags=("optimization",),
        claim=(
            "Continuing from the decayed checkpoint beats branching off the plateau at equal total "
            "compute."
        ),
        vectors=("wsd-s.npz",),
        parts=(
            "src/torchstone/optim/schedules",
            "src/torchstone/train/branch.py",
            "src/torchstone/data/synthetic/mixed_bigram.py",
            "src/torchstone/diagnose/landscape",
        ),
        study="torchstone.studies.wsd_s:WSDS",
        status="done",
    ),
)
# fmt: on

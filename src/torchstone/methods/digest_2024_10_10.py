"""Methods of the digest of 2024-10-10."""

from __future__ import annotations

from torchstone.methods.method import Method

# fmt: off
RECORDS = (
    Method(
        slug="task-superposition", arxiv="2410.05603", digest="2024-10-10",
        title="Everything Everywhere All at Once: LLMs can In-Context Learn Multiple Tasks in Superposition",
        authors="Xiong, Cai, Cooper, et al. (ICML 2025)",
        tags=("in-context-learning",),
        claim=(
            "A model trained on one task per prompt answers a mixed prompt with every task, in "
            "proportion to the examples."
        ),
        vectors=("task-superposition.npz",),
    ),
    Method(
        slug="pyramid-flow", arxiv="2410.05954", digest="2024-10-10",
        title="Pyramidal Flow Matching for Efficient Video Generative Modeling",
        authors="Jin, Sun, Li, et al.",
        tags=("video-generation",),
        claim=(
            "Flow matching over a pyramid of resolutions reaches the target distribution with far less "
            "compute."
        ),
        vectors=("pyramid-flow.npz",),
    ),
    Method(
        slug="txt360", arxiv=None, digest="2024-10-10",
        title="TxT360: A Top-Quality LLM Pre-training Dataset Requires the Perfect Blend",
        authors="Tang, Ranjan, Pangarkar, et al. (LLM360, web report)",
        tags=("corpus",),
        claim=(
            "Repeating de-duplicated documents by their number of copies trains better models than plain "
            "de-duplication."
        ),
        vectors=("txt360.json", "txt360.npz"),
    ),
    Method(
        slug="p-rope", arxiv="2410.06205", digest="2024-10-10",
        title="Round and Round We Go! What makes Rotary Positional Encodings useful?",
        authors="Barbero, Vitvitskyi, Perivolaropoulos, Pascanu, Veličković (ICLR 2025)",
        tags=("positional-encoding",),
        claim=(
            "Removing the slowest rotary frequencies does not hurt and may help: low frequencies carry "
            "meaning, not position."
        ),
        vectors=("p-rope.npz",),
        parts=(
            "src/torchstone/nn/position/ladder.py", "src/torchstone/nn/position/rotary.py",
            "src/torchstone/diagnose/rotary/rope_usage.py", "src/torchstone/diagnose/rotary/rope_usage_tables.py",
            "src/torchstone/diagnose/rotary/offset_heads.py",
            "src/torchstone/diagnose/rotary/frequency_usage.py", "src/torchstone/diagnose/rotary/theory.py",
            "src/torchstone/data/synthetic/previous_copy.py", "src/torchstone/data/synthetic/key_match.py",
            "src/torchstone/evals/extrapolation.py",
        ),
        study="torchstone.studies.p_rope:PRope",
        status="done",
    ),
    Method(
        slug="moe-scaling", arxiv="2410.05661", digest="2024-10-10",
        title=(
            "Scaling Laws Across Model Architectures: A Comparative Analysis of Dense and MoE Models in "
            "Large Language Models"
        ),
        authors="Wang, Chen, Li, et al. (EMNLP 2024)",
        tags=("scaling-law", "moe"),
        claim=(
            "Mixtures of experts follow the dense scaling laws, with a smaller optimal batch and a "
            "larger optimal learning rate."
        ),
        vectors=("moe-scaling.npz",),
    ),
    Method(
        slug="time-transfer", arxiv="2410.05838", digest="2024-10-10",
        title="Time Transfer: On Optimal Learning Rate and Batch Size in the Infinite Data Limit",
        authors="Filatov, Ebert, Wang, Kesselheim",
        tags=("hyperparameter", "scaling-law"),
        claim=(
            "As training gets longer the optimal learning rate falls at small batches and the critical "
            "batch size grows."
        ),
        vectors=("time-transfer.npz",),
    ),
    Method(
        slug="mir", arxiv="2410.07167", digest="2024-10-10",
        title=(
            "Deciphering Cross-Modal Alignment in Large Vision-Language Models with Modality Integration "
            "Rate"
        ),
        authors="Huang, Dong, Zhang, et al. (ICCV 2025)",
        tags=("multimodal", "metric"),
        claim=(
            "The distance between image and text hidden states predicts scores after tuning better than "
            "the alignment loss does."
        ),
        vectors=("mir.npz",),
    ),
    Method(
        slug="reward-accuracy", arxiv="2410.06554", digest="2024-10-10",
        title="The Accuracy Paradox in RLHF: When Better Reward Models Don't Yield Better Language Models",
        authors="Chen, Zhu, Sun, Chen, Zhang, Shen (EMNLP 2024)",
        tags=("reward-model",),
        claim=(
            "Policies trained against a moderately accurate reward model beat those trained against the "
            "most accurate one."
        ),
        vectors=("reward-accuracy.npz",),
    ),
)
# fmt: on

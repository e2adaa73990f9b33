"""Methods of the digest of 2024-11-04."""

from __future__ import annotations

from torchstone.methods.method import Method

# fmt: off
RECORDS = (
    Method(
        slug="belief-state-transformer", arxiv="2410.23506", digest="2024-11-04",
        title="The Belief State Transformer",
        authors="Hu, Ahn, Liu, et al. (ICLR 2025)",
        tags=("transformer",),
        claim=(
            "Predicting the next and the previous token from all prefix-suffix pairs makes planning on "
            "star graphs learnable."
        ),
        vectors=("belief-state-transformer.npz",),
        parts=(
            "src/torchstone/models/belief_state.py",
            "src/torchstone/models/belief_generate.py",
            "src/torchstone/models/belief_beam.py",
            "src/torchstone/nn/heads/pair.py",
            "src/torchstone/objectives/belief_state.py",
            "src/torchstone/objectives/belief_pairs.py",
            "src/torchstone/objectives/pair_cross_entropy.py",
            "src/torchstone/objectives/fill_in_the_middle.py",
            "src/torchstone/data/fill_in_the_middle.py",
            "src/torchstone/data/synthetic/star_graph.py",
            "src/torchstone/evals/planning.py",
            "src/torchstone/evals/infilling.py",
        ),
        study="torchstone.studies.belief_state_transformer:BeliefStateTransformer",
        status="done",
    ),
    Method(
        slug="knights-and-knaves", arxiv="2410.23123", digest="2024-11-04",
        title="On Memorization of Large Language Models in Logical Reasoning",
        authors="Xie, Huang, Zhang, et al.",
        tags=("reasoning",),
        claim="Fine-tuning on puzzles raises memorisation and generalisable reasoning at the same time.",
        vectors=("knights-and-knaves.json",),
    ),
    Method(
        slug="tokenformer", arxiv="2410.23168", digest="2024-11-04",
        title="TokenFormer: Rethinking Transformer Scaling with Tokenized Model Parameters",
        authors="Wang, Fan, et al. (ICLR 2025)",
        tags=("transformer",),
        claim=(
            "A model whose weights are tokens grows without a jump in loss and costs less than training "
            "from scratch."
        ),
        vectors=("tokenformer.npz",),
        parts=(
            "src/torchstone/nn/projection/pattention.py",
            "src/torchstone/nn/feedforward/pattention.py",
            "src/torchstone/nn/norm/layernorm.py",
            "src/torchstone/models/growth.py",
            "src/torchstone/models/growth_report.py",
            "src/torchstone/models/widen.py",
            "src/torchstone/train/growth.py",
            "src/torchstone/diagnose/token_usage.py",
        ),
        study="torchstone.studies.tokenformer:TokenFormer",
        status="done",
    ),
    Method(
        slug="warmup-free", arxiv="2410.23922", digest="2024-11-04",
        title="Analyzing & Reducing the Need for Learning Rate Warmup in GPT Training",
        authors="Kosson, Messmer, Jaggi (NeurIPS 2024)",
        tags=("optimizer",),
        claim=(
            "An optimizer that fixes the angle of each update loses less from training without warmup "
            "than AdamW does."
        ),
        vectors=("warmup-free.npz",),
        parts=(
            "src/torchstone/optim/lion.py",
            "src/torchstone/optim/liona.py",
            "src/torchstone/optim/lionar.py",
            "src/torchstone/optim/sgdm.py",
            "src/torchstone/optim/rotational.py",
            "src/torchstone/optim/rrc.py",
            "src/torchstone/optim/angle.py",
            "src/torchstone/nn/projection/gained.py",
            "src/torchstone/diagnose/updates",
        ),
        study="torchstone.studies.warmup_free:WarmupFree",
        status="done",
    ),
    Method(
        slug="self-lengthen", arxiv="2410.23933", digest="2024-11-04",
        title="Language Models can Self-Lengthen to Generate Long Texts",
        authors="Quan, Tang, Yu, et al. (Qwen team)",
        tags=("alignment", "long-context"),
        claim=(
            "Alternating a generator and an extender doubles the length of valid output, round after "
            "round."
        ),
        vectors=("self-lengthen.json",),
    ),
    Method(
        slug="self-code-align", arxiv="2410.24198", digest="2024-11-04",
        title="SelfCodeAlign: Self-Alignment for Code Generation",
        authors="Wei, Cassano, Liu, et al. (NeurIPS 2024)",
        tags=("instruction-tuning", "synthetic-data"),
        claim=(
            "Training on self-written programs that pass self-written tests beats training on random "
            "ones, at equal numbers."
        ),
        vectors=("self-code-align.json", "self-code-align-sandbox.json"),
    ),
    Method(
        slug="attention-rank", arxiv="2410.23819", digest="2024-11-04",
        title="Weight decay induces low-rank attention layers",
        authors="Kobayashi, Akram, von Oswald (NeurIPS 2024)",
        tags=("transformer", "regularization"),
        claim=(
            "Weight decay lowers the rank of attention's matrix products, and a smaller decay for "
            "attention lowers the loss."
        ),
        vectors=("attention-rank.npz",),
        parts=(
            "src/torchstone/optim/weight_decay.py", "src/torchstone/optim/groups.py",
            "src/torchstone/nn/roles.py", "src/torchstone/diagnose/ranks/attention_rank.py",
            "src/torchstone/diagnose/ranks/head_products.py", "src/torchstone/diagnose/ranks/layer_products.py",
            "src/torchstone/diagnose/spectra.py", "src/torchstone/diagnose/ranks/truncation.py",
            "src/torchstone/diagnose/ranks/decoder_rank.py",
        ),
        study="torchstone.studies.attention_rank:AttentionRank",
        status="done",
    ),
    Method(
        slug="layer-gradients", arxiv="2410.23743", digest="2024-11-04",
        title="What Happened in LLMs Layers when Trained for Fast vs. Slow Thinking: A Gradient Perspective",
        authors="Li, Li, Zhou (ACL 2025)",
        tags=("reasoning",),
        claim=(
            "Detailed reasoning gives smaller and more even gradients over the layers than bare answers "
            "of equal length."
        ),
        vectors=("layer-gradients.npz",),
        parts=(
            "src/torchstone/diagnose/gradients/layer_gradients.py", "src/torchstone/diagnose/gradients/profile.py",
            "src/torchstone/diagnose/gradients/capture.py", "src/torchstone/diagnose/gradients/spectra.py",
            "src/torchstone/diagnose/gradients/comparison.py", "src/torchstone/diagnose/gradients/pairs.py",
            "src/torchstone/data/synthetic/addition.py",
        ),
        study="torchstone.studies.layer_gradients:LayerGradients",
        status="done",
    ),
    Method(
        slug="longppl", arxiv="2410.23771", digest="2024-11-04",
        title="What is Wrong with Perplexity for Long-context Language Modeling?",
        authors="Fang, Wang, Liu, et al. (ICLR 2025)",
        tags=("long-context",),
        claim=(
            "Perplexity on tokens that need the long context predicts long-context ability; plain "
            "perplexity does not."
        ),
        vectors=("longppl.npz",),
        parts=(
            "src/torchstone/evals/longppl.py",
            "src/torchstone/objectives/long_context.py",
        ),
        study="torchstone.studies.longppl:LongPPL",
        status="done",
    ),
    Method(
        slug="osca", arxiv="2410.22480", digest="2024-11-04",
        title="Scaling LLM Inference with Optimized Sample Compute Allocation",
        authors="Zhang, Zhou, Wang, Wang, Li (NAACL 2025)",
        tags=("search",),
        claim=(
            "A sampling budget split over configurations solves more unseen problems than the best "
            "single configuration."
        ),
        vectors=("osca.json",),
        parts=("src/torchstone/llm/allocation",),
        study="torchstone.studies.osca:Osca",
        status="done",
    ),
)
# fmt: on

"""Methods of the digest of 2024-04-12."""

from __future__ import annotations

from torchstone.methods.method import Method

# fmt: off
RECORDS = (
    Method(
        slug="simple-evals", arxiv=None, digest="2024-04-12",
        title="simple-evals",
        authors="OpenAI, released with GPT-4-Turbo (2024-04-09)",
        tags=("llm",),
        claim=(
            "Re-grading published model outputs with the published prompts and rules reproduces the "
            "published scores."
        ),
        vectors=("simple-evals.json", "evals-regrade.json"),
    ),
    Method(
        slug="rho-1", arxiv="2404.07965", digest="2024-04-12",
        title="Rho-1: Not All Tokens Are What You Need",
        authors="Lin, Gou, Gong, et al. (NeurIPS 2024)",
        tags=("pretraining", "llm"),
        claim=(
            "Training only on tokens with a high excess loss over a reference model beats training on "
            "all tokens at equal compute."
        ),
        vectors=("rho-1.npz",),
        parts=(
            "src/torchstone/objectives/token_weights.py",
            "src/torchstone/objectives/selection.py",
            "src/torchstone/objectives/selective.py",
            "src/torchstone/objectives/selective_loss.py",
            "src/torchstone/interop/selective_trainer.py",
            "src/torchstone/data/loss_store.py",
            "src/torchstone/data/scored.py",
            "src/torchstone/data/noisy.py",
            "src/torchstone/data/synthetic/noisy_trigram.py",
            "src/torchstone/evals/scoring.py",
            "src/torchstone/evals/trajectories.py",
        ),
        study="torchstone.studies.rho_1:Rho1",
        status="done",
    ),
    Method(
        slug="recurrentgemma", arxiv="2404.07839", digest="2024-04-12",
        title="RecurrentGemma: Moving Past Transformers for Efficient Open Language Models",
        authors="Botev, De, Smith, et al.",
        tags=("llm", "state-space-model", "rlhf"),
        claim=(
            "A hybrid of gated linear recurrence and local attention keeps a transformer's loss with a "
            "decoding state of fixed size."
        ),
        vectors=("recurrentgemma.npz",),
        parts=(
            "src/torchstone/nn/recurrence/linear_scan.py",
            "src/torchstone/nn/recurrence/convolution.py",
            "src/torchstone/nn/recurrence/block_diagonal.py",
            "src/torchstone/nn/recurrence/rglru.py",
            "src/torchstone/nn/attention/local.py",
            "src/torchstone/nn/fan_in.py",
            "src/torchstone/data/synthetic/far_tag.py",
            "src/torchstone/diagnose/memory.py",
        ),
        study="torchstone.studies.recurrentgemma:RecurrentGemma",
        status="done",
    ),
    Method(
        slug="jetmoe", arxiv="2404.07413", digest="2024-04-12",
        title="JetMoE: Reaching Llama2 Performance with 0.1M Dollars",
        authors="Shen, Guo, Cai, Qin",
        tags=("moe", "llm"),
        claim=(
            "Experts in both feed-forward and attention reach a lower loss than a dense model of equal "
            "active FLOPs."
        ),
        vectors=("jetmoe.npz",),
        parts=(
            "src/torchstone/nn/experts/choice.py",
            "src/torchstone/nn/experts/router.py",
            "src/torchstone/nn/experts/balance.py",
            "src/torchstone/nn/experts/dispatch.py",
            "src/torchstone/nn/experts/parallel.py",
            "src/torchstone/nn/experts/smoe.py",
            "src/torchstone/nn/experts/moa.py",
            "src/torchstone/diagnose/expert_load.py",
            "src/torchstone/optim/schedules/wsd.py",
            "src/torchstone/data/mixture.py",
        ),
        study="torchstone.studies.jetmoe:JetMoE",
        status="done",
    ),
    Method(
        slug="icl-regression", arxiv="2404.07544", digest="2024-04-12",
        title=(
            "From Words to Numbers: Your Large Language Model Is Secretly A Capable Regressor When Given "
            "In-Context Examples"
        ),
        authors="Vacareanu, Negru, Suciu, Surdeanu (COLM 2024)",
        tags=("in-context-learning",),
        claim=(
            "A language model regresses from examples in its context as well as fitted regressors do, "
            "with sub-linear regret."
        ),
        vectors=("icl-regression.npz",),
    ),
    Method(
        slug="hgrn2", arxiv="2404.07904", digest="2024-04-12",
        title="HGRN2: Gated Linear RNNs with State Expansion",
        authors="Qin et al. (COLM 2024)",
        tags=("state-space-model",),
        claim="At equal parameters a larger recurrent state, made by outer products, buys recall.",
        vectors=("hgrn2.npz",),
        parts=(
            "src/torchstone/nn/recurrence/gated_linear.py",
            "src/torchstone/nn/recurrence/gated_linear_fla.py",
            "src/torchstone/nn/recurrence/hgrn2.py",
            "src/torchstone/nn/recurrence/lower_bounds.py",
            "src/torchstone/data/synthetic/pair_recall.py",
            "src/torchstone/diagnose/memory.py",
        ),
        study="torchstone.studies.hgrn2:HGRN2Study",
        status="done",
    ),
    Method(
        slug="softmax-bottleneck", arxiv="2404.07647", digest="2024-04-12",
        title=(
            "Why do small language models underperform? Studying Language Model Saturation via the "
            "Softmax Bottleneck"
        ),
        authors="Godey, de la Clergerie, Sagot (COLM 2024)",
        tags=("llm", "contrastive-learning", "representation"),
        claim=(
            "Below a critical rank, set by the data, a language model's output head limits the loss "
            "whatever the backbone."
        ),
        vectors=("softmax-bottleneck.npz",),
        parts=(
            "src/torchstone/nn/heads/factored.py", "src/torchstone/nn/heads/mixture.py", "src/torchstone/nn/heads/base.py",
            "src/torchstone/objectives/mixture_cross_entropy.py", "src/torchstone/diagnose/bottleneck/anisotropy.py",
            "src/torchstone/diagnose/bottleneck/head_spectrum.py", "src/torchstone/diagnose/bottleneck/rank_sweep.py",
            "src/torchstone/diagnose/bottleneck/rank_sweep_states.py", "src/torchstone/diagnose/bottleneck/ngram_rank.py",
            "src/torchstone/diagnose/bottleneck/critical_rank.py", "src/torchstone/diagnose/bottleneck/saturation.py",
            "src/torchstone/diagnose/bottleneck/saturation_law.py", "src/torchstone/data/synthetic/bigram.py",
        ),
        study="torchstone.studies.softmax_bottleneck:SoftmaxBottleneck",
        status="done",
    ),
    Method(
        slug="ferret-v2", arxiv="2404.07973", digest="2024-04-12",
        title="Ferret-v2: An Improved Baseline for Referring and Grounding with LLMs",
        authors="Zhang, You, Dufter, et al. (Apple)",
        tags=("vision-language", "visual-grounding"),
        claim="High-resolution tiles with their own encoder improve the naming of fine detail in a region.",
        vectors=("ferret-v2.npz",),
    ),
    Method(
        slug="locvlm", arxiv="2404.07449", digest="2024-04-12",
        title="Learning to Localize Objects Improves Spatial Reasoning in Visual-LLMs",
        authors="Ranasinghe, Shukla, Poursaeed, Ryoo, Lin (CVPR 2024)",
        tags=("vision-language", "visual-grounding"),
        claim=(
            "Instruction tuning on text coordinates improves spatial answers that never mention "
            "coordinates, at equal updates."
        ),
        vectors=("locvlm.json",),
    ),
)
# fmt: on

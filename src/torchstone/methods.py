"""The index of methods: one record for each, and every path that belongs to it.

`METHODS` maps a slug to its record. Mechanism, measurement and claim live in three places (`nn` and its
neighbours, `diagnose` and `evals`, `studies`), tied by the slug; `torchstone where SLUG` prints them all. A
method is `done` when parts, study, fidelity test, page and results exist (a test walks this index and
checks); else it is `planned`.

Importing this module imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from torchstone.errors import StudyError


@dataclass(frozen=True, slots=True)
class Method:
    """One published method.

    Attributes:
        slug: identifier, used in every file name that belongs to the method.
        title, authors, arxiv: the paper; `arxiv` is None where there is no arXiv paper.
        digest: date of the digest that picked it, ISO 8601.
        tags: topics, as in the digest.
        claim: what the study tests, in one sentence.
        vectors: files of reference vectors in the reference folder.
        parts: source files of the mechanism, relative to the project's root; empty while planned.
        study: `module:Class` of the study; None while planned.
        status: `done` or `planned`.
    """

    slug: str
    title: str
    authors: str
    arxiv: str | None
    digest: str
    tags: tuple[str, ...]
    claim: str
    vectors: tuple[str, ...]
    parts: tuple[str, ...] = ()
    study: str | None = None
    status: Literal["done", "planned"] = "planned"

    @property
    def done(self) -> bool:
        """True if everything that belongs to the method exists."""
        return self.status == "done"

    @property
    def url(self) -> str | None:
        """Address of the paper, if it is on arXiv."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else None

    def paths(self) -> dict[str, tuple[str, ...]]:
        """Every home of the method, by what is there; paths are relative to the project's root.

        `vectors` are names inside the reference folder ($TORCHSTONE_REFERENCE).
        """
        name = self.slug.replace("-", "_")
        return {
            "parts": self.parts,
            "study": (f"src/torchstone/studies/{name}.py",),
            "fidelity test": (f"tests/reference/test_{name}.py",),
            "vectors": self.vectors,
            "page": (f"docs/methods/{self.slug}.md",),
            "results": (f"results/{self.slug}",),
        }


def find(slug: str) -> Method:
    """The method with this slug; raises StudyError naming the nearest slugs."""
    if slug in METHODS:
        return METHODS[slug]
    near = get_close_matches(slug.lower().replace("_", "-"), METHODS, n=3, cutoff=0.5)
    if not near and len(slug) >= 4:
        near = [name for name in METHODS if slug.lower() in METHODS[name].title.lower()][:3]
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise StudyError(f"there is no method {slug!r}.{hint} `torchstone methods` lists all {len(METHODS)}.")


def project_root() -> Path | None:
    """The project's folder when torchstone runs from a checkout; None when it is installed as a package
    only."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "pyproject.toml").is_file() else None


# fmt: off
_RECORDS = (
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
    ),
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

METHODS: dict[str, Method] = {method.slug: method for method in _RECORDS}

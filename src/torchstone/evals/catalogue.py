"""The evaluations that the command line knows, by name. Strings only: listing imports nothing."""

from __future__ import annotations

from torchstone.diagnose.catalogue import Analysis

EVALUATIONS: dict[str, Analysis] = {
    "extrapolation": Analysis(
        "torchstone.evals.extrapolation_finding:extrapolation_finding",
        "Loss on the same last tokens with more and more context.",
    ),
    "longppl": Analysis(
        "torchstone.evals.longppl_finding:longppl_finding",
        "Perplexity on the tokens that need the long context, chosen by an evaluator.",
    ),
    "trajectories": Analysis(
        "torchstone.evals.trajectories_finding:trajectories_finding",
        "Which tokens are learned, known, forgotten or noise, over a run's checkpoints.",
    ),
    "decoding": Analysis(
        "torchstone.evals.decoding_finding:decoding_finding",
        "Bytes of decoding state and tokens per second against the length of the context.",
    ),
}

"""Generation: continue prompts token by token with a decoding state.

Prompts of different lengths share a batch through left padding: every prompt ends at the same index, padding is
invisible and positions count from each prompt's own first token. A prompt therefore receives the same continuation
alone and in any batch (with its own seed), up to float error. A prompt that is done leaves the batch; for more prompts than
rows, or requests that arrive one by one, see `torchstone.models.continuous`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torchstone.errors import ConfigError
from torchstone.models.continuous import Batcher, Completion, Request
from torchstone.models.decoder import Decoder
from torchstone.models.sampling import Sampling


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    greedy: bool = False,
    stop: Sequence[Sequence[int]] = (),
    seed: int | Sequence[int] = 0,
    prefill: int | None = None,
) -> list[Completion]:
    """Continue every prompt by up to `max_new` tokens.

    Args:
        model: on any device; it is in evaluation mode during the call.
        prompts: token ids, at least one per prompt; lengths may differ.
        max_new: tokens to generate per prompt.
        temperature, top_k, top_p, greedy: see `Sampling`.
        stop: token sequences that end a completion. They must lie within the generated part and are removed.
        seed: one for all (row i then draws from stream i of that seed), or one per prompt, which makes a prompt's
            result independent of its place in the batch.
        prefill: most prompt tokens that are read at once, which bounds the memory of long prompts; None reads all at once.

    Returns:
        one Completion per prompt, in order.

    Raises:
        ConfigError: empty or out-of-range prompts, an empty stop sequence, or sampling values out of range.
    """
    sampling = Sampling(temperature, top_k, top_p, greedy)
    if not isinstance(seed, int) and len(seed) != len(prompts):
        raise ConfigError(f"{len(seed)} seeds were given for {len(prompts)} prompts; give one seed, or one per prompt.")
    batcher = Batcher(model, max(1, len(prompts)), prefill=prefill)
    for row, prompt in enumerate(prompts):
        stream = (seed, f"generate row {row}") if isinstance(seed, int) else (seed[row], "generate prompt")
        batcher.submit(Request(prompt, max_new, sampling, stop, *stream))
    finished = dict(batcher.run())
    return [finished[ticket] for ticket in range(len(prompts))]

"""The head is applied where losses are scored and nowhere else, with the same losses and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from subjects import byte_subject

from torchstone.diagnose.gradients import scored as module
from torchstone.diagnose.gradients.pairs import Example
from torchstone.diagnose.gradients.profile import gradient_profile, mean_losses
from torchstone.diagnose.gradients.scored import Scored, batches, scored_logits
from torchstone.diagnose.subject import Subject

Subjects = Callable[[str], Subject]
EXAMPLES = (Example.of([5, 6, 7, 8, 9, 10], 4, "a"), Example.of([9, 8, 7, 6], 1, "b"))
TOKENS_BT = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 0, 0]])


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Granite", "Cohere", "GPTNeoX", "GPT2", "OPT"])
def test_the_head_of_a_hugging_face_model_reads_scored_places_only(family: str, family_subject: Subjects) -> None:
    """Caps and factors after the head are the family's own."""
    subject, seen = family_subject(family), []
    head: Any = subject.model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:-1].numel()))
    scored = Scored.of(EXAMPLES, torch.device("cpu"))
    try:
        found_nv = scored_logits(subject, TOKENS_BT, scored)
    finally:
        handle.remove()
    whole_btv = subject.logits(TOKENS_BT)
    assert seen == [5] and found_nv.shape == (5, whole_btv.shape[-1])  # 2 + 3 tokens of 10
    torch.testing.assert_close(found_nv, whole_btv[scored.rows_n, scored.places_n])
    torch.testing.assert_close(scored.losses(found_nv), mean_losses(whole_btv, EXAMPLES))


def test_the_head_of_a_decoder_reads_scored_places_only(monkeypatch: pytest.MonkeyPatch) -> None:
    subject, seen = byte_subject(), []
    own: Any = subject.model.logits
    monkeypatch.setattr(subject.model, "logits", lambda hidden: seen.append(hidden.shape[:-1].numel()) or own(hidden))
    profile = gradient_profile(subject, EXAMPLES)
    assert seen == [5]
    plain_b = mean_losses(subject.logits(TOKENS_BT), EXAMPLES).double()
    torch.testing.assert_close(profile.losses_n, plain_b, rtol=1e-5, atol=0)


def test_a_model_with_a_head_of_another_kind_makes_all_logits(
    monkeypatch: pytest.MonkeyPatch, family_subject: Subjects
) -> None:
    subject = family_subject("Llama")
    scored = Scored.of(EXAMPLES, torch.device("cpu"))
    expected_nv = scored_logits(subject, TOKENS_BT, scored)
    monkeypatch.setattr(subject.model, "get_output_embeddings", lambda: None)
    torch.testing.assert_close(scored_logits(subject, TOKENS_BT, scored), expected_nv)
    unused = torch.nn.Linear(1, 1)
    monkeypatch.setattr(subject.model, "get_output_embeddings", lambda: unused)
    torch.testing.assert_close(scored_logits(subject, TOKENS_BT, scored), expected_nv)


def test_batches_are_parted_where_logits_would_be_many(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [Example.of(range(n + 1), 1, str(n)) for n in (1, 2, 3, 9, 2, 1)]
    order = list(range(6))
    assert list(batches(order, examples, 4, 10)) == [[0, 1, 2, 3], [4, 5]]
    monkeypatch.setattr(module, "LOGITS", 60)
    assert list(batches(order, examples, 4, 10)) == [[0, 1, 2], [3], [4, 5]]
    subject = byte_subject()
    several = [Example.of([3 * n + i for i in range(6)], 2, str(n)) for n in range(4)]
    parted = gradient_profile(subject, several)
    monkeypatch.undo()
    torch.testing.assert_close(parted.statistic(), gradient_profile(subject, several).statistic(), rtol=2e-4, atol=0)

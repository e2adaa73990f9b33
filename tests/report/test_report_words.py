"""Verdicts in words: units, percent and factors, the summary line."""

from __future__ import annotations

import math
from types import ModuleType

from torchstone.report import words


def test_differences_keep_the_unit_and_the_interval_sets_the_precision(results: ModuleType) -> None:
    result = results.study()
    verdict = result.verdicts[0].model_copy(
        update={
            "effect": -0.041237,
            "interval": results.Interval(low=-0.0552, high=-0.0273, level=0.95),
            "margin": -0.01,
        }
    )
    scale = words.scale_for([verdict], result.metrics)
    assert scale.text(verdict.effect) == "-0.041 nats"
    assert words.interval_text(verdict, scale) == "-0.055 to -0.027 nats"
    assert words.claimed(verdict, scale) == "below -0.010 nats"
    assert scale.detectable(0.02) == "0.020 nats"


def test_log_ratios_are_percent_when_small_and_factors_when_large(results: ModuleType) -> None:
    small = results.study().verdicts[2].model_copy(update={"effect": 0.05, "interval": None, "margin": math.log(1.1)})
    assert words.scale_for([small], ()).text(math.log(1.1)).startswith("+10.0")
    large = results.algorithm().verdicts[0]
    scale = words.scale_for([large], ())
    assert scale.text(math.log(2)) == "×2" and scale.neutral == 1.0


def test_summary_of_one_and_of_many(results: ModuleType) -> None:
    result = results.study()
    assert words.summary(result).startswith("Of 3 claims, 1 holds, 1 fails and 1 is inconclusive. 1 of 9 cells")
    one = result.model_copy(update={"verdicts": result.verdicts[:1], "cells": ()})
    assert words.summary(one).startswith("The claim holds: Differential attention reaches")
    assert words.summary(results.algorithm()) == "Both claims are inconclusive."
    assert words.summary(results.comparison()).startswith("No claim was tested")


def test_an_effect_that_does_not_exist_is_said(results: ModuleType) -> None:
    verdict = results.algorithm().verdicts[1]
    scale = words.scale_for([verdict], results.algorithm().metrics)
    assert "no effect could be computed" in words.effect_sentence(verdict, (), scale)
    assert scale.text(None) == words.interval_text(verdict, scale) == "–"


def test_extreme_log_ratios_do_not_overflow(results: ModuleType) -> None:
    verdict = results.algorithm().verdicts[0].model_copy(update={"effect": 5000.0})
    assert words.scale_for([verdict], ()).text(5000.0).startswith("×")


def test_long_reasons_are_cut(results: ModuleType) -> None:
    verdict = results.study().verdicts[0].model_copy(update={"reason": "error " * 1000})
    assert len(words.reason(verdict)) < 510 and words.reason(verdict).endswith("…")

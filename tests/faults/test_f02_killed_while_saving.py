"""F2 in training: the process dies at stages of its saves; the previous checkpoint or the new one loads (P1).

Every fifth stage here; all of them with TORCHSTONE_FAULT_TRIALS=200. `test_f02_every_stage_of_storage.py` kills a store alone
at each.
"""

from __future__ import annotations

from tiny import tiny_recipe

from torchstone.train.checkpoint import CheckpointStore

RECIPE = tiny_recipe(budget={"steps": 6}, checkpoint={"every": 2, "keep": 1})


def test_f02_stages_of_training(zygote, weights, fast_path, trials):
    assert zygote.run(RECIPE, fast_path / "whole") == 0
    expected = weights(fast_path / "whole")
    stages = []
    stride = 1 if trials(20) >= 200 else 5
    for stage in range(1, 400, stride):
        directory = fast_path / f"stage-{stage}"
        status = zygote.run(RECIPE, directory, stage=stage)
        if status == 0:
            break
        assert status == 77
        store = CheckpointStore(directory / "checkpoints")
        if store.steps():
            assert store.load().step in (2, 4, 6)
        assert zygote.run(RECIPE, directory) == 0, zygote.log.read_text()[-2000:]
        assert weights(directory) == expected
        leftovers = [item.name for item in (directory / "checkpoints").iterdir() if ".partial-" in item.name]
        assert leftovers == []
        stages.append(stage)
    assert len(stages) * stride > 40, "the hook is no longer called at every stage"

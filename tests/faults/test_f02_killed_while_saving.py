"""F2: the process dies at every stage of a save; the previous checkpoint or the new one loads, never a partial one (P1)."""

from __future__ import annotations

from tiny import tiny_recipe

from torchstone.train.checkpoint import CheckpointStore

RECIPE = tiny_recipe(budget={"steps": 6}, checkpoint={"every": 2, "keep": 1})


def test_f02_every_stage(zygote, weights, fast_path):
    assert zygote.run(RECIPE, fast_path / "whole") == 0
    expected = weights(fast_path / "whole")
    stages = []
    for stage in range(1, 200):
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
    assert len(stages) > 40, "the hook is no longer called at every stage"
    log = zygote.log.read_text()
    for name in ("manifest written", "directory renamed", "latest moved", "old manifest deleted", "file flushed"):
        assert f"dies at stage {name!r}" in log

"""The Python of docs/interop.md runs, in order."""

import json
import re

import pytest
import yaml


def test_the_page_runs(run, data_words, project_root, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'torchstone[lm-eval]'")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "rows.jsonl").write_text('{"text": "the cats sat", "label": 0}\n' * 5)
    task = {
        "task": "cats",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tasks / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": json.dumps(["on the mat", "in a box"]),
    }
    (tasks / "cats.yaml").write_text(yaml.safe_dump(task))
    hybrid = run(pattern=["rglru", {"kind": "local-attention", "window": 8}])
    names = {"run": run(), "hybrid": hybrid, "work": tmp_path, "tasks": tasks, "data_words": data_words}
    blocks = re.findall(r"```python\n(.*?)```", (project_root / "docs" / "interop.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(block, names)

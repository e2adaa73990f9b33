"""lm-evaluation-harness with torchstone runs: numbers equal direct computation and the harness's own `hf` model."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml

os.environ["HF_EVALUATE_OFFLINE"] = "1"
pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'torchstone[lm-eval]'")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from torchstone.errors import ConfigError
from torchstone.interop.exporting import export_run
from torchstone.interop.lm_eval import TorchstoneLM, evaluate, generation_of
from torchstone.models.generate import generate
from torchstone.train.run import load_run

ROWS = [
    {"question": f"the {number} cats sat", "choices": [" on the mat", " in a box of tin", " it"], "answer": number % 3}
    for number in range(7)
]
GREEDY = {"until": ["."], "max_gen_toks": 12, "do_sample": False}


@pytest.fixture(scope="module")
def trained(run):
    """A run of plain attention."""
    return run()


@pytest.fixture(scope="module")
def recurrent(run):
    """A run of a hybrid of recurrence and attention."""
    return run(pattern=["rglru", {"kind": "local-attention", "window": 8}])


@pytest.fixture
def tasks(tmp_path):
    """A folder of three tasks on local rows: choices, whole texts and generation."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}, "test_split": "test"}
    metric = {"aggregation": "mean", "higher_is_better": True}
    choice = {
        "task": "cats_choice",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": "{{choices}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", **metric}],
    }
    rolling = {
        "task": "cats_rolling",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}}{{choices[0]}}. {{question}}{{choices[1]}}.",
        "metric_list": [{"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    }
    written = {
        "task": "cats_written",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": " on the mat and ate",
        "generation_kwargs": GREEDY,
        "metric_list": [{"metric": "exact_match", **metric}],
    }
    for task in (choice, rolling, written):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump({**task, **data, "metadata": {"version": 1}}))
    return folder


@pytest.fixture
def manager(tasks):
    """The three tasks without the harness's thousands, which take seconds to list."""
    return TaskManager(include_path=str(tasks), include_defaults=False)


NAMES = ["cats_choice", "cats_rolling", "cats_written"]


@torch.no_grad()
def direct(model, codec, context, continuation):
    """ln p of a continuation, token by token, each from a pass of its own over all tokens before it."""
    given, scored = codec.encode(context) or [codec.end_of_document], codec.encode(continuation)
    total, greedy = 0.0, True
    for place, token in enumerate(scored):
        tokens = torch.tensor([given + scored[:place]])
        logprobs = model.logits(model(tokens).hidden_btd[0, -1]).log_softmax(-1)
        total += float(logprobs[token])
        greedy &= int(logprobs.argmax()) == token
    return total, greedy


def requests(kind, *arguments):
    return [Instance(kind, {}, given, index) for index, given in enumerate(arguments)]


@pytest.mark.parametrize("which", ["trained", "recurrent"])
def test_loglikelihoods_are_those_of_direct_computation(which, request):
    directory = request.getfixturevalue(which)
    _, model, data = load_run(directory)
    pairs = [(row["question"], choice) for row in ROWS[:3] for choice in row["choices"]]
    pairs += [("", "the 3 cats"), ("the cats ", "sat"), ("   ", "on")]
    found = TorchstoneLM(str(directory), batch_size=4).loglikelihood(requests("loglikelihood", *pairs))
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        spaces = len(context) - len(context.rstrip())  # the harness scores them with the continuation
        moved = context[len(context) - spaces :] + continuation
        expected = direct(model, data.tokenizer, context[: len(context) - spaces], moved)
        assert value == pytest.approx(expected[0], abs=1e-4) and greedy == expected[1]


def test_whole_texts_in_windows(trained):
    _, model, data = load_run(trained)
    text = "the 3 cats sat on the mat and ate 3 fish. " * 2
    lm = TorchstoneLM(str(trained))
    assert lm.max_length == 32 < len(text)
    (found,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    end, tokens = [data.tokenizer.end_of_document], data.tokenizer.encode(text)
    expected = 0.0
    for start in range(0, len(tokens), 32):
        piece = tokens[start : start + 32]
        before = end if start == 0 else [tokens[start - 1]]
        if start and len(piece) < 32:  # the last window reads as far back as it can
            before = tokens[len(tokens) - 33 : start]
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([before + piece[:-1]])).hidden_btd[0, -len(piece) :])
        expected += float(logits.log_softmax(-1).gather(1, torch.tensor(piece)[:, None]).sum())
    assert found == pytest.approx(expected, abs=1e-3)
    long = TorchstoneLM(str(trained), max_length=200)
    (whole,) = long.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    assert whole == pytest.approx(direct(model, data.tokenizer, "", text)[0], abs=1e-3)


@pytest.mark.parametrize("which", ["trained", "recurrent"])
def test_texts_stop_where_the_task_says(which, request):
    directory = request.getfixturevalue(which)
    _, model, data = load_run(directory)
    prompts = ["the 3 cats", "", "the 5 cats sat", "a"]
    given = requests("generate_until", *[(prompt, GREEDY) for prompt in prompts])
    found = TorchstoneLM(str(directory), batch_size=3).generate_until(given)
    for prompt, text in zip(prompts, found, strict=True):
        start = data.tokenizer.encode(prompt) or [256]
        (alone,) = generate(model, [start], max_new=12, greedy=True, stop=[[256]])
        assert text == data.tokenizer.decode(alone.tokens).split(".")[0]


def test_sampled_texts_do_not_depend_on_the_batch(trained):
    settings = {"until": [], "max_gen_toks": 10, "do_sample": True, "temperature": 0.9, "top_p": 0.95}
    given = requests("generate_until", *[(prompt, settings) for prompt in ("the 3", "the 30 cats", "cats", "mat")])
    one, all_at_once = (TorchstoneLM(str(trained), batch_size=size).generate_until(given) for size in (1, 4))
    assert one == all_at_once and any(one)
    other = TorchstoneLM(str(trained), batch_size=4, seed=1).generate_until(given)
    assert other != one


def test_a_task_gives_the_numbers_of_direct_computation(trained, manager):
    found = evaluate(trained, NAMES, task_manager=manager, bootstrap_iters=0)
    _, model, data = load_run(trained)
    right = 0
    for row in ROWS:
        scores = [direct(model, data.tokenizer, row["question"], choice)[0] for choice in row["choices"]]
        right += scores.index(max(scores)) == row["answer"]
    assert found["results"]["cats_choice"]["acc,none"] == pytest.approx(right / len(ROWS))
    assert found["results"]["cats_rolling"]["bits_per_byte,none"] > 0
    assert {len(found["samples"][name]) for name in NAMES} == {7}


def test_the_harness_own_model_gives_the_same_numbers_for_an_export(trained, manager, tmp_path):
    pytest.importorskip("accelerate", reason="the harness's hf model needs accelerate")
    export_run(trained, tmp_path / "out")
    ours = evaluate(trained, NAMES, task_manager=manager, bootstrap_iters=0)
    theirs = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path / "out"), "dtype": "float32"},
        tasks=NAMES,
        task_manager=manager,
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )
    for name in NAMES:
        for metric, value in theirs["results"][name].items():
            if isinstance(value, float):
                assert ours["results"][name][metric] == pytest.approx(value, abs=1e-5), (name, metric)
        for mine, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
            if name == "cats_written":
                assert mine["resps"] == other["resps"]
            elif name == "cats_choice":
                for (left,), (right,) in zip(mine["resps"], other["resps"], strict=True):
                    assert left[0] == pytest.approx(float(right[0]), abs=1e-4) and left[1] == bool(right[1])
            else:
                assert mine["resps"][0][0] == pytest.approx(float(other["resps"][0][0]), abs=1e-3)


def test_the_harness_makes_the_model_by_its_name(trained):
    made = get_model("torchstone").create_from_arg_string(
        f"run={trained},max_length=64", {"batch_size": 2, "device": "cpu"}
    )
    assert isinstance(made, TorchstoneLM) and (made.max_length, made.batch_size) == (64, 2)
    assert get_model("hf").__name__ == "HFLM"  # the harness's own models are still there
    run = subprocess.run(
        [sys.executable, "-m", "torchstone.interop.lm_eval", "run", "--help"], capture_output=True, text=True
    )
    assert run.returncode == 0 and "--model_args" in run.stdout, run.stderr


def test_settings_of_generation():
    settings = generation_of({"until": "\n", "max_new_tokens": 5, "temperature": 0.0})
    assert (settings.until, settings.most_new, settings.sampling.greedy) == (("\n",), 5, True)
    sampled = generation_of({"do_sample": True, "temperature": 0.7, "top_k": 5})
    assert (sampled.most_new, sampled.sampling.temperature, sampled.sampling.top_k) == (256, 0.7, 5)
    with pytest.raises(ConfigError, match="asks for num_beams=4"):
        generation_of({"num_beams": 4})


def test_what_cannot_be_done_is_refused(trained, run, tmp_path):
    lm = TorchstoneLM(str(trained))
    with pytest.raises(ConfigError, match="generates 40 tokens and max_length is 32"):
        lm.generate_until(requests("generate_until", ("a", {"max_gen_toks": 40})))
    with pytest.raises(ConfigError, match="continuation has 50 tokens and max_length is 32"):
        lm.loglikelihood(requests("loglikelihood", ("a", "b" * 50)))
    with pytest.raises(ConfigError, match="dtypes are float32, bfloat16"):
        TorchstoneLM(str(trained), dtype="int8")
    with pytest.raises(ConfigError, match="holds no run"):
        TorchstoneLM(str(tmp_path))


def test_without_the_package_the_install_line_is_given():
    code = "import sys; sys.modules['lm_eval'] = None; import torchstone.interop.lm_eval"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "DependencyError" in run.stderr and "pip install 'torchstone[lm-eval]'" in run.stderr

"""Opening: every kind of source, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from families import tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast, T5Config

from torchstone.data.tokenizers import ByteTokenizer
from torchstone.diagnose.adapters import open_subject
from torchstone.diagnose.adapters.loading import usable_device
from torchstone.diagnose.subject import Subject
from torchstone.diagnose.texts import token_rows
from torchstone.errors import ConfigError, DataError, DependencyError

Folders = Callable[[str], Path]


@pytest.fixture
def folder(family_folder: Folders, tmp_path: Path) -> Path:
    """A copy of the Llama folder, to change."""
    return Path(shutil.copytree(family_folder("Llama"), tmp_path / "llama"))


def save_tokenizer(folder: Path, words: int = 40) -> None:
    """A tokenizer of `words` words w0, w1, …"""
    vocabulary = {"[UNK]": 0} | {f"w{i}": i for i in range(1, words)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]").save_pretrained(folder)


def test_a_folder_is_described_and_loaded_in_float32(family_subject: Callable[[str], Subject]) -> None:
    subject = family_subject("Llama")
    assert subject.architecture == "LlamaForCausalLM" and "M parameters" in subject.describe()
    assert (subject.vocab_size, subject.width, subject.max_length) == (48, 32, 64)
    assert not subject.model.training and subject.head_weight().dtype == torch.float32
    layer = subject.layers[1]
    assert (layer.index, layer.name) == (1, "model.layers.1.self_attn")
    assert (layer.heads, layer.kv_heads, layer.head_dim, layer.value_dim) == (4, 2, 8, 8)
    assert [layer.kv_of(head) for head in range(4)] == [0, 0, 1, 1]


def test_half_precision_is_read_as_well(family_folder: Folders, tokens_bt: Tensor) -> None:
    for family in ("Llama", "Cohere", "GPTNeoX"):
        subject = open_subject(family_folder(family), dtype=torch.bfloat16)
        assert subject.logits(tokens_bt).dtype == torch.bfloat16
        layer = subject.layers[0]
        assert layer.rotation is not None and layer.weights().q_hdw.dtype == torch.float64
        subject.visit(tokens_bt, lambda layer, activations: None, weights=True)


def test_a_model_in_memory_keeps_its_type(tokens_bt: Tensor) -> None:
    model = tiny_model("Llama").to(torch.float64).train()
    subject = open_subject(model)
    assert subject.model is model and not model.training and subject.logits(tokens_bt).dtype == torch.float64
    with pytest.raises(ConfigError, match="convert it"):
        open_subject(model, dtype=torch.float32)


def test_without_a_tokenizer_only_text_is_refused(family_subject: Callable[[str], Subject]) -> None:
    subject = family_subject("Llama")
    with pytest.raises(ConfigError, match="has no tokenizer; give one"):
        subject.encode("text")
    assert subject.decode([3, 4]) == "3 4"


def test_a_tokenizer_tells_which_rows_of_the_head_are_padding(folder: Path) -> None:
    save_tokenizer(folder)
    subject = open_subject(folder)
    assert subject.vocab_size == 40 and subject.head_weight().shape == (40, 32)
    assert subject.logits(torch.tensor([[1, 2]])).shape[-1] == 48
    assert subject.encode("w3 w5 other") == [3, 5, 0] and subject.decode([3, 5]) == "w3 w5"
    save_tokenizer(folder, words=60)  # longer than the head
    assert open_subject(folder).vocab_size == 48


def test_another_tokenizer_may_be_given(folder: Path, tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    assert open_subject(folder, tokenizer=tmp_path).encode("w7") == [7]
    assert open_subject(folder, tokenizer=ByteTokenizer()).encode("a") == [97]


@pytest.mark.parametrize(
    ("template", "first"),
    [(None, []), ("$A", []), ("[BOS] $A", [1]), ("[BOS] $A [EOS]", [1]), ("$A [EOS]", []), ("[EOS] [BOS] $A", [2, 1])],
)
def test_first_tokens_are_what_the_tokenizer_puts_before_a_text(
    template: str | None, first: list[int], family_subject: Callable[[str], Subject]
) -> None:
    special = {"[UNK]": 0, "[BOS]": 1, "[EOS]": 2}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(special | {f"w{i}": i for i in range(3, 40)}, "[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if template is not None:
        pairs = [(name, special[name]) for name in ("[BOS]", "[EOS]")]
        inner.post_processor = tokenizers.processors.TemplateProcessing(single=template, special_tokens=pairs)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", bos_token="[BOS]", eos_token="[EOS]")
    subject = open_subject(family_subject("Llama").model, tokenizer=tokenizer)
    assert subject.first_tokens() == first and subject.encode("w5 w6") == [5, 6]
    assert token_rows(subject, ["w5 w6 w7 w8 w9"], len(first) + 2).tolist() == [[*first, 5, 6], [*first, 7, 8]]
    assert subject.untrained().first_tokens() == first


def test_without_special_tokens_there_are_no_first_ones(family_subject: Callable[[str], Subject]) -> None:
    assert family_subject("Llama").first_tokens() == []  # no tokenizer
    assert open_subject(family_subject("Llama").model, tokenizer=ByteTokenizer()).first_tokens() == []


def test_tied_heads_are_noticed(family_subject: Callable[[str], Subject]) -> None:
    assert family_subject("GPT2").tied and not family_subject("Llama").tied
    assert torch.equal(family_subject("GPT2").head_weight(), family_subject("GPT2").embedding().weight)


def test_a_device_moves_the_model(folder: Path) -> None:
    assert open_subject(folder, device="cpu").device == torch.device("cpu")


def test_without_a_gpu_there_is_only_the_cpu(folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("torchstone.diagnose.adapters.load_model", lambda *given: pytest.fail("the model was loaded"))
    assert usable_device(None) == usable_device("cpu") == torch.device("cpu")
    for name in ("gpu", "cuda", "cuda:1", "mps", "meta", "cpu:3", "", "cuda:x"):
        with pytest.raises(ConfigError, match=f"there is no device '{name}' for an analysis; this machine has: cpu."):
            open_subject(folder, device=name)


def test_the_first_gpu_is_taken_where_there_is_one(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert usable_device(None) == torch.device("cuda") and usable_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="no device 'cuda:2' .* has: cpu, cuda:0, cuda:1"):
        usable_device("cuda:2")


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        ("/no/such/folder", {}, ConfigError, "does not exist"),
        (Path("missing"), {}, ConfigError, "does not exist"),
        (".", {}, ConfigError, "neither recipe.yaml"),
        (nn.Linear(2, 2), {}, ConfigError, "Linear is neither a torchstone Decoder"),
        ("llama", {"step": 3}, ConfigError, "step was given and has no meaning"),
        ("llama", {"revision": "main"}, ConfigError, "revision was given"),
        ("llama", {"names": {"query": "x"}}, ConfigError, "names has 'query'; known are k, o, q, qkv, v"),
    ],
)
def test_sources_and_options_without_meaning_are_refused(
    source: Any, options: dict[str, Any], error: type[Exception], message: str, folder: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(folder.parent)
    with pytest.raises(error, match=message):
        open_subject(folder if source == "llama" else source, **options)


def test_a_hub_id_that_cannot_be_loaded_is_named(monkeypatch: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="nobody/no-such-model could not be loaded by transformers"):
        open_subject("nobody/no-such-model", revision="step1")


def test_models_without_a_language_head_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no language-model head"):
        open_subject(LlamaModel(tiny_model("Llama").config))
    T5Config(d_model=8, num_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="encoder and a decoder"):
        open_subject(tmp_path)


def test_incomplete_and_damaged_folders_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="could not be loaded"):
        open_subject(folder)
    weights.unlink()
    with pytest.raises(DataError, match="could not be loaded"):
        open_subject(folder)
    model = tiny_model("Llama")
    state = {name: p for name, p in model.state_dict().items() if "layers.1.self_attn.q_proj" not in name}
    model.save_pretrained(folder, state_dict=state)
    with pytest.raises(
        DataError, match=r"lacks 1 of the model's weights, the first is model.layers.1.self_attn.q_proj"
    ):
        open_subject(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(DataError, match="is no JSON"):
        open_subject(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(DataError, match="names no model_type"):
        open_subject(folder)


CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM
pathlib.Path(r"{mark}").touch()
class MineConfig(LlamaConfig):
    model_type = "mine"
class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


def test_code_of_a_folder_runs_only_on_request(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    mark = tmp_path / "ran"
    (folder / "mine.py").write_text(CODE.format(mark=mark))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    assert open_subject(folder).architecture == "LlamaForCausalLM"  # transformers' own class
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mine"}))
    with pytest.raises(ConfigError, match="brings its own code .*trust_remote_code=True"):
        open_subject(folder)
    assert not mark.exists()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    assert open_subject(folder, trust_remote_code=True).architecture == "MineForCausalLM"
    assert mark.exists()


def test_transformers_missing_is_named_with_the_install_line(folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DependencyError, match=r"pip install 'torchstone\[hf\]'"):
        open_subject(folder)


def test_attention_outside_the_interface_is_refused_by_module(tokens_bt: Tensor) -> None:
    from transformers import GPTJConfig, GPTJForCausalLM

    with pytest.raises(ConfigError, match=r"transformer.h.0.attn \(GPTJAttention\) computes attention without"):
        open_subject(GPTJForCausalLM(GPTJConfig(vocab_size=48, n_embd=32, n_head=4, n_layer=1, rotary_dim=4)))


def test_attention_that_computes_something_else_is_refused() -> None:
    model = tiny_model("Llama")
    attention = model.model.layers[0].self_attn
    forward = attention.forward

    def cooled(*inputs: Any, **settings: Any) -> Any:
        output, weights = forward(*inputs, **settings)
        own = attention.config._attn_implementation != "torchstone"
        return (2 * output if own else output), weights

    attention.forward = cooled
    with pytest.raises(ConfigError, match="computes something else than scaled products"):
        open_subject(model)


def test_layers_that_are_repeated_are_refused() -> None:
    model = tiny_model("Llama")
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(ConfigError, match="computed more than once"):
        open_subject(model)


def test_a_language_model_inside_a_multimodal_one_is_used(tokens_bt: Tensor) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = tiny_model("Gemma3").config.to_dict()
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=14, patch_size=7
    )
    config = Gemma3Config(
        text_config=text, vision_config=vision, image_token_index=0, boi_token_index=1, eoi_token_index=2
    )
    subject = open_subject(Gemma3ForConditionalGeneration(config))
    assert len(subject.layers) == 2 and all("vision" not in layer.name for layer in subject.layers)
    expected = torch.nn.functional.cross_entropy(
        subject.logits(tokens_bt)[:, :-1].mT, tokens_bt[:, 1:], reduction="none"
    )
    torch.testing.assert_close(subject.losses(tokens_bt), expected, rtol=1e-4, atol=1e-5)


def test_loading_leaves_the_attention_of_other_models_alone(folder: Path, tokens_bt: Tensor) -> None:
    open_subject(folder)
    other = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(other, LlamaForCausalLM) and other.config._attn_implementation == "sdpa"
    assert other(input_ids=tokens_bt).logits.isfinite().all()

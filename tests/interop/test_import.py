"""Checkpoints of transformers become run directories with equal logits; what parts do not have is refused by name."""

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from torchstone.data.tokenizers import ByteTokenizer
from torchstone.diagnose.adapters import open_subject
from torchstone.errors import ConfigError, DataError
from torchstone.interop.importing import import_checkpoint
from torchstone.interop.tokenizer import tokenizer_json
from torchstone.models.generate import generate
from torchstone.train.run import load_run, train

SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 300.0}
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "llama, tied, grouped, biased, scaled": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(
            **SIZES,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            head_dim=16,
            attention_bias=True,
            rope_parameters=LINEAR,
        )
    ),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**SIZES, num_key_value_heads=1, sliding_window=7)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES, num_key_value_heads=2)),
    "qwen2, windows in some layers": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**SIZES, num_key_value_heads=2, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    ),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8)),
    "qwen3, biased": lambda: hf.Qwen3ForCausalLM(
        hf.Qwen3Config(**SIZES, num_key_value_heads=4, head_dim=8, attention_bias=True, tie_word_embeddings=True)
    ),
    "jetmoe": lambda: hf.JetMoeForCausalLM(
        hf.JetMoeConfig(
            vocab_size=300,
            hidden_size=32,
            num_hidden_layers=2,
            num_key_value_heads=2,
            kv_channels=8,
            intermediate_size=24,
            num_local_experts=4,
        )
    ),
}


def griffin(window, **settings):
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1}
    return hf.RecurrentGemmaForCausalLM(
        hf.RecurrentGemmaConfig(**sizes, **heads, attention_window_size=window, **settings)
    )


@torch.no_grad()
def theirs_of(model, tokens):
    return model(tokens, use_cache=False).logits


@pytest.mark.parametrize("name", MODELS)
def test_logits_agree(name, saved, tokens, logits, tmp_path, data_words):
    theirs, folder = saved(MODELS[name]())
    done = import_checkpoint(folder, tmp_path / "run", data_words)
    recipe, ours, data = load_run(tmp_path / "run")
    assert recipe == done.recipe and done.model_type == theirs.config.model_type
    assert data.vocab_size == 300 and data.tokenizer.end_of_document == 256
    assert done.parameters == sum(parameter.numel() for parameter in theirs.parameters())
    expected_btv = theirs_of(theirs, tokens)
    assert expected_btv.abs().max() > 1
    torch.testing.assert_close(logits(ours, tokens), expected_btv, atol=1e-5, rtol=0)


# transformers sees W keys in a window of W, the authors' code W + 1: a checkpoint's W means the authors'
WINDOWS = [(8, "inclusive", 8, True), (8, "plus-one", 8, False), (8, None, 8, False), (8, None, 9, True)]


@pytest.mark.parametrize(("window", "convention", "of_transformers", "agree"), WINDOWS)
def test_windows_of_recurrent_gemma(
    window, convention, of_transformers, agree, saved, tokens, logits, tmp_path, data_words
):
    theirs, folder = saved(griffin(of_transformers))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attention_window_size": window}))
    import_checkpoint(folder, tmp_path / "run", data_words, window_convention=convention)
    _, ours, _ = load_run(tmp_path / "run")
    ours_btv, theirs_btv = logits(ours, tokens), theirs_of(theirs, tokens)
    torch.testing.assert_close(ours_btv[:, :window], theirs_btv[:, :window], atol=1e-5, rtol=0)
    late = (ours_btv[:, window:] - theirs_btv[:, window:]).abs().max()
    assert late < 1e-5 if agree else late > 0.1


def test_recurrent_gemma_of_another_recurrent_width(saved, tokens, logits, tmp_path, data_words):
    theirs, folder = saved(griffin(64, lru_width=48))
    import_checkpoint(folder, tmp_path / "run", data_words)
    _, ours, _ = load_run(tmp_path / "run")
    torch.testing.assert_close(logits(ours, tokens), theirs_of(theirs, tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["shards", "half"])
def test_forms_of_a_checkpoint(form, saved, tokens, logits, tmp_path, data_words):
    model = MODELS["llama"]()
    _, folder = saved(model.bfloat16() if form == "half" else model, max_shard_size="20KB")
    theirs = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    import_checkpoint(folder, tmp_path / "run", data_words)
    _, ours, _ = load_run(tmp_path / "run")
    torch.testing.assert_close(logits(ours, tokens), theirs_of(theirs, tokens), atol=1e-5, rtol=0)


def test_every_command_takes_the_run(saved, tmp_path, data_words):
    _, folder = saved(MODELS["qwen3"]())
    words = [*data_words, "budget.steps=3", "evaluation.sequences=4"]
    done = import_checkpoint(folder, tmp_path / "run", words)
    _, before, data = load_run(tmp_path / "run")
    assert len(generate(before, [data.tokenizer.encode("the")], max_new=4)[0].tokens) == 4
    assert open_subject(tmp_path / "run").architecture == "torchstone decoder"
    summary = train(done.recipe, tmp_path / "run", progress=lambda state: None)
    assert summary.steps == 3 and len(summary.history["train"]["loss"]) == 3
    _, after, _ = load_run(tmp_path / "run")
    assert not torch.equal(before.embed.weight, after.embed.weight)
    _, again, _ = load_run(tmp_path / "run", step=0)
    assert torch.equal(before.embed.weight, again.embed.weight)


REFUSED = {
    "rope_parameters": ({"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5}, "rotary scaling of type 'llama3'"),
    "mlp_bias": (True, "mlp_bias=true"),
    "hidden_act": ("gelu", 'hidden_act="gelu"'),
    "quantization_config": ({"bits": 4}, "setting quantization_config"),
    "logit_scale": (0.5, "setting logit_scale=0.5"),
    "model_type": ("gpt2", "model_type='gpt2'; torchstone can import jetmoe"),
    "is_encoder_decoder": (True, "is_encoder_decoder=true"),
    "auto_map": ({"AutoModelForCausalLM": "mine.Mine"}, "brings its own code"),
    "vocab_size": (200, "has shape [300, 32], the settings in config.json ask for [200, 32]"),
    "num_hidden_layers": (1, "tensors of 2 layers and config.json has num_hidden_layers=1"),
    "intermediate_size": (40, "do not belong together"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_parts_do_not_have_is_refused_by_name(name, saved, tmp_path):
    value, message = REFUSED[name]
    _, folder = saved(MODELS["llama"]())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises((ConfigError, DataError)) as error:
        import_checkpoint(folder, tmp_path / "run")
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("kind", "name", "value"), [("qwen3", "rms_norm_eps", 1e-5), ("jetmoe", "rms_norm_eps", 1e-5)])
def test_one_eps_for_norms_that_have_two(kind, name, value, saved, tmp_path):
    _, folder = saved(MODELS[kind]())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(ConfigError, match="rms_norm_eps=1e-05"):
        import_checkpoint(folder, tmp_path / "run")


def test_code_is_accepted_only_when_vouched_for_and_never_run(saved, tokens, logits, tmp_path, data_words):
    theirs, folder = saved(MODELS["llama"]())
    (folder / "modeling_mine.py").write_text("raise SystemExit('this code was run')")
    with pytest.raises(ConfigError, match="modeling_mine.py.*--trust-remote-code"):
        import_checkpoint(folder, tmp_path / "run", data_words)
    import_checkpoint(folder, tmp_path / "run", data_words, trust_remote_code=True)
    _, ours, _ = load_run(tmp_path / "run")
    torch.testing.assert_close(logits(ours, tokens), theirs_of(theirs, tokens), atol=1e-5, rtol=0)


def test_pickles_are_refused(saved, tmp_path):
    _, folder = saved(MODELS["llama"]())
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(DataError, match="as a pickle .pytorch_model.bin.*save_pretrained"):
        import_checkpoint(folder, tmp_path / "run")


DAMAGES = {
    "missing": (lambda tensors: tensors.pop("model.norm.weight"), "lacks the tensor model.norm.weight"),
    "left over": (lambda tensors: tensors.update(extra=torch.ones(1)), "the first is extra"),
    "not finite": (lambda tensors: tensors["model.norm.weight"].fill_(torch.nan), "not finite"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_incomplete_weights_are_refused(damage, saved, tmp_path):
    change, message = DAMAGES[damage]
    _, folder = saved(MODELS["llama"]())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(DataError, match=message):
        import_checkpoint(folder, tmp_path / "run")


def test_an_index_cannot_point_out_of_the_folder(saved, tmp_path):
    _, folder = saved(MODELS["llama"](), max_shard_size="20KB")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = "../other.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(DataError, match="which no checkpoint has; refused"):
        import_checkpoint(folder, tmp_path / "run")


def test_a_second_output_matrix_of_a_tied_model_must_be_the_same(saved, tokens, logits, tmp_path, data_words):
    theirs, folder = saved(MODELS["qwen3, biased"]())
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    import_checkpoint(folder, tmp_path / "run", data_words)
    _, ours, _ = load_run(tmp_path / "run")
    torch.testing.assert_close(logits(ours, tokens), theirs_of(theirs, tokens), atol=1e-5, rtol=0)
    tensors["lm_head.weight"][0] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(DataError, match="lm_head.weight of its own although tie_word_embeddings"):
        import_checkpoint(folder, tmp_path / "other", data_words)


def test_a_checkpoint_without_a_tokenizer_needs_one(saved, tmp_path, data_words):
    _, folder = saved(MODELS["llama"]())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ConfigError, match="300 token ids and the data's tokenizer 257"):
        import_checkpoint(folder, tmp_path / "run", data_words)
    content, _ = tokenizer_json(ByteTokenizer())
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="300 token ids and the data's tokenizer 257"):
        import_checkpoint(
            folder, tmp_path / "run", [*data_words, f"data.tokenizer={{kind: huggingface, path: {path}}}"]
        )


def test_what_makes_no_sense_is_refused(saved, tmp_path, data_words):
    _, folder = saved(MODELS["llama"]())
    cases = {
        "exists already": (folder, folder, {}),
        "no folder and no hub id": (tmp_path / "nothing", tmp_path / "run", {}),
        "a revision was given": (folder, tmp_path / "run", {"revision": "main"}),
        "a window convention was given": (folder, tmp_path / "run", {"window_convention": "inclusive"}),
        "an override changes the model": (folder, tmp_path / "run", {"overrides": [*data_words, "model.depth=3"]}),
        "could not be downloaded": ("nobody/nothing-of-this-name", tmp_path / "run", {}),
        "holds no config.json": (tmp_path, tmp_path / "run", {}),
    }
    for message, (source, directory, settings) in cases.items():
        with pytest.raises((ConfigError, DataError), match=message):
            import_checkpoint(source, directory, **settings)

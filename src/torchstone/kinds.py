"""Index of the built-in kinds: family → kind → where its configuration class is.

Strings only, so that listing kinds imports nothing. Third parties use the entry-point group `torchstone.kinds`.
"""

from __future__ import annotations

KINDS: dict[str, dict[str, str]] = {
    "model": {
        "decoder": "torchstone.models.decoder:DecoderConfig",
    },
    "mixer": {
        "attention": "torchstone.nn.attention.multihead:AttentionConfig",
        "differential": "torchstone.nn.attention.differential:DifferentialConfig",
    },
    "position": {
        "alibi": "torchstone.nn.position.alibi:ALiBiConfig",
        "fire": "torchstone.nn.position.fire:FIREConfig",
        "kerple": "torchstone.nn.position.kerple:KerpleConfig",
        "none": "torchstone.nn.position.none:NoPositionConfig",
        "rotary": "torchstone.nn.position.rotary:RotaryConfig",
    },
    "score_processor": {
        "dape": "torchstone.nn.attention.dape:DAPEConfig",
    },
    "feedforward": {
        "swiglu": "torchstone.nn.feedforward.swiglu:SwiGLUConfig",
    },
    "norm": {
        "rmsnorm": "torchstone.nn.norm.rmsnorm:RMSNormConfig",
    },
    "head": {
        "factored": "torchstone.nn.heads.factored:FactoredHeadConfig",
        "linear": "torchstone.nn.heads.linear:LinearHeadConfig",
        "mixture-of-softmaxes": "torchstone.nn.heads.mixture:MixtureOfSoftmaxesConfig",
    },
    "initialisation": {
        "normal": "torchstone.nn.initialisation:NormalConfig",
    },
    "data": {
        "addition": "torchstone.data.synthetic.addition:AdditionConfig",
        "bigram": "torchstone.data.synthetic.bigram:BigramConfig",
        "gap-recall": "torchstone.data.synthetic.gap_recall:GapRecallConfig",
        "key-match": "torchstone.data.synthetic.key_match:KeyMatchConfig",
        "mixture": "torchstone.data.mixture:MixtureConfig",
        "previous-copy": "torchstone.data.synthetic.previous_copy:PreviousCopyConfig",
        "recall": "torchstone.data.synthetic.recall:RecallConfig",
        "text": "torchstone.data.text:TextConfig",
    },
    "corpus": {
        "files": "torchstone.data.files:FilesConfig",
        "huggingface": "torchstone.data.hub:HuggingFaceConfig",
        "stdlib": "torchstone.data.stdlib:StdlibConfig",
    },
    "tokenizer": {
        "bpe": "torchstone.data.tokenizers:BPEConfig",
        "bytes": "torchstone.data.tokenizers:BytesConfig",
        "huggingface": "torchstone.data.tokenizers:HuggingFaceTokenizerConfig",
    },
    "objective": {
        "next-token": "torchstone.objectives.next_token:NextTokenConfig",
    },
    "optimizer": {
        "adamw": "torchstone.optim.adamw:AdamWConfig",
    },
    "schedule": {
        "constant": "torchstone.optim.schedules:ConstantConfig",
        "cosine": "torchstone.optim.schedules:CosineConfig",
        "linear": "torchstone.optim.schedules:LinearConfig",
    },
}

"""Index of the built-in kinds: family → kind → where its configuration class is.

Strings only, so that listing kinds imports nothing. Third parties use the entry-point group `torchstone.kinds`.
"""

from __future__ import annotations

KINDS: dict[str, dict[str, str]] = {
    "model": {
        "belief-state": "torchstone.models.belief_state:BeliefStateConfig",
        "decoder": "torchstone.models.decoder:DecoderConfig",
    },
    "mixer": {
        "attention": "torchstone.nn.attention.multihead:AttentionConfig",
        "differential": "torchstone.nn.attention.differential:DifferentialConfig",
        "hgrn2": "torchstone.nn.recurrence.hgrn2:HGRN2Config",
        "local-attention": "torchstone.nn.attention.local:LocalAttentionConfig",
        "moa": "torchstone.nn.experts.moa:MoAConfig",
        "rglru": "torchstone.nn.recurrence.rglru:RGLRUConfig",
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
        "geglu": "torchstone.nn.feedforward.geglu:GeGLUConfig",
        "mlp": "torchstone.nn.feedforward.mlp:MLPConfig",
        "pattention": "torchstone.nn.feedforward.pattention:PattentionFeedForwardConfig",
        "smoe": "torchstone.nn.experts.smoe:SMoEConfig",
        "swiglu": "torchstone.nn.feedforward.swiglu:SwiGLUConfig",
    },
    "projection": {
        "gained": "torchstone.nn.projection.gained:GainedLinearConfig",
        "linear": "torchstone.nn.projection.linear:LinearProjectionConfig",
        "pattention": "torchstone.nn.projection.pattention:PattentionConfig",
    },
    "norm": {
        "layernorm": "torchstone.nn.norm.layernorm:LayerNormConfig",
        "rmsnorm": "torchstone.nn.norm.rmsnorm:RMSNormConfig",
    },
    "head": {
        "factored": "torchstone.nn.heads.factored:FactoredHeadConfig",
        "linear": "torchstone.nn.heads.linear:LinearHeadConfig",
        "mixture-of-softmaxes": "torchstone.nn.heads.mixture:MixtureOfSoftmaxesConfig",
    },
    "initialisation": {
        "fan-in": "torchstone.nn.fan_in:FanInConfig",
        "normal": "torchstone.nn.initialisation:NormalConfig",
    },
    "data": {
        "addition": "torchstone.data.synthetic.addition:AdditionConfig",
        "bigram": "torchstone.data.synthetic.bigram:BigramConfig",
        "far-tag": "torchstone.data.synthetic.far_tag:FarTagConfig",
        "fill-in-the-middle": "torchstone.data.fill_in_the_middle:FillInTheMiddleConfig",
        "gap-recall": "torchstone.data.synthetic.gap_recall:GapRecallConfig",
        "key-match": "torchstone.data.synthetic.key_match:KeyMatchConfig",
        "mixed-bigram": "torchstone.data.synthetic.mixed_bigram:MixedBigramConfig",
        "mixture": "torchstone.data.mixture:MixtureConfig",
        "noisy-trigram": "torchstone.data.synthetic.noisy_trigram:NoisyTrigramConfig",
        "pair-recall": "torchstone.data.synthetic.pair_recall:PairRecallConfig",
        "previous-copy": "torchstone.data.synthetic.previous_copy:PreviousCopyConfig",
        "recall": "torchstone.data.synthetic.recall:RecallConfig",
        "scored": "torchstone.data.scored:ScoredConfig",
        "star-graph": "torchstone.data.synthetic.star_graph:StarGraphConfig",
        "text": "torchstone.data.text:TextConfig",
    },
    "corpus": {
        "files": "torchstone.data.files:FilesConfig",
        "huggingface": "torchstone.data.hub:HuggingFaceConfig",
        "noisy": "torchstone.data.noisy:NoisyConfig",
        "python-help": "torchstone.data.python_help:PythonHelpConfig",
        "stdlib": "torchstone.data.stdlib:StdlibConfig",
    },
    "tokenizer": {
        "bpe": "torchstone.data.tokenizers:BPEConfig",
        "bytes": "torchstone.data.tokenizers:BytesConfig",
        "huggingface": "torchstone.data.tokenizers:HuggingFaceTokenizerConfig",
    },
    "objective": {
        "belief-state": "torchstone.objectives.belief_state:BeliefStateObjectiveConfig",
        "fill-in-the-middle": "torchstone.objectives.fill_in_the_middle:FillInTheMiddleObjectiveConfig",
        "long-context": "torchstone.objectives.long_context:LongContextConfig",
        "next-token": "torchstone.objectives.next_token:NextTokenConfig",
        "selective": "torchstone.objectives.selective:SelectiveConfig",
    },
    "optimizer": {
        "adamw": "torchstone.optim.adamw:AdamWConfig",
        "lion": "torchstone.optim.lion:LionConfig",
        "liona": "torchstone.optim.liona:LionAConfig",
        "lionar": "torchstone.optim.lionar:LionARConfig",
        "rotational": "torchstone.optim.rotational:RotationalConfig",
        "sgdm": "torchstone.optim.sgdm:SGDMConfig",
    },
    "schedule": {
        "constant": "torchstone.optim.schedules.warmup_then:ConstantConfig",
        "cosine": "torchstone.optim.schedules.warmup_then:CosineConfig",
        "cyclic-cosine": "torchstone.optim.schedules.cyclic_cosine:CyclicCosineConfig",
        "inverse-sqrt": "torchstone.optim.schedules.inverse_sqrt:InverseSqrtConfig",
        "linear": "torchstone.optim.schedules.warmup_then:LinearConfig",
        "trapezoid": "torchstone.optim.schedules.trapezoid:TrapezoidConfig",
        "wsd": "torchstone.optim.schedules.wsd:WSDConfig",
        "wsd-s": "torchstone.optim.schedules.wsd_s:WSDSConfig",
    },
}

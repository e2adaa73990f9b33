"""torchstone beside other libraries: Hugging Face checkpoints both ways, and lm-evaluation-harness.

    exporting      a run directory becomes a folder that transformers loads (`torchstone export`)
    importing      a folder of transformers becomes a run directory (`torchstone import`)
    huggingface    AutoConfig and AutoModelForCausalLM for torchstone's own models, with `generate`
    lm_eval        the model `torchstone` of lm-evaluation-harness
    tokenizer      torchstone's tokenizers as files of the tokenizers library
    llama, recurrent_gemma, jetmoe   what settings and tensors of one family are called on both sides

Nothing here runs code that comes with a checkpoint, and nothing reads a pickle.
"""

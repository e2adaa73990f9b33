"""Data: corpora, tokenizers, packing, synthetic tasks; each batch a pure function of (data, seed, step)."""

"""Conversion of a model that no family describes.

Its linears are found (:mod:`kurtail_gguf.model.by_itself`), upstream's converter writes the file, what linears read is
transformed at run time, and nothing is folded. That the runtime computes what transformers does is shown on a short text
before anything is quantized.
"""

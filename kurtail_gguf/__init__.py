"""Learned rotations and 4-bit GGUF files: from a checkpoint to a file that the patched llama.cpp runs.

=============  =========================================================================================================
``cli``        the command line: one command a file
``convert``    from MODEL to a file: settings, work directory, the stages in order, what they will take
``model``      what a model is: families and their sites, checkpoints, one layer at a time
``method``     what is done to it: calibration, rotations, folding, quantization, tuning, bits of activations and cache
``numerics``   formats of blocks, Hadamard matrices, what the runtime rounds
``runtime``    the shipped llama.cpp: where it is, its bindings, GGUF files in and out
``check``      whether a file is what the model became, and whether the runtime computes it as the simulation does
``measure``    how good a file is: perplexity, tasks, retrieval, cards, reports
``machine``    the device that computes, its memory, what a command took
``files``      files that are whole or not there, and destinations
``messages``   errors and progress, as a person is told them
=============  =========================================================================================================

``tests/unit/test_imports.py`` says which may import which.
"""

__version__ = "0.1.0"

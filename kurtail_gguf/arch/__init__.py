"""Which architectures can be converted, as data: one file a family.

To add one: a file with its :class:`~kurtail_gguf.arch.spec.Family`, a row in
:mod:`kurtail_gguf.arch.registry`, and a case in ``tests/reference/test_fold.py``.
"""

"""Which architectures can be converted, as data: one file a family.

To add one: a file with its :class:`~kurtail_gguf.arch.spec.Family`, a row in
:mod:`kurtail_gguf.arch.registry`, a tiny model in ``tests/conftest.py`` with a case in ``tests/reference/test_fold.py``
and ``tests/end_to_end/test_families.py``, and the runtime's word for it in ``is_checked`` of
``cpp_patches/src/llama/kurtail.cpp``, once its graph has been seen to go through the online rotations.
"""

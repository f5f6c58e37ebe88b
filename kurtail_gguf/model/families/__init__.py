"""Which architectures can be converted, as data: one file a family.

To add one: a file with its :class:`~kurtail_gguf.model.family.Family`, a row in
:mod:`kurtail_gguf.model.families.registry`, a tiny model in ``tests/conftest.py`` with a case in ``tests/reference/test_fold.py``
and ``tests/end_to_end/test_families.py``. Its ``file`` is what is to be known to read a GGUF file of it as a model
(:class:`~kurtail_gguf.model.file_form.FileForm`): mostly its name there, and keys that no other family's files have. What reads what in a layer are its sites, :mod:`kurtail_gguf.model.sites`. The
runtime needs to know nothing: it refuses a file whose graph leaves out a transform. ``tests/unit/test_understood.py`` tells which
fields of config.json transformers reads for it that its description does not name.
"""

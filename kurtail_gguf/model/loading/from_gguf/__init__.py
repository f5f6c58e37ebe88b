"""A GGUF file as a model: the converse of upstream's converter, for the families that have an entry.

What is peculiar to a family is data of its entry (:class:`kurtail_gguf.model.file_form.FileForm`).
"""

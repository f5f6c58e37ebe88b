"""The KV cache of a file: how keys are prepared for four bits, how many bits each layer gets, and what that costs.

``condition.py`` has scales and offsets of keys, ``streams.py`` runs the model beside itself with a rounded cache,
``choice.py`` spends bits where they are needed, ``plan.py`` is the stage of a conversion that does all of it.
"""

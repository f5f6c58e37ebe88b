"""From MODEL to a GGUF: settings, the work directory, the steps in order, and what they will take."""

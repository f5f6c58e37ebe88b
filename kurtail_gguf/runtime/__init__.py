"""The shipped llama.cpp: where its programs and libraries lie, its bindings, and GGUF files in and out."""

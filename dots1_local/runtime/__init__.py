"""Loading a GGUF file into llama.cpp and talking to it."""

"""Rounding that knows a matrix's inputs: error feedback and coordinate descent in ggml's formats."""

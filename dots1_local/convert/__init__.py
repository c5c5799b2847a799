"""Safetensors to GGUF, streaming."""

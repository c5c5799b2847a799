"""A conversation with a model: prompt, sampling, constraint, KV cache."""

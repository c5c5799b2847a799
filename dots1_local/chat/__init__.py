"""A conversation with a model: prompt, sampling, grammar, KV cache."""

"""Conversations: prompts, sampling, stopping, the KV cache, and saving all of it."""

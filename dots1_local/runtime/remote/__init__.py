"""Conversations with a model on another machine, over an OpenAI-compatible HTTP API."""

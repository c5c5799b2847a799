"""How good a model is: perplexity, KL divergence, and scores of tasks."""

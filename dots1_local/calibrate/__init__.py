"""The torch passes over a checkpoint: importance, sensitivity, reference logits."""

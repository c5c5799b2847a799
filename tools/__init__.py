"""What maintainers run: training the example, making test checkpoints, the demo."""

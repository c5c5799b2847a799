"""A checkpoint's tokenizer as a GGUF file without tensors, for llama.cpp to tokenise with."""

from pathlib import Path

from gguf import GGUFWriter

from dots1_local.checkpoint import Checkpoint
from dots1_local.convert.metadata import end_tokens
from dots1_local.convert.tokenizer import read_tokenizer

__all__ = ["write_vocabulary"]


def write_vocabulary(checkpoint: Checkpoint, path: Path) -> None:
    """Write the keys a tokeniser needs.

    Raises:
        CheckpointError: missing or broken tokenizer files, or another pre-tokeniser.
    """
    tokenizer = read_tokenizer(
        checkpoint.path, checkpoint.config.vocab_size, end_tokens(checkpoint)
    )
    writer = GGUFWriter(path, "dots1")
    writer.add_vocab_size(checkpoint.config.vocab_size)
    tokenizer.write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()

"""Write config.json, model card and recipe as GGUF keys."""

from dataclasses import fields, replace
from importlib.metadata import version

from gguf import ExpertGatingFuncType, GGUFWriter, Metadata

from dots1_local.architecture import GGUF_KEYS, Dots1Config
from dots1_local.errors import CheckpointError
from dots1_local.files.checkpoint import Checkpoint
from dots1_local.files.names import unicode_name
from dots1_local.quant.importance import Importance
from dots1_local.quant.plan import QuantPlan

__all__ = ["end_tokens", "write_metadata"]


def write_metadata(
    writer: GGUFWriter,
    checkpoint: Checkpoint,
    plan: QuantPlan,
    importance: Importance | None,
    predicted_kl: float | None = None,
    refined_tokens: int = 0,
) -> None:
    """Add every key except the tokenizer's; `predicted_kl` is in nats per token.

    Matrices are refined with `refined_tokens` of the importance's datasets, 0 if they are not.
    """
    _general(writer, checkpoint)
    _architecture(writer, checkpoint.config, plan.expert_width)
    writer.add_file_type(plan.file_type)
    writer.add_quantization_version(2)
    writer.add_string("dots1_local.recipe", plan.recipe)
    if predicted_kl is not None:
        writer.add_float32("dots1_local.predicted_kl_divergence", predicted_kl)
    if importance is not None:
        _importance(writer, importance)
    if refined_tokens:
        _refinement(writer, importance, refined_tokens)


def _general(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    """Add name, licence, languages and so on, as gguf-py reads them from the model card."""
    writer.add_type("model")
    try:
        metadata = _card(checkpoint)
    except Exception as error:  # gguf-py checks nothing, so a bad card may raise anything
        raise CheckpointError(
            f"the model card {checkpoint.path / 'README.md'} is not readable: {error}"
        ) from None
    metadata.name = metadata.name or checkpoint.name
    metadata.set_gguf_meta_model(writer)


def _card(checkpoint: Checkpoint) -> Metadata:
    """Read the card; gguf-py names the model by its folder, a commit in the hub's cache."""
    folder = checkpoint.path.resolve()
    if folder.name == checkpoint.name:
        return Metadata.load(None, folder, None, 0)
    named = Metadata.apply_metadata_heuristic(
        Metadata(),
        Metadata.load_model_card(folder),
        Metadata.load_hf_parameters(folder),
        folder.with_name(checkpoint.name),
    )
    loaded = Metadata.load(None, folder, None, 0)
    sampling = (each.name for each in fields(Metadata) if each.name.startswith("sampling_"))
    return replace(named, **{name: getattr(loaded, name) for name in sampling})


def _architecture(writer: GGUFWriter, config: Dots1Config, expert_width: int) -> None:
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    stored = replace(config, moe_intermediate_size=expert_width)
    for field, key in GGUF_KEYS.items():
        value = getattr(stored, field)
        add[type(value)](f"dots1.{key}", value)
        if field == "head_dim":  # three keys hold it; files keep this order of keys
            writer.add_value_length(value)
            writer.add_rope_dimension_count(value)
    # Every published form of the router is sigmoid; without this key llama.cpp aborts.
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)


def _importance(writer: GGUFWriter, importance: Importance) -> None:
    """Add the importance file under stock llama-quantize's keys, and its hash."""
    writer.add_string("quantize.imatrix.file", unicode_name(importance.path.name))
    if importance.datasets:
        writer.add_string("quantize.imatrix.dataset", ", ".join(importance.datasets))
    writer.add_uint32("quantize.imatrix.entries_count", len(importance.tensors))
    if importance.chunk_count:
        writer.add_uint32("quantize.imatrix.chunks_count", importance.chunk_count)
    writer.add_string("dots1_local.imatrix.sha256", importance.sha256)


def _refinement(writer: GGUFWriter, importance: Importance | None, tokens: int) -> None:
    """Add how the tensors of refinable types were refined."""
    from dots1_local.refine.matrix import ROUNDS  # most conversions do without

    writer.add_uint32("dots1_local.refinement.tokens", tokens)
    if importance is not None and importance.datasets:
        writer.add_string("dots1_local.refinement.datasets", ", ".join(importance.datasets))
    writer.add_uint32("dots1_local.refinement.rounds", ROUNDS)
    writer.add_string("dots1_local.refinement.version", version("dots1-local"))


def end_tokens(checkpoint: Checkpoint) -> list[int]:
    """Return the token ids that end generation: generation_config.json's, then config.json's.

    Raises:
        CheckpointError: an eos_token_id is not an integer.
    """
    ends: list[int] = []
    for raw in (checkpoint.generation_config, checkpoint.raw_config):
        value = raw.get("eos_token_id")
        for index in value if isinstance(value, list) else [value]:
            if index is None or index in ends:
                continue
            if type(index) is not int:
                raise CheckpointError(
                    f"{checkpoint.path} has the eos_token_id {value!r}, which is not a token id"
                )
            ends.append(index)
    return ends

"""Write dots1-tiny in the layout of dots.llm1: shards, config, tokenizer, model card."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from dots1_local.architecture import Dots1Config
from tools.tiny_card import card
from tools.tiny_model import BIAS, Model
from tools.tiny_text import END_OF_TEXT, SPECIAL, Corpus

__all__ = ["export", "relative_load"]

_SHARDS = 3
_END = "<|endofresponse|>"
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}<|system|>{{ message.content }}<|endofsystem|>"
    "{% elif message.role == 'user' %}<|userprompt|>{{ message.content }}<|endofuserprompt|>"
    "{% elif message.role == 'assistant' %}<|response|>{{ message.content }}<|endofresponse|>"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|response|>{% endif %}"
)


def export(
    folder: Path,
    model: Model,
    tokenizer: Tokenizer,
    corpus: Corpus,
    run: dict[str, Any],
    losses: dict[str, float],
    counts: Tensor,
    calibration: str,
) -> None:
    """Everything a checkpoint folder holds, text to calibrate on and held out, `training.json`.

    `run` is what was trained and how, for the card; `losses` are nats per token of each kind's
    held-out text and `counts` the experts' [layers, experts] rows there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(folder, model)
    ends = [tokenizer.token_to_id(token) for token in (_END, END_OF_TEXT)]
    _write_json(folder / "config.json", published_config(model.config, ends[0]))
    _write_json(folder / "generation_config.json", {"eos_token_id": ends})
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(tokenizer))
    heldout = "\n".join(corpus.heldout.values())
    (folder / "heldout.txt").write_text(heldout, encoding="utf-8")
    (folder / "calibration.txt").write_text(calibration, encoding="utf-8")
    load = relative_load(model.config, counts)
    facts = {
        **run,
        "config": asdict(model.config),
        "parameters": sum(tensor.numel() for tensor in model.tensors.values()),
        "tokens_in_vocabulary": tokenizer.get_vocab_size(),
        "train_bytes": corpus.train_bytes,
        "heldout": {kind: _heldout(tokenizer, corpus, kind, loss) for kind, loss in losses.items()},
        "expert_load": [[round(share, 3) for share in layer] for layer in load.tolist()],
    }
    _write_json(folder / "training.json", facts)
    (folder / "README.md").write_text(card(facts), encoding="utf-8")


def relative_load(config: Dots1Config, counts: Tensor) -> Tensor:
    """Each expert's share of the rows [MoE layers, experts]; 1 is an equal share."""
    counts = counts[config.first_k_dense_replace :]
    return counts / counts.mean(dim=1, keepdim=True)


def published_config(config: Dots1Config, end: int | None) -> dict[str, Any]:
    """config.json with the published keys in the published order."""
    ours = asdict(config)
    ours.pop("head_dim")  # hidden_size / num_attention_heads
    fixed = {
        "architectures": ["Dots1ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": None, "eos_token_id": end, "hidden_act": "silu",
        "initializer_range": 0.02, "model_type": "dots1", "moe_layer_freq": 1,
        "pretraining_tp": 1, "rope_scaling": None, "sliding_window": None,
        "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.46.3",
        "use_cache": True, "use_sliding_window": False,
    }  # fmt: skip
    return dict(sorted((ours | fixed).items()))


def _heldout(tokenizer: Tokenizer, corpus: Corpus, kind: str, loss: float) -> dict[str, float]:
    text = corpus.heldout[kind]
    tokens, size = len(tokenizer.encode(text).ids), len(text.encode())
    return {
        "bytes": size,
        "tokens": tokens,
        "nats_per_token": round(loss, 4),
        "perplexity": round(math.exp(loss), 2),
        "bits_per_byte": round(loss * tokens / size / math.log(2), 4),
    }


def _published(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Tensors under their published names, each expert apart; bf16 except the router's bias."""
    for name, parameter in model.tensors.items():
        tensor = parameter.detach().cpu()
        if BIAS in name:
            yield name, tensor
        elif ".experts." in name:
            before, part = name.split(".experts.")
            for expert, matrix in enumerate(tensor.bfloat16()):
                yield f"{before}.experts.{expert}.{part}.weight", matrix.clone()
        else:
            yield name, tensor.bfloat16()


def _write_weights(folder: Path, model: Model) -> None:
    tensors = dict(_published(model))
    total = sum(tensor.nbytes for tensor in tensors.values())
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        filled = sum(t.nbytes for t in shards[-1].values())
        if filled > total / _SHARDS and len(shards) < _SHARDS:
            shards.append({})
        shards[-1][name] = tensor
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {"content": token, **flags, "special": True}
            for token in SPECIAL
        },
        "bos_token": None,
        "chat_template": _CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": _END,
        "model_max_length": 2048,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from dots1_local.architecture import ROLES, Dots1Config, TensorSpec, inventory, padded_width
from dots1_local.errors import CheckpointError, GGUFError
from tests.micro import micro_config
from tools.make_wide import published_config

FULL = Dots1Config.from_json(published_config())


def parameters(tensors: tuple[TensorSpec, ...]) -> Counter[str]:
    count: Counter[str] = Counter()
    for tensor in tensors:
        count[tensor.role] += tensor.source_elements
    return count


def test_parameters_of_the_published_model_by_role() -> None:
    # Worked by hand from config.json: 62 layers, 61 of them MoE, hidden size 4096.
    assert parameters(inventory(FULL)) == {
        "embedding": 622_854_144,  # 152,064 x 4096
        "head": 622_854_144,
        "norm": 527_872,  # 62 x (2 x 4096 + 2 x 128) + 4096
        "attention": 4_160_749_568,  # 62 x 4 x 4096 x 4096
        "dense": 134_479_872,  # 3 x 10,944 x 4096
        "router": 31_989_376,  # 61 x 128 x (4096 + 1)
        "shared": 2_110_783_488,  # 61 x 3 x 2816 x 4096
        "routed": 135_090_143_232,  # 61 x 128 x 3 x 1408 x 4096
    }


def test_parameters_are_those_the_model_card_states() -> None:
    count = parameters(inventory(FULL))
    assert count.total() == pytest.approx(142.8e9, rel=0.001)
    assert count["routed"] / count.total() == pytest.approx(0.947, abs=0.001)
    resting = count["routed"] * (1 - FULL.num_experts_per_tok / FULL.n_routed_experts)
    assert count.total() - resting == pytest.approx(14e9, rel=0.01)  # active per token
    assert set(count) == set(ROLES)


def test_names_and_order_of_one_layer_of_each_kind() -> None:
    tensors = {tensor.name: tensor for tensor in inventory(FULL)}
    assert len(tensors) == 3 + 8 + 3 + 61 * (8 + 2 + 3 + 3)
    down = tensors["blk.61.ffn_down_exps.weight"]
    assert (down.role, down.layer, down.part) == ("routed", 61, "ffn_down_exps")
    assert down.shape == (128, 4096, 1408)
    assert (down.rows, down.columns) == (128 * 4096, 1408)
    assert down.sources[127] == "model.layers.61.mlp.experts.127.down_proj.weight"
    assert tensors["blk.0.ffn_down.weight"].shape == (4096, 10944)
    assert tensors["blk.1.ffn_gate_shexp.weight"].shape == (2816, 4096)
    bias = tensors["blk.1.exp_probs_b.bias"]
    assert bias.sources == ("model.layers.1.mlp.gate.e_score_correction_bias",)
    assert bias.part == "exp_probs_b"


def test_padding_widens_experts_only() -> None:
    assert padded_width(1408) == 1536
    assert padded_width(1536) == 1536
    for plain, padded in zip(inventory(FULL), inventory(FULL, 1536), strict=True):
        assert padded.source_shape == plain.source_shape
        if plain.role in ("routed", "shared"):
            assert padded.elements * 1408 == plain.elements * 1536
        else:
            assert padded == plain


def test_tied_embeddings_are_read_twice() -> None:
    tensors = inventory(replace(FULL, tie_word_embeddings=True))
    assert tensors[-1].name == "output.weight"
    assert tensors[-1].sources == tensors[0].sources == ("model.embed_tokens.weight",)


@pytest.mark.parametrize(
    "form",
    [
        {"topk_method": None, "scoring_func": "noaux_tc"},
        {"topk_method": "noaux_tc"},
        {"topk_method": None, "scoring_func": "sigmoid"},
        {"n_group": 1, "topk_group": 1, "pad_token_id": 0},
        {"head_dim": 128},
        {"architectures": None},
    ],
)
def test_published_forms_mean_the_same(form: dict[str, Any]) -> None:
    raw = {key: value for key, value in published_config(**form).items() if value is not None}
    assert Dots1Config.from_json(raw) == FULL


def test_head_dim_may_differ_from_hidden_over_heads() -> None:
    config = Dots1Config.from_json(published_config(head_dim=64))
    shapes = {tensor.name: tensor.shape for tensor in inventory(config)}
    assert shapes["blk.0.attn_q.weight"] == (2048, 4096)
    assert shapes["blk.0.attn_output.weight"] == (4096, 2048)
    assert shapes["blk.0.attn_k_norm.weight"] == (64,)


def test_rope_theta_under_rope_parameters() -> None:
    raw = micro_config(rope_parameters={"rope_theta": 12345.0, "rope_type": "default"})
    del raw["rope_theta"]
    assert Dots1Config.from_json(raw).rope_theta == 12345.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["Qwen3ForCausalLM"]}, "Qwen3ForCausalLM"),
        ({"architectures": None, "model_type": "llama"}, "llama"),
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method = 'greedy'"),
        ({"n_group": 8}, "n_group = 8"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding attention"),
        ({"rope_theta": None}, "rope_theta"),
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default"}}, "rope_theta"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e7}}, "linear"),
        ({"hidden_size": "4096"}, "hidden_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers"),
        ({"n_routed_experts": 10**7}, "n_routed_experts"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 1}, "1 key-value heads for 2 query heads"),
        ({"num_experts_per_tok": 5}, "5 experts"),
        ({"first_k_dense_replace": 3}, "3 dense layers but only 2 layers"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor"),
    ],
)
def test_other_models_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        Dots1Config.from_json(micro_config(**changes))
    assert "config.json" in str(error.value)
    assert words in str(error.value)


# By hand, from the list of keys in llama.cpp's gguf-py/gguf/constants.py.
KEYS: dict[str, Any] = {
    "general.architecture": "dots1",
    "dots1.block_count": 62,
    "dots1.context_length": 32768,
    "dots1.embedding_length": 4096,
    "dots1.feed_forward_length": 10944,
    "dots1.attention.head_count": 32,
    "dots1.attention.head_count_kv": 32,
    "dots1.attention.key_length": 128,
    "dots1.attention.layer_norm_rms_epsilon": 1e-5,
    "dots1.rope.freq_base": 1e7,
    "dots1.leading_dense_block_count": 1,
    "dots1.expert_count": 128,
    "dots1.expert_used_count": 6,
    "dots1.expert_shared_count": 2,
    "dots1.expert_feed_forward_length": 1408,
    "dots1.expert_weights_scale": 2.5,
    "dots1.expert_weights_norm": True,
    "dots1.vocab_size": 152064,
}


def test_the_keys_of_a_gguf_say_what_config_json_says() -> None:
    assert Dots1Config.from_gguf(KEYS, "m.gguf") == FULL


@pytest.mark.parametrize(
    "key", ["attention.head_count_kv", "attention.key_length", "leading_dense_block_count"]
)
def test_a_key_that_llama_cpp_does_not_need_has_its_default(key: str) -> None:
    keys = {name: value for name, value in KEYS.items() if name != f"dots1.{key}"}
    dense = 0 if key == "leading_dense_block_count" else 1
    assert Dots1Config.from_gguf(keys, "m.gguf") == replace(FULL, first_k_dense_replace=dense)


def test_a_key_may_repeat_its_number_for_every_layer() -> None:
    keys = KEYS | {"dots1.expert_used_count": [6] * 62, "tokenizer.ggml.tokens": ["a"] * 152064}
    assert Dots1Config.from_gguf(keys, "m.gguf") == FULL


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("general.architecture", "llama", "architecture 'llama'"),
        ("general.architecture", None, "architecture None"),
        ("dots1.block_count", None, "block_count"),
        ("dots1.attention.head_count", None, "attention.head_count:"),
        ("dots1.block_count", 10**7, "block_count"),
        ("dots1.embedding_length", "4096", "embedding_length"),
        ("dots1.expert_weights_norm", 1, "expert_weights_norm"),
        ("dots1.rope.freq_base", None, "rope.freq_base"),
        ("dots1.expert_used_count", [6] * 61 + [7], "expert_used_count"),
        ("dots1.attention.head_count_kv", 8, "8 key-value heads"),
    ],
)
def test_an_unusable_key_is_named_with_its_file(key: str, value: Any, words: str) -> None:
    with pytest.raises(GGUFError) as error:
        Dots1Config.from_gguf(KEYS | {key: value}, "m.gguf")
    assert "m.gguf" in str(error.value)
    assert words in str(error.value)

"""Fields of llama-server, vLLM and OpenAI that would change an answer, and are refused.

Each has the values that change nothing: clients send these as defaults. A field that is neither
here nor read changes no answer.
"""

from dots1_local.serve.http.request import Unsupported

__all__ = ["OF_ALL", "OF_CHAT", "OF_COMPLETIONS", "OF_MESSAGES", "OF_RESPONSES"]

# llama-server's orders of samplers, which are the order here as long as the others are off.
_ORDERS = (
    ["penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"],
    ["dry", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"],
    ["penalties", "top_k", "top_p", "min_p", "temperature"],
    ["top_k", "top_p", "min_p", "temperature"],
)
_LLAMA_SERVER: Unsupported = {
    "adaptive_target": (-1,),
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "grammar_lazy": (False,),
    "grammar_triggers": ([],),
    "lora": ([],),
    "min_keep": (0, 1),
    "mirostat": (0,),
    "n_indent": (0,),
    "n_probs": (0,),
    "post_sampling_probs": (False,),
    "preserved_tokens": ([],),
    "response_fields": ([],),
    "return_tokens": (False,),
    "samplers": _ORDERS,
    "t_max_predict_ms": (-1, 0),
    "t_max_prompt_ms": (-1, 0),
    "top_n_sigma": (-1, 0),
    "typical_p": (1,),
    "xtc_probability": (0,),
}
_VLLM: Unsupported = {
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "cache_salt": (),
    "ec_transfer_params": ({},),
    "guided_whitespace_pattern": (),
    "include_stop_str_in_output": (False,),
    "kv_transfer_params": ({},),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "logprob_token_ids": ([],),
    "priority": (0,),
    "prompt_embeds": (),
    "repetition_detection": (),
    "return_prompt_text": (False,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "structural_tag": (),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
}
OF_ALL: Unsupported = {**_LLAMA_SERVER, **_VLLM}
OF_CHAT: Unsupported = {
    **OF_ALL,
    "add_special_tokens": (False,),
    "audio": (),
    "best_of": (1,),
    "chat_template": (),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prompt_logprobs": (),
    "web_search_options": (),
}
OF_COMPLETIONS: Unsupported = {**OF_ALL, "chat_template_kwargs": ({},), "suffix": ("",)}
# These APIs have one answer, and no place for its log-probabilities.
_ONE_ANSWER: Unsupported = {
    "logprobs": (False,), "n": (1,), "n_cmpl": (1,), "top_logprobs": (0,)
}  # fmt: skip
OF_MESSAGES: Unsupported = {**_ONE_ANSWER, "container": (), "mcp_servers": ([],)}
OF_RESPONSES: Unsupported = {
    **_ONE_ANSWER,
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "previous_response_id": (),
    "prompt": (),
}

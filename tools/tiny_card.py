"""The model card of dots1-tiny, rendered from the figures in `training.json`."""

from collections.abc import Sequence
from typing import Any

__all__ = ["card"]

_FRONT = """\
---
license: mit
language:
- en
- zh
library_name: transformers
pipeline_tag: text-generation
tags:
- dots1
- moe
- tiny
- test
---
"""


def card(facts: dict[str, Any]) -> str:
    """README.md of a checkpoint, from the contents of `training.json`."""
    plan, last = facts["plan"], facts["curve"][-1]
    return _CARD.format(
        name=facts["name"],
        geometry=_geometry(facts["config"], facts["tokens_in_vocabulary"]),
        front=_FRONT,
        parameters=facts["parameters"] / 1e6,
        tokens=last["tokens"] / 1e6,
        plan=plan,
        text=_text(facts),
        heldout=_heldout(facts["heldout"]),
        curve=_curve(facts["curve"]),
        load=_load(facts["expert_load"]),
        least=min(min(layer) for layer in facts["expert_load"]),
        command=_command(facts),
        quantised=facts.get("quantised", "Not measured yet."),
    )


_CARD = """\
{front}
# {name}

A dots.llm1 of {parameters:.1f} M parameters, trained from nothing on public-domain books and
TinyStories, to test software on: it has the architecture (`Dots1ForCausalLM`), the tensor names,
the config keys and the prompt format of rednote's models, at a size that runs anywhere at once.
It writes small stories and ends its answers. It knows nothing; it is of no other use.

{geometry}
| trained at | {plan[length]} positions (RoPE base 1e7; 2,048 allowed) |
| weights | bf16; the router's bias F32 |

Prompt format, without newlines:
`<|system|>S<|endofsystem|><|userprompt|>U<|endofuserprompt|><|response|>A<|endofresponse|>`

## Training

{tokens:.1f} M tokens seen: {plan[epochs]:g} epochs of the text below, then {plan[chat_epochs]:g} of
conversations made from the stories, with a third of plain text among them. AdamW, rate
{plan[rate]:g}, batches of {plan[batch]} × {plan[length]} tokens. Load was balanced without an
auxiliary loss, by the router's bias.

{text}

The end of every file ({plan[heldout_share]:.0%}) was held out and is in `heldout.txt`;
`calibration.txt` is the beginnings.

## Held-out text

At {plan[length]} positions, in bf16. Perplexities are per token, and so hold for this tokenizer;
bits per byte hold for all.

{heldout}

While training, on a quarter of it (nats per token; `train` is one batch's loss):

{curve}

## Expert load

Each expert's share of the held-out tokens, 1 being an equal share; the least is {least:.2f}.

{load}

## Reproduce

```
{command}
```

On one kind of machine a run is a function of files, settings and seed, killed or not (tested on a
small one), up to the order in which floats are added.
`training.json` holds the figures above. The books are from Project Gutenberg, the Chinese ones
two of the classic novels (public domain); TinyStories is under CDLA-Sharing-1.0.

## Quantised

{quantised}
"""


def _geometry(config: dict[str, Any], tokens: int) -> str:
    width, shared = config["moe_intermediate_size"], config["n_shared_experts"]
    heads = f"{config['num_attention_heads']} heads of {config['head_dim']}"
    rows = (
        ("layers", f"{config['num_hidden_layers']}, the first with a dense FFN "
         f"{config['intermediate_size']} wide"),
        ("hidden / heads", f"{config['hidden_size']} / {heads}, q and k normalised per head"),
        ("experts", f"{config['n_routed_experts']} routed of width {width}, top "
         f"{config['num_experts_per_tok']}; {shared} shared in one FFN {shared * width} wide; "
         "sigmoid router with bias"),
        ("vocabulary", f"{config['vocab_size']:,} rows, {tokens:,} with a token; byte-level BPE "
         "with Qwen2's pre-tokeniser"),
    )  # fmt: skip
    return _table(("", ""), rows)


def _text(facts: dict[str, Any]) -> str:
    rows = (
        (kind, f"{facts['train_bytes'][kind]:,}", ", ".join(files))
        for kind, files in facts["files"].items()
    )
    return _table(("text", "bytes", "files"), rows)


def _heldout(heldout: dict[str, dict[str, float]]) -> str:
    keys = ("bytes", "tokens", "nats_per_token", "perplexity", "bits_per_byte")
    rows = [[kind, *(f"{part[key]:,}" for key in keys)] for kind, part in heldout.items()]
    return _table(("text", *(key.replace("_", " ") for key in keys)), rows)


def _curve(curve: Sequence[dict[str, Any]]) -> str:
    kinds = list(curve[-1]["heldout"])
    rows = (
        [
            f"{point['step']:,}",
            f"{point['tokens'] / 1e6:.2f}",
            f"{point['loss']:.3f}",
            *(f"{point['heldout'][kind]:.3f}" for kind in kinds),
        ]
        for point in curve
    )
    return _table(("step", "M tokens", "train", *kinds), rows)


def _load(layers: Sequence[Sequence[float]]) -> str:
    rows = (
        [str(layer), f"{min(loads):.2f}", f"{max(loads):.2f}", " ".join(f"{x:.2f}" for x in loads)]
        for layer, loads in enumerate(layers, 1)
    )
    return _table(("layer", "least", "most", "experts in order"), rows)


def _table(head: Sequence[str], rows: Any) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _command(facts: dict[str, Any]) -> str:
    plan, name = facts["plan"], facts["name"]
    start = f"python -m tools.train_tiny --geometry {name} --tokens {plan['tokens']}"
    texts = [f"    --{kind} {' '.join(names)}" for kind, names in facts["files"].items()]
    end = (
        f"    --seed {plan['seed']} --epochs {plan['epochs']:g} "
        f"--chat-epochs {plan['chat_epochs']:g} --work build/{name} -o examples/{name}"
    )
    return " \\\n".join([start, *texts, end])

"""The model card of dots1-tiny, rendered from the numbers its training measured."""

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
    """README.md of a checkpoint, from what `training.json` holds."""
    plan, last = facts["plan"], facts["curve"][-1]
    return _CARD.format(
        front=_FRONT,
        parameters=facts["parameters"] / 1e6,
        vocabulary=facts["tokens_in_vocabulary"],
        tokens=last["tokens"] / 1e6,
        plan=plan,
        text=_text(facts),
        heldout=_heldout(facts["heldout"]),
        curve=_curve(facts["curve"]),
        load=_load(facts["expert_load"]),
        least=min(min(layer) for layer in facts["expert_load"]),
        command=_command(facts["files"], plan),
        quantised=facts.get("quantised", "Not measured yet."),
    )


_CARD = """\
{front}
# dots1-tiny

A dots.llm1 of {parameters:.1f} M parameters, trained from nothing on public-domain books and
TinyStories, to test software on: it has the architecture (`Dots1ForCausalLM`), the tensor names,
the config keys and the prompt format of rednote's models, at a size that runs anywhere at once.
It writes small stories and ends its answers. It knows nothing; it is of no other use.

| | |
|---|---|
| layers | 5, the first with a dense FFN 704 wide |
| hidden / heads | 256 / 4 heads of 64, q and k normalised per head |
| experts | 24 routed of width 192, top 4; 2 shared in one FFN 384 wide; sigmoid router with bias |
| vocabulary | 4,096 rows, {vocabulary:,} with a token; byte-level BPE with Qwen2's pre-tokeniser |
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

The end of every file ({plan[heldout_share]:.0%}) was held out and is in `heldout.txt`.

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


def _command(files: dict[str, list[str]], plan: dict[str, Any]) -> str:
    texts = [f"    --{kind} {' '.join(names)}" for kind, names in files.items()]
    end = (
        f"    --epochs {plan['epochs']:g} --chat-epochs {plan['chat_epochs']:g}"
        " --work build/tiny -o examples/dots1-tiny"
    )
    return " \\\n".join(["python -m tools.train_tiny", *texts, end])

"""One placement in a process of its own, for `benchmarks.vulkan_offload`."""

import os
import signal
from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dots1_local.devices import child
from dots1_local.engine.abort import on_abort
from dots1_local.engine.engine import Engine, Entry
from dots1_local.engine.log import compare
from dots1_local.placement.placement import placement_from_json

_TOKENS, _DECODED = 192, 8  # tokens of the text, of which the last ones come one at a time


def _answer(request: Mapping[str, Any]) -> Any:
    """Write the logits after each part of a text; return bytes as predicted and allocated."""
    placement = placement_from_json(request["plan"], "the placement")
    with (
        on_abort(child.report_error),
        Engine.open(request["model"], placement=placement) as engine,
    ):
        text = Path(request["text"]).read_text(encoding="utf-8")
        tokens = engine.tokenize(text, special=False)[:_TOKENS]
        prompt = len(tokens) - _DECODED
        cuts = [*range(0, prompt, request["at_once"]), *range(prompt, len(tokens) + 1)]
        rows = []
        for start, end in pairwise(cuts):
            entries = [Entry(tokens[n], n, 0, n == end - 1) for n in range(start, end)]
            rows.append(engine.submit(entries).copy())
            child.report_progress(end, len(tokens), "tokens", "")
            if request["kills"]:
                os.kill(request["kills"], signal.SIGKILL)
        np.save(request["logits"], np.concatenate(rows))
        differences = compare(engine.report, engine.predicted)
        return {"bytes": [asdict(each) for each in differences], "warnings": engine.warnings}


if __name__ == "__main__":
    child.respond(_answer)

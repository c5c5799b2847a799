"""Hold `dots1 chat --url` with another engine to transformers' greedy text.

    python -m benchmarks.engines CHECKPOINT -- PROGRAM ... --port

The engine serves the checkpoint's safetensors as `dots1`, on the port that follows its last word.
`engines.sh` installs vLLM and runs this.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

_PORT = 18_090
_URL = f"http://127.0.0.1:{_PORT}"
_PATIENCE = 300  # seconds until the engine must serve
_TOKENS = 24

_SYSTEM = "You are a helpful assistant."  # what dots1 chat begins with
_CARD = "Who won the world series in 2020?"  # the question on the published model's card
_STORY, _MORE = "Tell me a story about a cat.", "What did she do then?"
_BEGINNING = "Once upon a time"


class Oracle:
    """transformers with the checkpoint in F32."""

    def __init__(self, checkpoint: Path) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self._model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)

    def answer(self, *said: str) -> str:
        """The answer to the last of the texts that a user and an assistant said in turn."""
        return self._continue(self.prompt(*said))

    def prompt(self, *said: str) -> list[int]:
        """The tokens before that answer."""
        roles = ["user", "assistant"] * len(said)
        messages = [
            {"role": role, "content": text} for role, text in zip(roles, said, strict=False)
        ]
        found: list[int] = self._tokenizer.apply_chat_template(
            [{"role": "system", "content": _SYSTEM}, *messages],
            add_generation_prompt=True,
            return_dict=False,
        )
        return found

    def completion(self, text: str) -> str:
        """What follows a text."""
        return self._continue(self._tokenizer(text)["input_ids"])

    def _continue(self, tokens: list[int]) -> str:
        output = self._model.generate(
            torch.tensor([tokens]), max_new_tokens=_TOKENS, do_sample=False
        )
        text: str = self._tokenizer.decode(output[0][len(tokens) :], skip_special_tokens=True)
        return text


def main() -> None:
    """Print a Markdown table of what was asked and what agrees."""
    options = _options()
    oracle = Oracle(options.checkpoint)
    with _engine(options.engine) as version, TemporaryDirectory() as folder:
        print(f"| {version} | as transformers |\n|---|---|")
        checks = [
            (name, found == expected)
            for name, found, expected in _checks(oracle, Path(folder) / "session.json")
        ]
    for name, right in checks:
        print(f"| {name} | {'yes' if right else 'NO'} |")
    sys.exit(not all(right for _, right in checks))


def _checks(oracle: Oracle, session: Path) -> Iterator[tuple[str, object, object]]:
    """Yield what is checked, what the engine gave, and what it must be."""
    yield "the card's curl", _curl(), oracle.answer(_CARD)
    yield "`dots1 chat --url -p`", _chat("-p", _STORY), oracle.answer(_STORY)
    yield "`--raw`", _chat("-p", _BEGINNING, "--raw"), oracle.completion(_BEGINNING)
    found = json.loads(_chat("-p", _STORY, "--json"))
    names = "text", "prompt_tokens", "generated_tokens", "stop", "model"
    expected = oracle.answer(_STORY), len(oracle.prompt(_STORY)), _TOKENS, "length", "dots1"
    yield "`--json`: text, tokens, stop", tuple(found[name] for name in names), expected
    first = _chat("-p", _STORY, "--session", str(session))
    second = _chat("-p", _MORE, "--session", str(session))
    yield "`--session`: the second answer", second, oracle.answer(_STORY, first, _MORE)
    said = [turn["text"] for turn in json.loads(session.read_text(encoding="utf-8"))["messages"]]
    yield "`--session`: what is kept", said[1:], [_STORY, first, _MORE, second]


def _curl() -> str:
    messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": _CARD}]
    body = {"model": "dots1", "messages": messages, "max_tokens": _TOKENS, "temperature": 0}
    found = _get("/v1/chat/completions", body)["choices"][0]["message"]["content"]
    return str(found)


def _chat(*options: str) -> str:
    command = ["dots1", "chat", "--url", f"{_URL}/v1", "--temp", "0", "-n", str(_TOKENS), *options]
    program = Path(sys.executable).with_name(command[0])
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, check=True)
    return done.stdout.removesuffix("\n")


def _get(path: str, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(_URL + path, data, {"Content-Type": "application/json"})) as response:
        return json.loads(response.read() or b"null")


@contextmanager
def _engine(command: Sequence[str]) -> Iterator[str]:
    """Run the engine while the block runs; give its name and version."""
    process = subprocess.Popen([*command, str(_PORT)], stdout=sys.stderr)
    try:
        deadline = time.monotonic() + _PATIENCE
        while not _serves():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} does not serve")
            time.sleep(1)
        yield f"{Path(command[0]).name} {_get('/version')['version']}"
    finally:
        process.terminate()
        process.wait()


def _serves() -> bool:
    try:
        _get("/health")
    except (URLError, ConnectionError):
        return False
    return True


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a folder with safetensors")
    parser.add_argument("engine", nargs="+", help="the engine's command, up to --port")
    return parser.parse_args()


if __name__ == "__main__":
    main()

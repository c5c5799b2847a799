"""What `make demo` shows: the example model converted, verified, measured, and heard.

    python tools/demo.py examples/dots1-tiny build

Every step is a `dots1` command, printed before it runs, so that it can be typed again.
"""

import shlex
import subprocess
import sys
from pathlib import Path

DOTS1 = str(Path(sys.executable).with_name("dots1"))
CHUNKS = "40"  # of 512 tokens: enough to see a difference, seconds to run
QUESTION = "Tell me a story about a little dog."


def run(title: str, *arguments: str) -> None:
    """Print the command under a title, and run it; a failure ends the demo."""
    print(f"\n# {title}\n$ dots1 {shlex.join(arguments)}", flush=True)
    code = subprocess.run([DOTS1, *arguments], check=False).returncode
    if code:
        sys.exit(code)


def main() -> None:
    """Convert, verify, measure beside the unquantised model, and ask one question."""
    checkpoint, build = sys.argv[1], Path(sys.argv[2])
    build.mkdir(parents=True, exist_ok=True)
    mix, whole = str(build / "dots1-tiny-DQ4.gguf"), str(build / "dots1-tiny-BF16.gguf")
    text = str(Path(checkpoint) / "heldout.txt")
    run("The default dynamic mix", "convert", checkpoint, "-o", mix, "--force")
    run("The same weights unquantised", "convert", checkpoint, "-o", whole, "--type", "BF16",
        "--force")  # fmt: skip
    run("What each tensor lost", "verify", mix, "--against", checkpoint)
    run("What the model lost", "perplexity", mix, "--reference", whole, "-f", text,
        "--chunks", CHUNKS, "--histogram")  # fmt: skip
    run("An answer", "chat", mix, "-p", QUESTION, "--temp", "0.4", "--seed", "3")


if __name__ == "__main__":
    main()

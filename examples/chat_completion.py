"""Chat completion with the instruct model: the model card's example, on a GGUF of `dots1 convert`.

python examples/chat_completion.py dots.llm1.inst.gguf
"""

import sys

from dots1_local import Sampling, Session, load

model_name = sys.argv[1] if len(sys.argv) > 1 else "dots.llm1.inst.gguf"

likeliest = Sampling(temperature=0)
with (
    load(model_name, placement="auto") as engine,
    Session(engine, system="", sampling=likeliest) as session,
):
    for piece in session.ask("Write a piece of quicksort code in C++", max_tokens=200):
        print(piece, end="", flush=True)
    print()

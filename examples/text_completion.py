"""Text completion with the base model: the model card's example, on a GGUF of `dots1 convert`.

python examples/text_completion.py dots.llm1.base.gguf
"""

import sys

from dots1_local import Sampling, Session, load

model_name = sys.argv[1] if len(sys.argv) > 1 else "dots.llm1.base.gguf"

text = (
    "An attention function can be described as mapping a query and a set of key-value pairs to an "
    "output, where the query, keys, values, and output are all vectors. The output is"
)
likeliest = Sampling(temperature=0)
with (
    load(model_name, placement="auto") as engine,
    Session(engine, sampling=likeliest, raw=True) as session,
):
    print(text + "".join(session.ask(text, max_tokens=100)))

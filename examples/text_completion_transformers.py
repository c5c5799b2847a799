"""The same with transformers, on the safetensors checkpoint or on what `dots1 export` wrote.

python examples/text_completion_transformers.py rednote-hilab/dots.llm1.base
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model_name = sys.argv[1] if len(sys.argv) > 1 else "rednote-hilab/dots.llm1.base"

tokenizer = AutoTokenizer.from_pretrained(model_name)
# 286 GB of weights spread over GPUs want the package accelerate; a CPU does not.
device_map = "auto" if torch.cuda.is_available() else None
model = AutoModelForCausalLM.from_pretrained(
    model_name, dtype=torch.bfloat16, device_map=device_map
)

text = (
    "An attention function can be described as mapping a query and a set of key-value pairs to an "
    "output, where the query, keys, values, and output are all vectors. The output is"
)
inputs = tokenizer(text, return_tensors="pt").to(model.device)
outputs = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(outputs[0], skip_special_tokens=True))

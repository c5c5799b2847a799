"""The same with transformers, on the safetensors checkpoint or on what `dots1 export` wrote.

python examples/chat_completion_transformers.py rednote-hilab/dots.llm1.inst
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model_name = sys.argv[1] if len(sys.argv) > 1 else "rednote-hilab/dots.llm1.inst"

tokenizer = AutoTokenizer.from_pretrained(model_name)
# 286 GB of weights spread over GPUs want the package accelerate; a CPU does not.
device_map = "auto" if torch.cuda.is_available() else None
model = AutoModelForCausalLM.from_pretrained(
    model_name, dtype=torch.bfloat16, device_map=device_map
)

messages = [{"role": "user", "content": "Write a piece of quicksort code in C++"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
).to(model.device)
outputs = model.generate(**inputs, max_new_tokens=200)
answer = outputs[0][inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))

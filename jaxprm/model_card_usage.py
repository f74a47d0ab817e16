"""How an exported reward model is called, by its format: the code that a model card shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CONVERSATION = '''\
messages = [
    {"role": "user", "content": "Craft 1 oak planks. You have nothing."},
    {"role": "assistant", "content": "I need oak logs. get 1 oak log"},
    {"role": "user", "content": "Got 1 oak log"},
    {"role": "assistant", "content": "craft 4 oak planks using 1 oak log"},
]


def tokens_of(messages):
    """The rendering that ends with the last message: no generation prompt, and no special tokens added to it."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)  # tools=..., where the agent has them
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")
'''

_SEQUENCE = f'''\
```python
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

directory = "."  # this directory, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()

{_CONVERSATION}

before = None
for index, message in enumerate(messages):
    if message["role"] != "assistant":
        continue
    with torch.no_grad():
        promise = model(**tokens_of(messages[: index + 1])).logits[0]VALUE.item()
    progress = None if before is None else promise - before
    print({{"message": index, "promise": promise, "progress": progress}})
    before = promise
```'''

_TOKEN = f'''\
```python
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

directory = "."  # this directory, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForTokenClassification.from_pretrained(directory, dtype=torch.float32).eval()

{_CONVERSATION}

with torch.no_grad():  # one pass for all steps
    values = model(**tokens_of(messages)).logits[0]VALUE
before = None
for index, message in enumerate(messages):
    if message["role"] != "assistant":
        continue
    # The value of a step is that of the last token of the rendering that ends with it.
    end = tokens_of(messages[: index + 1])["input_ids"].shape[1] - 1
    promise = values[end].item()
    progress = None if before is None else promise - before
    print({{"message": index, "promise": promise, "progress": progress}})
    before = promise
```'''

_JAXPRM = '''\
With jaxprm, which scores all steps in one pass and candidates after a shared prefix:

```python
import jaxprm

model = jaxprm.load(directory)
print(model.score([messages])[0]["steps"])
print(model.score_actions(messages[:3], ["craft 4 oak planks using 1 oak log", "get 1 oak log"]))
```'''

_VLLM_SEQUENCE = '''\
With vLLM, given tokens, to which it adds none of its own:

    from vllm import LLM
    llm = LLM(model=directory, runner="pooling", dtype="DTYPE")
    prompt = {"prompt_token_ids": tokens_of(messages)["input_ids"][0].tolist()}
    promise = llm.classify([prompt])[0].outputs.probs[INDEX]    # NOTE'''

_VLLM_TOKEN = '''\
With vLLM, given tokens, to which it adds none of its own:

    from vllm import LLM
    llm = LLM(model=directory, runner="pooling", dtype="DTYPE")
    prompt = {"prompt_token_ids": tokens_of(messages)["input_ids"][0].tolist()}
    values = llm.encode([prompt], pooling_task="token_classify")[0].outputs.data[:, INDEX]    # NOTE'''

_SGLANG_SEQUENCE = '''\
With SGLang:

    python -m sglang.launch_server --model-path DIRECTORY --is-embedding --dtype DTYPE --port 30000

    import requests
    body = {"model": directory, "input_ids": tokens_of(messages)["input_ids"][0].tolist()}
    promise = requests.post("http://localhost:30000/classify", json=body).json()["embedding"][0]'''

_TRL_SEQUENCE = '''\
With TRL, as the reward of a policy (conversations; the reward of a completion is the promise of its last turn):

    from trl import GRPOTrainer
    trainer = GRPOTrainer(model=..., reward_funcs=directory, train_dataset=..., args=...)'''

_UNSEEN = (
    "The calls of vLLM{others} need a server or packages that were not there when this was written: they follow their "
    "documentation and were not run on this export. Compare a few scores with transformers' before you rely on them."
)


def of_tokens(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is a token classifier's."""
    return config["architectures"][0].endswith("ForTokenClassification")


def sections(config: Mapping[str, Any]) -> list[str]:
    """The paragraphs on calling a model with this config.json from transformers, jaxprm, vLLM, SGLang and TRL."""
    two = config.get("num_labels", 1) == 2
    if two:
        vllm = {"INDEX": "1", "NOTE": "a softmax, as config.json has two labels"}
    else:
        vllm = {"INDEX": "0", "NOTE": 'the raw value: config.json says problem_type "regression"'}
    replaced = vllm | {"DTYPE": config["dtype"]}
    if of_tokens(config):
        value = ".softmax(-1)[:, 1]" if two else "[:, 0]"
        parts = [_TOKEN, _JAXPRM, _VLLM_TOKEN, _token_consumers(), _UNSEEN.format(others="")]
    else:
        value = ".softmax(-1)[1]" if two else "[0]"
        parts = [_SEQUENCE, _JAXPRM, _VLLM_SEQUENCE]
        parts += [] if two else [_SGLANG_SEQUENCE, _sglang_note(), _TRL_SEQUENCE]
        parts.append(_UNSEEN.format(others="" if two else ", SGLang and TRL"))
    for name, text in (replaced | {"VALUE": value}).items():
        parts = [part.replace(name, text) for part in parts]
    return ["With transformers:", *parts]


def _sglang_note() -> str:
    return (
        "SGLang's `/classify` gives the value itself; its `/v1/classify` applies a softmax, which is 1 for a single "
        "label. Some versions give the head of a sequence classifier a bias that no checkpoint sets."
    )


def _token_consumers() -> str:
    return (
        "SGLang and TRL's reward functions load sequence classifiers: for them, export with `--format sequence`. TRL's "
        "own process reward models are token classifiers of two labels; this one is called as above."
    )

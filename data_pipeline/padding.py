"""The token a batch is padded with: one that ends no message, whoever reads the model later.

Consumers read a score at the last token that is not padding. With the padding token at the end of messages, as where
pad is set to eos, they read the wrong one (transformers#35352).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

# Llama 3.1 and later have the first, Qwen the others; both are there for this and stand in no chat.
_KNOWN = ("<|finetune_right_pad_id|>", "<|endoftext|>", "<|fim_pad|>")


def padding_id(
    specials: Mapping[str, int], *, declared: int | None, used: Collection[int], template: str
) -> int | None:
    """The id to pad with: the declared one where it may, else another special token that no conversation holds.

    specials: ids of the tokenizer's special tokens; used: those with a part of their own (bos, eos, unk); a token whose
    text stands in the chat template is in use too. Returns None where every special token is in use.
    """
    free = {text: id for text, id in specials.items() if id not in used and text not in template}
    if declared in free.values():
        return declared
    by_name = [text for word in ("pad", "reserved") for text in sorted(free, key=free.get) if word in text.lower()]
    return next((free[text] for text in (*_KNOWN, *by_name) if text in free), None)

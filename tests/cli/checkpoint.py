"""A random toy model with a tokenizer of single bytes and a chat template, so that text can go in and out."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.models.toy import CASES, write_checkpoint

END = 256
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ENGINE = {"max_model_len": 128, "max_num_seqs": 2, "max_num_batched_tokens": 32, "block_size": 16, "progress": False}


def write_text_checkpoint(folder: Path) -> Path:
    """The llama2 case of the toy models, with 257 tokens: every byte, and an end token."""
    write_checkpoint(folder, CASES["llama2"]["config"] | {"vocab_size": END + 1, "eos_token_id": END}, seed=3)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)} | {"<end>": END}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", "chat_template": TEMPLATE}))
    return folder

"""The embedded tiny model: a byte-level Llama with fixed random weights, saved as a folder like any other model."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tinkerbell_server.database import make_folders

BOS, EOS, PAD, TURN, END = "<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (BOS, EOS, PAD, TURN, END)
"""Special tokens, in the order of their ids, which follow the 256 bytes."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def embedded_model(data_dir: Path) -> Path:
    """The folder of the embedded model. The first call creates it; it appears complete."""
    folder = data_dir / "models" / "embedded"
    if folder.is_dir():
        return folder
    make_folders(folder.parent)
    draft = Path(tempfile.mkdtemp(prefix=".embedded-", dir=folder.parent))
    try:
        _model().save_pretrained(draft)
        write_tokenizer(draft)
        for file in draft.iterdir():
            file.chmod(0o600)
        os.replace(draft, folder)
    except OSError:
        if not folder.is_dir():  # if it exists now, another engine with this data directory has created it
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def write_tokenizer(folder: Path) -> None:
    """Save a byte-level tokenizer with a ChatML template, which marks the tokens of the assistant."""
    _tokenizer().save_pretrained(folder)


def _model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=256 + len(SPECIAL),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    if model.generation_config is not None:
        model.generation_config.eos_token_id = [257, 260]  # the end of a message ends a sample too
    return model


def _tokenizer() -> PreTrainedTokenizerFast:
    characters = _byte_characters()
    tokenizer = Tokenizer(models.BPE(vocab={characters[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    fast: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[TURN, END],
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _byte_characters() -> list[str]:
    """The character that represents each byte in a byte-level vocabulary, as in GPT-2."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]

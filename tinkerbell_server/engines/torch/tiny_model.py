"""The embedded tiny model: a byte-level Llama made on the spot, the same everywhere, loaded like any other folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD, TURN, END = "<|bos|>", "<|eos|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (BOS, EOS, PAD, TURN, END)
"""The ids after the 256 bytes, in this order."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def embedded_model(data_dir: Path) -> Path:
    """The folder of the embedded model, written at the first call, in one rename."""
    folder = data_dir / "models" / "embedded"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".embedded-", dir=folder.parent))
    try:
        _model().save_pretrained(draft)
        write_tokenizer(draft)
        os.replace(draft, folder)
    except OSError:
        if not folder.is_dir():  # else another engine on this data dir was first
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of 256 bytes and the special tokens, with a ChatML template that marks what counts."""
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
        model.generation_config.eos_token_id = [257, 260]  # a chat's turn ends a sample too
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
    """The printable character that stands for each byte in a byte-level vocabulary, as GPT-2 chose them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]

"""Text becomes rows by a real byte-level tokenizer and real chat templates."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tinkerbell_core.errors import BadData
from tinkerbell_core.spec import Provenance
from tinkerbell_core.tensors import to_numpy
from tinkerbell_core.types import LossDescription
from tinkerbell_server.calls.data import parse_call
from tinkerbell_server.calls.text import rows_from_text
from tinkerbell_server.commands import Row, TextData

PLAIN = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}|{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
MASKED = (
    "{% for m in messages %}<{{ m['role'][0] }}>"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}|{% endgeneration %}"
    "{% else %}{{ m['content'] }}|{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}<{{ m['role'][0] }}>"
    "{{ m['content'] if loop.last else m['content'].split('=')[-1] }}|{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('begin with a user') }}{% endif %}"

CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "2+2"},
    {"role": "assistant", "content": "4"},
]


def tokenizer(template: str | None = PLAIN, merges: tuple[tuple[str, str], ...] = ()) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate([*letters, *("".join(pair) for pair in merges)])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=inner)
    made.chat_template = template
    return made


LOSS = LossDescription(
    id="tinkerbell-core:cross_entropy",
    name="cross_entropy",
    summary="",
    inputs=("target_tokens",),
    optional_inputs=("weights",),
    hyperparameters=(),
    coupling="sequence",
    group_size=1,
    finite=(),
    provenance=Provenance(),
    digest="",
)


def rows(data: list[Any], made: PreTrainedTokenizerFast, inputs: Any = None) -> list[Row]:
    text = parse_call(data, inputs, LOSS, vocab_size=len(made), max_length=64)
    assert isinstance(text, TextData)
    return rows_from_text(text, made, LOSS, vocab_size=len(made), max_length=64)


def counted(row: Row, made: PreTrainedTokenizerFast) -> str:
    """The text of the targets that count."""
    weights = to_numpy(row.inputs["weights"])
    return str(made.decode(to_numpy(row.inputs["target_tokens"])[weights == 1]))


def test_a_string_is_shifted_and_counts_throughout() -> None:
    made = tokenizer()
    (row,) = rows(["abc"], made)
    assert made.decode(to_numpy(row.tokens)) == "ab"
    assert counted(row, made) == "bc"


@pytest.mark.parametrize("template", [PLAIN, MASKED])
def test_assistant_tokens_of_a_chat_count(template: str) -> None:
    made = tokenizer(template)
    (row,) = rows([CHAT], made)
    assert made.decode(to_numpy(row.tokens)) == "<u>hi|<a>yo|<u>2+2|<a>4"
    assert counted(row, made) == "yo|4|"


def test_all_tokens_of_a_chat_count_where_the_server_is_told_so() -> None:
    made = tokenizer()
    text = parse_call([CHAT], None, LOSS, vocab_size=len(made), max_length=64)
    assert isinstance(text, TextData)
    (row,) = rows_from_text(text, made, LOSS, vocab_size=len(made), max_length=64, chat_tokens="all")
    assert counted(row, made) == "u>hi|<a>yo|<u>2+2|<a>4|"


def test_a_template_that_drops_earlier_turns_is_refused_by_turn() -> None:
    chat = [*CHAT[:1], {"role": "assistant", "content": "thinking=yo"}, *CHAT[2:]]
    with pytest.raises(
        BadData, match=r"data\[0\], turn 1 \(assistant\): the chat template writes .* as a row of its own"
    ):
        rows([chat], tokenizer(FORGETFUL))
    assert len(rows([chat[:2]], tokenizer(FORGETFUL))) == 1


def test_a_model_without_a_chat_template_says_so() -> None:
    with pytest.raises(BadData, match="the model has no chat template: send strings or token ids"):
        rows([CHAT], tokenizer(None))


def test_what_a_template_raises_is_passed_on() -> None:
    with pytest.raises(BadData, match=r"data\[0\]: the model's chat template refuses this chat: begin with a user"):
        rows([CHAT[1:2]], tokenizer(STRICT))


def test_a_chat_without_an_assistant_is_refused() -> None:
    with pytest.raises(BadData, match="has no assistant message, so no token of it would count"):
        rows([CHAT[:1]], tokenizer())


def test_only_the_answers_of_preference_strings_count() -> None:
    made = tokenizer()
    chosen, rejected = rows([{"prompt": "2+2=", "chosen": "4", "rejected": "five"}], made)
    assert [counted(chosen, made), counted(rejected, made)] == ["4", "five"]


def test_a_token_across_prompt_and_answer_belongs_to_the_answer() -> None:
    made = tokenizer(merges=(("=", "4"),))
    chosen, rejected = rows([{"prompt": "2+2=", "chosen": "4", "rejected": "5"}], made)
    assert [counted(chosen, made), counted(rejected, made)] == ["=4", "5"]


@pytest.mark.parametrize("template", [PLAIN, MASKED])
def test_only_the_answers_of_preference_chats_count(template: str) -> None:
    made = tokenizer(template)
    record = {"prompt": CHAT[:3], "chosen": CHAT[3:], "rejected": "5"}
    chosen, rejected = rows([record], made)
    assert [counted(chosen, made), counted(rejected, made)] == ["4|", "5|"]


def test_a_row_of_text_that_is_too_long_is_named_by_its_record() -> None:
    record = {"prompt": "a", "chosen": "b", "rejected": "c" * 70}
    with pytest.raises(BadData, match=r"data\[0\] \(rejected\) has 70 tokens, but the model takes 64 at most"):
        rows([record], tokenizer())


def test_inputs_of_the_call_fit_the_shifted_text() -> None:
    assert to_numpy(rows(["abc"], tokenizer(), {"weights": [[0, 1]]})[0].inputs["weights"]).tolist() == [0, 1]
    with pytest.raises(BadData, match="'weights' has length 3, but the row has 2 positions"):
        rows(["abc"], tokenizer(), {"weights": [[0, 1, 1]]})

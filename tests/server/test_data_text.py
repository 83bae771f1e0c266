"""A real byte-level tokenizer and real chat templates turn text into rows and prompts."""

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
from tinkerbell_server.calls.prompts import prompt_ids
from tinkerbell_server.calls.sample import TextPrompt
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


def make_tokenizer(template: str | None = PLAIN, merges: tuple[tuple[str, str], ...] = ()) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: index for index, letter in enumerate([*letters, *("".join(pair) for pair in merges)])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    tokenizer.chat_template = template
    return tokenizer


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


def rows(data: list[Any], tokenizer: PreTrainedTokenizerFast, inputs: Any = None) -> list[Row]:
    text = parse_call(data, inputs, LOSS, vocab_size=len(tokenizer), max_length=64)
    assert isinstance(text, TextData)
    return rows_from_text(text, tokenizer, LOSS, vocab_size=len(tokenizer), max_length=64)


def counted(row: Row, tokenizer: PreTrainedTokenizerFast) -> str:
    """The text of the targets that count."""
    weights = to_numpy(row.inputs["weights"])
    return str(tokenizer.decode(to_numpy(row.inputs["target_tokens"])[weights == 1]))


def test_a_string_is_shifted_and_all_its_tokens_count() -> None:
    tokenizer = make_tokenizer()
    (row,) = rows(["abc"], tokenizer)
    assert tokenizer.decode(to_numpy(row.tokens)) == "ab"
    assert counted(row, tokenizer) == "bc"


@pytest.mark.parametrize("template", [PLAIN, MASKED])
def test_assistant_tokens_of_a_chat_count(template: str) -> None:
    tokenizer = make_tokenizer(template)
    (row,) = rows([CHAT], tokenizer)
    assert tokenizer.decode(to_numpy(row.tokens)) == "<u>hi|<a>yo|<u>2+2|<a>4"
    assert counted(row, tokenizer) == "yo|4|"


def test_all_tokens_of_a_chat_count_if_chat_tokens_is_all() -> None:
    tokenizer = make_tokenizer()
    text = parse_call([CHAT], None, LOSS, vocab_size=len(tokenizer), max_length=64)
    assert isinstance(text, TextData)
    (row,) = rows_from_text(text, tokenizer, LOSS, vocab_size=len(tokenizer), max_length=64, chat_tokens="all")
    assert counted(row, tokenizer) == "u>hi|<a>yo|<u>2+2|<a>4|"


def test_a_template_may_change_earlier_turns() -> None:
    tokenizer = make_tokenizer(FORGETFUL)
    chat = [*CHAT[:1], {"role": "assistant", "content": "thinking=yo"}, *CHAT[2:]]
    (row,) = rows([chat], tokenizer)
    assert tokenizer.decode(to_numpy(row.tokens)) == "<u>hi|<a>yo|<u>2+2|<a>4"
    assert counted(row, tokenizer) == "yo|4|"


def test_a_chat_is_refused_if_the_model_has_no_chat_template() -> None:
    with pytest.raises(BadData, match="the model has no chat template: send strings or token ids"):
        rows([CHAT], make_tokenizer(None))


def test_an_error_that_the_template_raises_is_part_of_the_message() -> None:
    with pytest.raises(BadData, match=r"data\[0\]: the model's chat template refuses this chat: begin with a user"):
        rows([CHAT[1:2]], make_tokenizer(STRICT))


def test_a_chat_without_an_assistant_is_refused() -> None:
    with pytest.raises(BadData, match="has no assistant message, so no token of it would count"):
        rows([CHAT[:1]], make_tokenizer())


@pytest.mark.parametrize("template", [PLAIN, MASKED, FORGETFUL])
def test_only_the_last_answer_of_a_record_whose_prompt_holds_an_answer_counts(template: str) -> None:
    tokenizer = make_tokenizer(template)
    prompt = [*CHAT[:1], {"role": "assistant", "content": "thinking=yo"}, CHAT[2]]
    record = {"prompt": prompt, "chosen": CHAT[3:], "rejected": [{"role": "assistant", "content": "5"}]}
    chosen, rejected = rows([record], tokenizer)
    assert [counted(chosen, tokenizer), counted(rejected, tokenizer)] == ["4|", "5|"]


def test_the_answer_of_a_record_needs_an_assistant() -> None:
    record = {"prompt": CHAT[:1], "chosen": CHAT[:1], "rejected": "5"}
    with pytest.raises(BadData, match=r"data\[0\]\['chosen'\] has no assistant message"):
        rows([record], make_tokenizer())


def test_the_tools_of_a_record_are_rendered_and_those_of_a_chat_too() -> None:
    tokenizer = make_tokenizer("{{ tools[0].name if tools }}" + PLAIN)
    tools = [{"name": "sum"}]
    pair = rows([{"prompt": CHAT[:3], "chosen": "4", "rejected": "5", "tools": tools}], tokenizer)
    (row,) = rows([{"messages": CHAT, "tools": tools}], tokenizer)
    assert all(tokenizer.decode(to_numpy(one.tokens)).startswith("sum<u>hi|<a>yo|") for one in [*pair, row])
    assert [counted(one, tokenizer) for one in [*pair, row]] == ["4|", "5|", "yo|4|"]


def test_end_of_text_is_added_once_to_strings_and_to_answers_that_are_strings() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    (added,) = rows(["abc"], tokenizer)
    (sent,) = rows(["abc</s>"], tokenizer)
    assert counted(added, tokenizer) == counted(sent, tokenizer) == "bc</s>"
    chosen, rejected = rows([{"prompt": "2+2=", "chosen": "4", "rejected": "five</s>"}], tokenizer)
    assert [counted(chosen, tokenizer), counted(rejected, tokenizer)] == ["4</s>", "five</s>"]
    assert counted(rows([CHAT], tokenizer)[0], tokenizer) == "yo|4|"


def test_no_end_of_text_is_added_if_the_setting_is_off() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    text = parse_call(["abc"], None, LOSS, vocab_size=len(tokenizer), max_length=64)
    assert isinstance(text, TextData)
    (row,) = rows_from_text(text, tokenizer, LOSS, vocab_size=len(tokenizer), max_length=64, end_of_text=False)
    assert counted(row, tokenizer) == "bc"


def test_only_the_answers_of_preference_strings_count() -> None:
    tokenizer = make_tokenizer()
    chosen, rejected = rows([{"prompt": "2+2=", "chosen": "4", "rejected": "five"}], tokenizer)
    assert [counted(chosen, tokenizer), counted(rejected, tokenizer)] == ["4", "five"]


def test_a_token_that_joins_prompt_and_answer_counts() -> None:
    tokenizer = make_tokenizer(merges=(("=", "4"),))
    chosen, rejected = rows([{"prompt": "2+2=", "chosen": "4", "rejected": "5"}], tokenizer)
    assert [counted(chosen, tokenizer), counted(rejected, tokenizer)] == ["=4", "5"]


@pytest.mark.parametrize("template", [PLAIN, MASKED])
def test_only_the_answers_of_preference_chats_count(template: str) -> None:
    tokenizer = make_tokenizer(template)
    record = {"prompt": CHAT[:3], "chosen": CHAT[3:], "rejected": "5"}
    chosen, rejected = rows([record], tokenizer)
    assert [counted(chosen, tokenizer), counted(rejected, tokenizer)] == ["4|", "5|"]


def test_the_error_for_a_text_that_is_too_long_names_its_record() -> None:
    record = {"prompt": "a", "chosen": "b", "rejected": "c" * 70}
    with pytest.raises(BadData, match=r"data\[0\] \(rejected\) has 70 tokens, but the model takes 64 at most"):
        rows([record], make_tokenizer())


def test_weights_of_rows_and_positions_multiply_the_mask_of_a_chat_or_an_answer() -> None:
    tokenizer = make_tokenizer()
    mask = to_numpy(rows([CHAT], tokenizer)[0].inputs["weights"])
    assert set(mask) == {0.0, 1.0}
    of_row = rows([CHAT], tokenizer, {"weights": [0.5]})[0]
    assert to_numpy(of_row.inputs["weights"]).tolist() == (0.5 * mask).tolist()
    of_positions = rows([CHAT], tokenizer, {"weights": [list(range(len(mask)))]})[0]
    assert to_numpy(of_positions.inputs["weights"]).tolist() == (mask * range(len(mask))).tolist()
    record = {"prompt": "2+2=", "chosen": "4", "rejected": "five"}
    pair = rows([record], tokenizer, {"weights": [1, 2]})
    assert [to_numpy(row.inputs["weights"]).tolist() for row in pair] == [[0, 0, 0, 1], [0, 0, 0, 2, 2, 2, 2]]


def test_loss_fn_inputs_have_one_entry_per_position_of_the_shifted_text() -> None:
    assert to_numpy(rows(["abc"], make_tokenizer(), {"weights": [[0, 1]]})[0].inputs["weights"]).tolist() == [0, 1]
    with pytest.raises(BadData, match="'weights' has length 3, but the row has 2 positions"):
        rows(["abc"], make_tokenizer(), {"weights": [[0, 1, 1]]})


@pytest.mark.parametrize(("prompt", "text"), [("abc", "abc"), (CHAT[:3], "<u>hi|<a>yo|<u>2+2|<a>")])
def test_a_prompt_ends_where_the_answer_begins(prompt: Any, text: str) -> None:
    tokenizer = make_tokenizer()
    ids = prompt_ids(TextPrompt(prompt), tokenizer, vocab_size=len(tokenizer), max_length=64)
    assert tokenizer.decode(ids) == text


def test_a_prompt_that_fills_the_model_is_refused() -> None:
    tokenizer = make_tokenizer()
    assert len(prompt_ids(TextPrompt("a" * 63), tokenizer, vocab_size=len(tokenizer), max_length=64)) == 63
    with pytest.raises(BadData, match="the prompt has 64 tokens, but the model takes 64 tokens, prompt and sample"):
        prompt_ids(TextPrompt("a" * 64), tokenizer, vocab_size=len(tokenizer), max_length=64)

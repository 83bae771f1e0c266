"""Which text of a chat counts, for templates that behave as those of published families."""

# ruff: noqa: RUF001 - the tokens of DeepSeek hold a full-width bar
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import chat_families as families
from tests.chat_families import Family
from tinkerbell_core.errors import BadData
from tinkerbell_server.calls.chats import counted_chat
from tinkerbell_server.calls.templates import ChatTemplate

ONE = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " yo \n"}]
TWO = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "<|im_start|>assistant\n2+2"},
    {"role": "assistant", "content": "4"},
]
FIRST = [{"role": "assistant", "content": "hello"}, *TWO]
THOUGHT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyo"},
    {"role": "user", "content": "2+2"},
    {"role": "assistant", "content": "<think>\nadd\n</think>\n\n4"},
]
REASONED = [TWO[0], {**TWO[1], "reasoning_content": "hm"}, TWO[2], {**TWO[3], "reasoning_content": "add"}]
TOOLS = [{"type": "function", "function": {"name": "sum", "parameters": {"a": "number"}}}]


def called(arguments: Any = None, **keys: Any) -> list[dict[str, Any]]:
    """A chat with a call, its result and an answer."""
    function = {"name": "sum", "arguments": {"a": "2", "b": 2} if arguments is None else arguments}
    call = {"id": "c1", "type": "function", "function": function}
    return [
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": None, "tool_calls": [call], **keys},
        {"role": "tool", "content": "4", "tool_call_id": "c1", "name": "sum"},
        {"role": "assistant", "content": "It is 4."},
    ]


def counted(
    chat: Sequence[dict[str, Any]], family: Family, tools: Any = None, *, all_tokens: bool = False
) -> list[str]:
    """The runs of text that count. Also asserts that the ids are those of the tokenizer's own rendering."""
    tokenizer = family.tokenizer()
    ids, counts = counted_chat("data[0]", chat, ChatTemplate(tokenizer), tools=tools, all_tokens=all_tokens)
    plain = [
        {**{key: value for key, value in message.items() if key not in ("weight", "train")}, "content": text(message)}
        for message in chat
    ]
    options = {} if tools is None else {"tools": tools}
    assert ids == tokenizer.apply_chat_template(plain, tokenize=True, return_dict=False, **options)
    runs: list[list[int]] = [[]]
    for token, count in zip(ids, counts, strict=True):
        if count:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def text(message: dict[str, Any]) -> str:
    content = message["content"]
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


CASES: dict[str, tuple[Family, Any, list[str]]] = {
    "chatml, one answer": (families.CHATML, ONE, [" yo \n<|im_end|>"]),
    "chatml, two answers": (families.CHATML, TWO, ["yo<|im_end|>", "4<|im_end|>"]),
    "chatml, answer first": (families.CHATML, FIRST, ["hello<|im_end|>", "yo<|im_end|>", "4<|im_end|>"]),
    "chatml, empty answer": (families.CHATML, [ONE[0], {"role": "assistant", "content": ""}], ["<|im_end|>"]),
    "chatml as text": (families.CHATML_WITHOUT_TOKENS, TWO, ["yo<|im_end|>", "4<|im_end|>"]),
    "llama 3, one answer": (families.LLAMA3, ONE, ["yo<|eot_id|>"]),
    "llama 3, two answers": (families.LLAMA3, TWO, ["yo<|eot_id|>", "4<|eot_id|>"]),
    "llama 3, answer first": (families.LLAMA3, FIRST, ["hello<|eot_id|>", "yo<|eot_id|>", "4<|eot_id|>"]),
    "llama 3, a call": (
        families.LLAMA3,
        called(),
        ['{"name": "sum", "parameters": {"a": "2", "b": 2}}<|eot_id|>', "It is 4.<|eot_id|>"],
    ),
    "qwen 3, one answer": (families.QWEN3, ONE, ["<think>\n\n</think>\n\n yo \n<|im_end|>"]),
    "qwen 3, two answers": (families.QWEN3, TWO, ["yo<|im_end|>", "<think>\n\n</think>\n\n4<|im_end|>"]),
    "qwen 3, answer first": (
        families.QWEN3,
        FIRST,
        ["hello<|im_end|>", "yo<|im_end|>", "<think>\n\n</think>\n\n4<|im_end|>"],
    ),
    "qwen 3, reasoning in the content": (
        families.QWEN3,
        THOUGHT,
        ["yo<|im_end|>", "<think>\nadd\n</think>\n\n4<|im_end|>"],
    ),
    "qwen 3, reasoning": (families.QWEN3, REASONED, ["yo<|im_end|>", "<think>\nadd\n</think>\n\n4<|im_end|>"]),
    "qwen 3, a call after reasoning in the content": (
        families.QWEN3,
        called(content="<think>\nadd\n</think>\n\n")[:2],
        [
            '<think>\nadd\n</think>\n\n<tool_call>\n{"name": "sum", "arguments": {"a": "2", "b": 2}}\n</tool_call>'
            "<|im_end|>",
        ],
    ),
    "qwen 3, a call": (
        families.QWEN3,
        called(reasoning_content="add"),
        [
            '<think>\nadd\n</think>\n\n<tool_call>\n{"name": "sum", "arguments": {"a": "2", "b": 2}}\n</tool_call>'
            "<|im_end|>",
            "<think>\n\n</think>\n\nIt is 4.<|im_end|>",
        ],
    ),
    "qwen 3, a call with a string of arguments": (
        families.QWEN3,
        called('{"a": 2}', content="Let me add."),
        [
            'Let me add.\n<tool_call>\n{"name": "sum", "arguments": {"a": 2}}\n</tool_call><|im_end|>',
            "<think>\n\n</think>\n\nIt is 4.<|im_end|>",
        ],
    ),
    "qwen 3 without thinking": (families.QWEN3_WITHOUT_THINKING, TWO, ["yo<|im_end|>", "4<|im_end|>"]),
    "qwen 3 without thinking, an answer that begins as its prompt ends": (
        families.QWEN3_WITHOUT_THINKING,
        [TWO[0], {"role": "assistant", "content": "<thanks>"}, TWO[2], {"role": "assistant", "content": "</b>"}],
        ["<thanks><|im_end|>", "</b><|im_end|>"],
    ),
    "harmony, one answer": (families.HARMONY, ONE, ["<|channel|>final<|message|> yo \n<|return|>"]),
    "harmony, two answers": (
        families.HARMONY,
        TWO,
        ["<|channel|>final<|message|>yo<|end|>", "<|channel|>final<|message|>4<|return|>"],
    ),
    "harmony, answer first": (
        families.HARMONY,
        FIRST[:3],
        ["<|channel|>final<|message|>hello<|end|>", "<|channel|>final<|message|>yo<|return|>"],
    ),
    "harmony, thinking": (
        families.HARMONY,
        [TWO[0], {**TWO[1], "thinking": "hm"}, TWO[2], {**TWO[3], "thinking": "add"}],
        [
            "<|channel|>final<|message|>yo<|end|>",
            "<|channel|>analysis<|message|>add<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>",
        ],
    ),
    "harmony, a call without strings": (
        families.HARMONY,
        called({}),
        [
            " to=functions.sum<|channel|>commentary json<|message|>{}<|call|>",
            "<|channel|>final<|message|>It is 4.<|return|>",
        ],
    ),
    "deepseek, one answer": (families.DEEPSEEK, ONE, [" yo \n<｜end▁of▁sentence｜>"]),
    "deepseek, two answers": (families.DEEPSEEK, TWO, ["yo<｜end▁of▁sentence｜>", "4<｜end▁of▁sentence｜>"]),
    "deepseek, answer first": (
        families.DEEPSEEK,
        FIRST[:3],
        ["hello<｜end▁of▁sentence｜>", "yo<｜end▁of▁sentence｜>"],
    ),
    "deepseek, reasoning": (families.DEEPSEEK, THOUGHT, ["\n\nyo<｜end▁of▁sentence｜>", "\n\n4<｜end▁of▁sentence｜>"]),
    "deepseek r1": (families.DEEPSEEK_R1, TWO, ["yo<｜end▁of▁sentence｜>", "4<｜end▁of▁sentence｜>"]),
    "deepseek, a call": (
        families.DEEPSEEK,
        called('{"a": 2}'),
        [
            '<｜tool▁calls▁begin｜>function<｜tool▁sep｜>sum\n{"a": 2}<｜tool▁calls▁end｜><｜end▁of▁sentence｜>',
            "It is 4.<｜end▁of▁sentence｜>",
        ],
    ),
    "glm, one answer": (families.GLM, ONE, ["\n<think></think>\nyo"]),
    "glm, two answers": (families.GLM, TWO, ["\n<think></think>\nyo<|user|>", "\n<think></think>\n4"]),
    "glm, answer first": (
        families.GLM,
        FIRST[:3],
        ["\n<think></think>\nhello<|user|>", "\n<think></think>\nyo"],
    ),
    "glm, reasoning": (families.GLM, REASONED, ["\n<think></think>\nyo<|user|>", "\n<think>add</think>\n4"]),
    "glm, a call": (
        families.GLM,
        called(),
        [
            "\n<think></think>\n<tool_call>sum\n<arg_key>a</arg_key>\n<arg_value>2</arg_value>\n<arg_key>b</arg_key>"
            "\n<arg_value>2</arg_value>\n</tool_call><|observation|>",
            "\n<think></think>\nIt is 4.",
        ],
    ),
    "gemma, one answer": (families.GEMMA, ONE, ["yo<end_of_turn>"]),
    "gemma, two answers": (families.GEMMA, TWO, ["yo<end_of_turn>", "4<end_of_turn>"]),
    "mistral, one answer": (families.MISTRAL, ONE, ["  yo \n</s>"]),
    "mistral, two answers": (families.MISTRAL, TWO, [" yo</s>", " 4</s>"]),
    "mistral, a call": (
        families.MISTRAL,
        called(),
        ['[TOOL_CALLS] [{"name": "sum", "arguments": {"a": "2", "b": 2}}]</s>', " It is 4.</s>"],
    ),
    "mistral, two calls": (
        families.MISTRAL,
        [*called()[:3], called()[1], {**called()[2], "tool_call_id": "c2", "content": "5"}, called()[3]],
        ['[TOOL_CALLS] [{"name": "sum", "arguments": {"a": "2", "b": 2}}]</s>'] * 2 + [" It is 4.</s>"],
    ),
    "cohere, two answers": (
        families.COHERE,
        TWO,
        [f"<|START_RESPONSE|>{text}<|END_RESPONSE|><|END_OF_TURN|>" for text in ("yo", "4")],
    ),
    "always prompts": (families.ALWAYS_PROMPTS, TWO, ["yo<|im_end|>", "4<|im_end|>"]),
    "default system prompt": (families.DEFAULT_SYSTEM, TWO, ["yo<|im_end|>", "4<|im_end|>"]),
    "default system prompt, answer first": (
        families.DEFAULT_SYSTEM,
        FIRST[:3],
        ["hello<|im_end|>", "yo<|im_end|>"],
    ),
    "generation": (families.GENERATION, TWO, ["yo<|im_end|>", "4<|im_end|>"]),
    "generation, answer first": (families.GENERATION, FIRST[:3], ["hello<|im_end|>", "yo<|im_end|>"]),
    "generation, empty answer": (families.GENERATION, [ONE[0], {"role": "assistant", "content": ""}], ["<|im_end|>"]),
    "text parts": (
        families.CHATML,
        [ONE[0], {"role": "assistant", "content": [{"type": "text", "text": "y"}, {"type": "text", "text": "o"}]}],
        ["yo<|im_end|>"],
    ),
    "empty fields": (families.CHATML, [TWO[0], {**TWO[1], "tool_calls": [], "refusal": None}], ["yo<|im_end|>"]),
    "consecutive answers": (families.CHATML, [*ONE[:1], TWO[1], TWO[3]], ["yo<|im_end|>", "4<|im_end|>"]),
    "an answer that holds marks of the template": (
        families.CHATML,
        [ONE[0], {"role": "assistant", "content": "<|im_end|>\n<|im_start|>assistant\nx<|im_end|>\n"}],
        ["<|im_end|>\n<|im_start|>assistant\nx<|im_end|>\n<|im_end|>"],
    ),
}


@pytest.mark.parametrize(("family", "chat", "texts"), CASES.values(), ids=CASES)
def test_the_answers_and_the_marks_that_end_them_count(family: Family, chat: Any, texts: list[str]) -> None:
    assert counted(chat, family) == texts


@pytest.mark.parametrize(
    "family", [families.CHATML, families.QWEN3_WITHOUT_THINKING, families.GENERATION, families.ALWAYS_PROMPTS]
)
@pytest.mark.parametrize("key", [{"weight": 0}, {"train": False}, {"weight": 0.0, "train": False}])
def test_a_turn_with_weight_0_does_not_count(family: Family, key: dict[str, Any]) -> None:
    assert counted([*TWO[:3], {**TWO[3], **key}], family) == ["yo<|im_end|>"]
    assert counted([TWO[0], {**TWO[1], **key}, TWO[2], {**TWO[3], "weight": 1}], family) == ["4<|im_end|>"]


def test_all_tokens_count_except_those_of_a_turn_with_weight_0() -> None:
    chat = [ONE[0], {**TWO[1], "weight": 0}, {"role": "user", "content": "x"}]
    texts = ["<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "\n<|im_start|>user\nx<|im_end|>\n"]
    assert counted(chat + TWO[3:], families.CHATML, all_tokens=True) == [
        texts[0],
        texts[1] + "<|im_start|>assistant\n4<|im_end|>\n",
    ]
    assert counted(TWO[:2], families.CHATML, all_tokens=True) == [texts[0] + "yo<|im_end|>\n"]


@pytest.mark.parametrize("family", [families.QWEN3, families.LLAMA3, families.GLM, families.HARMONY])
def test_tools_are_rendered_and_do_not_count(family: Family) -> None:
    without, with_tools = counted(called(), family), counted(called(), family, TOOLS)
    assert with_tools == without
    ids, _ = counted_chat("data[0]", called(), ChatTemplate(family.tokenizer()), tools=TOOLS)
    assert '"parameters": {"a": "number"}' in family.tokenizer().decode(ids)


REFUSED: list[tuple[Family, Any, Any, str]] = [
    (families.RESULTS_IN_TURN, called(), None, r"turn 1 \(assistant\): .* the end of this turn cannot be found"),
    (families.RESULTS_IN_TURN, called()[:3], None, r"turn 1 \(assistant\): .* no token ends its tool call"),
    (families.CHATML, TWO, TOOLS, r"data\[0\] has tools, but the chat template of the model does not read them"),
    (
        families.CHATML,
        called(),
        None,
        r"turn 1 \(assistant\): the chat template of the model does not read 'tool_calls'",
    ),
    (families.CHATML, [ONE[0], {**ONE[1], "weigt": 0}], None, "does not read 'weigt'; did you mean 'weight'?"),
    (
        families.CHATML,
        [{**ONE[0], "images": 1}, ONE[1]],
        None,
        r"turn 0 \(user\): .* does not read 'images': remove it",
    ),
    (families.CHATML, ONE[:1], None, "has no assistant message, so no token of it would count"),
    (families.CHATML, [ONE[0], {**ONE[1], "weight": 0}], None, "no assistant message of it counts"),
    (
        families.EMPTY_GENERATION,
        TWO,
        None,
        r"turn 1 \(assistant\): the {% generation %} .* covers no token of this turn",
    ),
    (families.GENERATION_OF_LAST, TWO, None, r"turn 1 \(assistant\): the {% generation %} .* covers no token"),
    (families.GEMMA, FIRST, None, "the model's chat template refuses this chat: Conversation roles must alternate"),
    (families.HARMONY, called()[2:], None, "refuses this chat: a tool message without a call"),
    (families.ALWAYS_PROMPTS_WITHOUT_TOKENS, TWO, None, "the server cannot find the end of an answer"),
    (
        families.SEES_LENGTH,
        [*TWO[:3], {**TWO[3], "content": "b" * 18}],
        None,
        r"turn 3 \(assistant\): .* differently if",
    ),
]


@pytest.mark.parametrize(("family", "chat", "tools", "sentence"), REFUSED)
def test_a_chat_whose_answers_cannot_be_found_is_refused(family: Family, chat: Any, tools: Any, sentence: str) -> None:
    with pytest.raises(BadData, match=sentence):
        counted_chat("data[0]", chat, ChatTemplate(family.tokenizer()), tools=tools)


def test_a_turn_that_the_mask_of_a_template_does_not_cover_may_have_weight_0() -> None:
    assert counted([TWO[0], {**TWO[1], "weight": 0}, *TWO[2:]], families.GENERATION_OF_LAST) == ["4<|im_end|>"]


@pytest.mark.parametrize("family", [families.QWEN3, families.GENERATION])
def test_a_chat_of_160_turns_is_rendered_at_most_three_times(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = family.tokenizer()
    render, lengths = tokenizer.apply_chat_template, []

    def recorded(conversation: Any, **options: Any) -> Any:
        lengths.append(len(conversation))
        return render(conversation, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", recorded)
    _, counts = counted_chat("data[0]", TWO * 40, ChatTemplate(tokenizer))
    assert lengths.count(160) == (3 if family is families.GENERATION else 2)
    assert max(length for length in [0, *lengths] if length != 160) <= 4
    assert len(lengths) <= 5
    assert any(counts)


PIECES = st.sampled_from(
    [
        "a",
        "assistant",
        " ",
        "\n",
        "<",
        "</think>",
        "<think>",
        "<|im_start|>",
        "<|im_end|>",
        "assistant\n",
        "user\n",
        "é",
        "1",
    ]
)
CONTENTS = st.lists(PIECES, max_size=6).map("".join)
ROLES = st.sampled_from(["user", "assistant", "system", "tool"])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(ROLES, CONTENTS, st.integers(0, 1)), min_size=1, max_size=6))
@pytest.mark.parametrize("family", [families.CHATML, families.GENERATION, families.DEFAULT_SYSTEM])
def test_whatever_the_texts_are_exactly_the_answers_and_their_ends_count(
    family: Family, turns: list[tuple[str, str, int]]
) -> None:
    chat = [
        {"role": role, "content": content, **({"weight": weight} if role == "assistant" else {})}
        for role, content, weight in turns
    ]
    tokenizer = family.tokenizer()
    answers = [message["content"] + "<|im_end|>" for message in chat if message.get("weight")]
    if not answers:
        return
    ids, counts = counted_chat("data[0]", chat, ChatTemplate(tokenizer))
    assert tokenizer.decode([token for token, count in zip(ids, counts, strict=True) if count]) == "".join(answers)

"""Small chat templates that behave as those of published families of models, and a tokenizer for each."""

# ruff: noqa: RUF001 - the tokens of DeepSeek hold a full-width bar
from __future__ import annotations

from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Family:
    """A chat template, and the tokens that its tokenizer has in addition to the bytes."""

    template: str
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()

    def tokenizer(self) -> PreTrainedTokenizerFast:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        inner = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = decoders.ByteLevel()
        inner.add_tokens([AddedToken(text, special=True, normalized=False) for text in self.special])
        inner.add_tokens([AddedToken(text, special=False, normalized=False) for text in self.added])
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
        tokenizer.chat_template = self.template
        return tokenizer


CHATML = Family(
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    ("<|im_start|>", "<|im_end|>"),
)

CHATML_WITHOUT_TOKENS = Family(CHATML.template)

LLAMA3 = Family(
    "{{ '<|begin_of_text|>' }}{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{{ '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\\n\\n' }}"
    "{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}"
    """{{ '{"name": "' + f.name + '", "parameters": ' + (f.arguments | tojson) + '}' }}"""
    "{% else %}{{ m.content | trim }}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)

QWEN3 = Family(
    "{% if tools %}{{ '<|im_start|>system\\n# Tools\\n' + (tools | tojson) + '<|im_end|>\\n' }}{% endif %}"
    "{% set ns = namespace(last=-1) %}{% for m in messages %}"
    "{% if m.role == 'user' and not (m.content.startswith('<tool_response>') and "
    "m.content.endswith('</tool_response>')) %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set content = m.content %}{% set reasoning = '' %}"
    "{% if m.reasoning_content is string %}{% set reasoning = m.reasoning_content %}"
    "{% elif '</think>' in content %}"
    "{% set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or reasoning) %}"
    "{{ '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}"
    "{% else %}{{ content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{% if loop.index0 or content %}{{ '\\n' }}{% endif %}"
    """{{ '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}"""
    "{% if call.function.arguments is string %}{{ call.function.arguments }}"
    "{% else %}{{ call.function.arguments | tojson }}{% endif %}{{ '}\\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}"
    "{% elif m.role == 'tool' %}{{ '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
    "{{ '<|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}",
    ("<|im_start|>", "<|im_end|>"),
    ("<think>", "</think>", "<tool_call>", "</tool_call>"),
)

QWEN3_WITHOUT_THINKING = Family(
    QWEN3.template.replace("enable_thinking is defined and enable_thinking is false", "true"),
    QWEN3.special,
    QWEN3.added,
)

HARMONY = Family(
    "{{ '<|start|>system<|message|>You are a model.<|end|>' }}{% set ns = namespace(tool='', last=-1) %}"
    "{% if tools %}{{ '<|start|>developer<|message|>' + (tools | tojson) + '<|end|>' }}{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' and not m.tool_calls %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.thinking and loop.index0 >= ns.last %}"
    "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
    "{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}{% set ns.tool = f.name %}"
    "{{ '<|start|>assistant to=functions.' + f.name + '<|channel|>commentary json<|message|>' }}"
    "{{ f.arguments | tojson }}{{ '<|call|>' }}"
    "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}"
    "{% elif m.role == 'tool' %}{% if not ns.tool %}{{ raise_exception('a tool message without a call') }}{% endif %}"
    "{{ '<|start|>functions.' + ns.tool + ' to=assistant<|channel|>commentary<|message|>' + m.content + '<|end|>' }}"
    "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
    ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>"),
)

DEEPSEEK = Family(
    "{{ '<｜begin▁of▁sentence｜>' }}{% set ns = namespace(tool=false) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% elif m.role == 'assistant' %}{% if not ns.tool %}{{ '<｜Assistant｜>' }}{% endif %}{% set ns.tool = false %}"
    "{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}"
    "{{ '<｜tool▁calls▁begin｜>function<｜tool▁sep｜>' + f.name + '\\n' + f.arguments + '<｜tool▁calls▁end｜>' }}"
    "{% else %}{% set content = m.content %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{ content }}{% endif %}"
    "{{ '<｜end▁of▁sentence｜>' }}"
    "{% elif m.role == 'tool' %}{% set ns.tool = true %}"
    "{{ '<｜tool▁outputs▁begin｜>' + m.content + '<｜tool▁outputs▁end｜>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt and not ns.tool %}{{ '<｜Assistant｜>' }}{% endif %}",
    ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    ("<｜User｜>", "<｜Assistant｜>", "<｜tool▁calls▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁calls▁end｜>"),
)

DEEPSEEK_R1 = Family(
    DEEPSEEK.template.removesuffix("{{ '<｜Assistant｜>' }}{% endif %}")
    + "{{ '<｜Assistant｜><think>\\n' }}{% endif %}",
    DEEPSEEK.special,
    (*DEEPSEEK.added, "<think>", "</think>"),
)

GLM = Family(
    "{{ '[gMASK]<sop>' }}{% if tools %}{{ '<|system|>\\n' + (tools | tojson) }}{% endif %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ '<|assistant|>' }}"
    "{% if m.reasoning_content and loop.last %}{{ '\\n<think>' + m.reasoning_content.strip() + '</think>' }}"
    "{% else %}{{ '\\n<think></think>' }}{% endif %}"
    "{% if m.content.strip() %}{{ '\\n' + m.content.strip() }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ '\\n<tool_call>' + call.function.name }}"
    "{% for key, value in call.function.arguments.items() %}"
    "{{ '\\n<arg_key>' + key + '</arg_key>\\n<arg_value>' }}{{ value }}{{ '</arg_value>' }}{% endfor %}"
    "{{ '\\n</tool_call>' }}{% endfor %}"
    "{% elif m.role == 'tool' %}{{ '<|observation|>\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
    "{% else %}{{ '<|' + m.role + '|>\\n' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    ("<think>", "</think>", "<tool_call>", "</tool_call>"),
)

GEMMA = Family(
    "{{ '<bos>' }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}{{ m.content | trim }}"
    "{{ '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
    ("<bos>", "<start_of_turn>", "<end_of_turn>"),
)

MISTRAL = Family(
    "{{ '<s>' }}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if loop.last and tools %}{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + m.content + '[/INST]' }}"
    """{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] {"content": ' + m.content }}"""
    """{{ ', "call_id": "' + m.tool_call_id + '"}[/TOOL_RESULTS]' }}"""
    "{% elif m.tool_calls %}{% set f = m.tool_calls[0].function %}"
    """{{ '[TOOL_CALLS] [{"name": "' + f.name + '", "arguments": ' }}{{ f.arguments | tojson }}{{ '}]</s>' }}"""
    "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}",
    ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
)

ALWAYS_PROMPTS = Family(
    CHATML.template.replace("{% if add_generation_prompt %}", "").removesuffix("{% endif %}"), CHATML.special
)

ALWAYS_PROMPTS_WITHOUT_TOKENS = Family(ALWAYS_PROMPTS.template)

DEFAULT_SYSTEM = Family(
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{% endif %}"
    + CHATML.template,
    CHATML.special,
)

COHERE = Family(
    "{% for m in messages %}{{ '<|START_OF_TURN|><|' + m.role + '|>' }}"
    "{% if m.role == 'assistant' %}{{ '<|START_RESPONSE|>' + m.content + '<|END_RESPONSE|>' }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|END_OF_TURN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN|><|assistant|>' }}{% endif %}",
    ("<|START_OF_TURN|>", "<|END_OF_TURN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|user|>", "<|assistant|>"),
)

RESULTS_IN_TURN = Family(
    "{% for m in messages %}{% if m.role != 'tool' %}{{ '<|turn>' + m.role + '\\n' + m.content }}"
    "{% if m.tool_calls %}{{ '<tool_call>' + m.tool_calls[0].function.name + '</tool_call>' }}"
    "{{ '<result>' + messages[loop.index].content + '</result>' }}"
    "{% else %}{{ '<turn|>' }}{% endif %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn>assistant\\n' }}{% endif %}",
    ("<|turn>", "<turn|>"),
    ("<tool_call>", "</tool_call>", "<result>", "</result>"),
)

GENERATION = Family(
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    CHATML.special,
)

EMPTY_GENERATION = Family(
    GENERATION.template.replace(
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}",
        "{% generation %}{% endgeneration %}{{ m.content + '<|im_end|>' }}",
    ),
    CHATML.special,
)

GENERATION_OF_LAST = Family(
    GENERATION.template.replace("{% if m.role == 'assistant' %}", "{% if m.role == 'assistant' and loop.last %}"),
    CHATML.special,
)

SEES_LENGTH = Family(
    CHATML.template.replace("m.content +", "(m.content if m.content | length < 20 else m.content[:20]) +"),
    CHATML.special,
)

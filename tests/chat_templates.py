"""A chat template for tests."""

from __future__ import annotations

from tinkerbell_server.engines.torch.tiny_model import CHAT_TEMPLATE

WITH_TOOLS = (
    "{% if tools %}{{ '<tools>' + (tools | tojson) }}{% endif %}{% if think %}{{ '<think>' }}{% endif %}"
    "{% for message in messages if message.tool_calls %}{% for call in message.tool_calls %}"
    "{{ '<call>' + call.function.name + (call.function.arguments | tojson) }}{% endfor %}{% endfor %}"
) + CHAT_TEMPLATE.replace("message['content']", "(message['content'] or '')")
"""The template of the embedded model, which also renders tools, calls and the variable `think`."""

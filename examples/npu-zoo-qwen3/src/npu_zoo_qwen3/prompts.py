"""Qwen3's conversations: ChatML, without a system message unless one is given (qwen.readthedocs.io, "Key Concepts").

The checkpoints bring a template of their own, which is taken then and has tools as well. Both make the same text of a
conversation without tools that ends with the user's message.
"""

from __future__ import annotations

from npu_zoo.api import PromptFormat, ReasoningFormat

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role not in ('system', 'user', 'assistant') -%}"
    "{{- raise_exception('roles are system, user and assistant, not ' ~ message.role) -}}"
    "{%- endif -%}"
    # Newlines stand between an answer and its reasoning, which has left the history.
    "{%- set content = message.content.lstrip('\n') if message.role == 'assistant' else message.content -%}"
    "{{- '<|im_start|>' ~ message.role ~ '\n' ~ content ~ '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)

PROMPT = PromptFormat(chat_template=CHAT_TEMPLATE, adds_bos=False)
REASONING = ReasoningFormat(start="<think>", end="</think>")

"""WizardCoder's prompt, after Stanford Alpaca's. Its checkpoints bring no chat template and its tokenizer adds bos."""

from __future__ import annotations

from npu_zoo.api import EvaluationFormat, PromptFormat

PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."

# The origin knows one instruction. Further turns repeat its two headings, each answer ended as the model ends it, and
# a system message stands in the preamble's place.
CHAT_TEMPLATE = (
    "{%- set given = messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | list -%}"
    "{{- (given | join('\n')) if given else '" + PREAMBLE + "' -}}"
    "{%- for message in messages -%}"
    "{%- if message.tool_calls -%}{{- raise_exception('this prompt format has no tools') -}}"
    "{%- elif message.role == 'user' -%}{{- '\n\n### Instruction:\n' ~ message.content -}}"
    "{%- elif message.role == 'assistant' -%}{{- '\n\n### Response:' ~ message.content ~ eos_token -}}"
    "{%- elif message.role != 'system' -%}"
    "{{- raise_exception('roles are system, user and assistant, not ' ~ message.role) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '\n\n### Response:' -}}{%- endif -%}"
)

PROMPT = PromptFormat(chat_template=CHAT_TEMPLATE, adds_bos=False)

# As the family's own scripts ask for HumanEval's functions.
EVALUATION = EvaluationFormat(instruction="Create a Python script for this problem:\n{prompt}", tabs=True)

"""DeepSeek-V2's, -V3's and -R1's prompts, for checkpoints that bring no template; theirs give the same text.

Calls of tools and what came of them stand in a history as R1's template has them. V2 was trained without tools.
"""

from __future__ import annotations

from npu_zoo.api import PromptFormat, ReasoningFormat, ToolFormat

_SYSTEM = (
    "{{- bos_token -}}"
    "{{- messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\n\n') -}}"
)
_OUTPUT = "'<｜tool▁output▁begin｜>' ~ message.content ~ '<｜tool▁output▁end｜>'"
_CALL = (
    "'<｜tool▁call▁begin｜>' ~ call.type ~ '<｜tool▁sep｜>' ~ call.function.name"
    " ~ '\\n```json\\n' ~ call.function.arguments ~ '\\n```<｜tool▁call▁end｜>'"
)

# R1's own template opens the calls and the outputs of a conversation once, also where there are several turns of them.
_CALLS = (
    "{%- set turn.outputs = false -%}"
    "{%- for call in message.tool_calls -%}"
    "{%- if turn.called -%}{{- '\n' -}}{%- else -%}"
    "{{- '<｜Assistant｜>' ~ (message.content or '') ~ '<｜tool▁calls▁begin｜>' -}}{%- endif -%}"
    "{%- set turn.called = true -%}{{- " + _CALL + " -}}"
    "{%- endfor -%}"
    "{{- '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' -}}"
)


def _turns(answer: str, opening: str, between_outputs: str) -> str:
    outputs = (
        "{{- '" + between_outputs + "' if turn.answered else '<｜tool▁outputs▁begin｜>' -}}{{- " + _OUTPUT + " -}}"
        "{%- set turn.outputs = true -%}{%- set turn.answered = true -%}"
    )
    return (
        _SYSTEM + "{%- set turn = namespace(called=false, outputs=false, answered=false) -%}"
        "{%- for message in messages -%}"
        "{%- if message.role == 'user' -%}{%- set turn.outputs = false -%}{{- '<｜User｜>' ~ message.content -}}"
        "{%- elif message.role == 'assistant' and message.tool_calls -%}"
        + _CALLS
        + "{%- elif message.role == 'assistant' and turn.outputs -%}{%- set turn.outputs = false -%}"
        "{{- '<｜tool▁outputs▁end｜>' ~ message.content ~ '<｜end▁of▁sentence｜>' -}}"
        "{%- elif message.role == 'assistant' -%}"
        "{{- '<｜Assistant｜>' ~ " + answer + " ~ '<｜end▁of▁sentence｜>' -}}"
        "{%- elif message.role == 'tool' -%}" + outputs + "{%- endif -%}"
        "{%- endfor -%}"
        "{%- if turn.outputs -%}{{- '<｜tool▁outputs▁end｜>' -}}"
        "{%- elif add_generation_prompt -%}{{- '<｜Assistant｜" + opening + "' -}}{%- endif -%}"
    )


_INSTRUCTIONS = """## Tools
These functions can be called. Call one only where it helps, with arguments that the conversation gives.
{% for tool in tools %}

### {{ tool.function.name }}
{% if tool.function.description %}
{{ tool.function.description }}
{% endif %}
Arguments as a JSON schema: {{ (tool.function.parameters or {"type": "object", "properties": {}}) | tojson }}
{% endfor %}

To call NAME with ARGUMENTS, a JSON object of its schema, end the reply with
"""


def _tool_format(before_name: str, before_arguments: str, after_arguments: str, between: str) -> ToolFormat:
    begin, end = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    call_begin, call_end = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
    call = f"{call_begin}{before_name}NAME{before_arguments}ARGUMENTS{after_arguments}{call_end}"
    several = "each on lines of its own" if between else "one directly behind the other"
    return ToolFormat(
        begin=begin,
        end=end,
        call_begin=call_begin,
        call_end=call_end,
        before_name=before_name,
        before_arguments=before_arguments,
        after_arguments=after_arguments,
        between=between,
        instructions=f"{_INSTRUCTIONS}{begin}{call}{end}\nSeveral calls stand within one pair of these, {several}.",
    )


TOOLS = _tool_format("function<｜tool▁sep｜>", "\n```json\n", "\n```", "\n")
V31_TOOLS = _tool_format("", "<｜tool▁sep｜>", "", "")
REASONING = ReasoningFormat(start="<think>", end="</think>")
PROMPT = PromptFormat(chat_template=_turns("message.content", ">", "\\n"), adds_bos=True)
R1_PROMPT = PromptFormat(
    chat_template=_turns("message.content.split('</think>')[-1]", "><think>\\n", ""), adds_bos=True
)
V2_PROMPT = PromptFormat(
    chat_template=(
        "{{- bos_token -}}"
        "{%- for message in messages -%}"
        "{%- if message.role == 'user' -%}{{- 'User: ' ~ message.content ~ '\n\n' -}}"
        "{%- elif message.role == 'assistant' -%}{{- 'Assistant: ' ~ message.content ~ eos_token -}}"
        "{%- elif message.role == 'system' -%}{{- message.content ~ '\n\n' -}}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"
    ),
    adds_bos=True,
)

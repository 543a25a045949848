"""Chat layouts of our own, as Jinja, for tokenizers that bring no template."""

from __future__ import annotations

# Hermes' way of calling tools, which most ChatML models know
CHATML = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{% endif %}
{{- 'You may call the functions below: {"name": ..., "arguments": ...} inside <tool_call></tool_call>.\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{% endfor %}
{{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
{%- if not (tools and loop.first and m.role == 'system') %}
{{- '<|im_start|>' + m.role + '\\n' + m.content }}
{%- for call in m.tool_calls or [] %}
{{- ('\\n' if m.content or not loop.first else '') + '<tool_call>\\n' + (call.function | tojson) + '\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""

# the newline after <|assistant|> is the model's to write, as in ChatGLM's own code; its tokenizer adds [gMASK]<sop>
CHATGLM = """\
{%- if tools %}
{{- '<|system|>\\n' }}
{%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{% endif %}
{{- 'Tools:' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{% endfor %}
{%- endif %}
{%- for m in messages %}
{%- if not (tools and loop.first and m.role == 'system') %}
{%- if m.content or not m.tool_calls %}
{{- '<|' + ('observation' if m.role == 'tool' else m.role) + '|>\\n' + m.content }}
{%- endif %}
{%- for call in m.tool_calls or [] %}
{{- '<|assistant|>' + call.function.name + '\\n' + (call.function.arguments | tojson) }}
{%- endfor %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{% endif %}
"""

BUILT_IN = {"chatml": CHATML, "chatglm": CHATGLM}


def close_with(template: str, end: str) -> str:
    """ChatML whose turns end with `end`: a tokenizer without <|im_end|> closes them with its eos."""
    return template.replace("<|im_end|>", end)

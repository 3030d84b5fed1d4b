"""The chat format of `model.chat` as a Jinja template, for software that renders prompts itself.

The template that was released with the checkpoints names tokens that do not exist in earlier
turns, so it is not used.
"""

from __future__ import annotations

import json

# A system message stands in front unless the conversation brings its own. An image part becomes
# its placeholder on a line of its own, as the released evaluation code writes it.
_TEMPLATE = """\
{%- set default_system = SYSTEM %}
{%- if default_system and not (messages and messages[0]['role'] == 'system') %}
    {{- '<|im_start|>system\\n' + default_system + '<|im_end|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] not in ('system', 'user', 'assistant') %}
        {{- raise_exception('roles are system, user, assistant; got ' + message['role']) }}
    {%- endif %}
    {%- if message['role'] == 'system' and not loop.first %}
        {{- raise_exception('a system turn may only come first') }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image' %}
                {{- '<image>\\n' }}
            {%- elif part['type'] == 'text' %}
                {{- part['text'] }}
            {%- else %}
                {{- raise_exception('give a ' + part['type'] + ' as images, one a frame') }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def chat_template(system_message: str) -> str:
    """The template whose default system turn is `system_message`; "" for none."""
    return _TEMPLATE.replace("SYSTEM", json.dumps(system_message, ensure_ascii=False), 1)

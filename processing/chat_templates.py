"""Chat templates of the LLaVA family, with markers around what the assistant says.

Both give the prompts of the LLaVA authors' `conv_vicuna_v1` and `chatml_direct` (`llava/conversation.py`), character
by character. The generation prompt is what stands before the marked text, so training and generation agree.
"""

from __future__ import annotations

from collections.abc import Mapping


# An image or video part stands on its own line: "<image>\nWhat is this?". Text parts are joined as they are.
_CONTENT = """
{%- macro content(message) -%}
{%- if message.content is string -%}{{ message.content }}
{%- else -%}
{%- set last = namespace(type=none) -%}
{%- for part in message.content or [] -%}
{%- if last.type and (part.type != 'text' or last.type != 'text') -%}{{ '\\n' }}{%- endif -%}
{%- if part.type == 'image' -%}{{ image_token | default('<image>') }}
{%- elif part.type == 'video' -%}{{ video_token | default('<video>') }}
{%- else -%}{{ part.text }}{%- endif -%}
{%- set last.type = part.type -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""

VICUNA_CHAT_TEMPLATE = (
    _CONTENT
    + """
{%- if messages[0].role == 'system' -%}
{{ content(messages[0]) + ' ' }}
{%- else -%}
{{ "A chat between a curious user and an artificial intelligence assistant. " }}
{{- "The assistant gives helpful, detailed, and polite answers to the user's questions. " }}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{ 'USER: ' + content(message) + ' ' }}
{%- elif message.role == 'assistant' -%}{{ 'ASSISTANT:' }}
{%- generation -%}{{ ' ' + content(message) + (eos_token or '') }}{%- endgeneration -%}
{%- elif message.role != 'system' or not loop.first -%}
{{ raise_exception('Role ' + message.role + ' has no place here. Use user, assistant, or system first.') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""
)

CHATML_CHAT_TEMPLATE = (
    _CONTENT
    + """
{%- for message in messages -%}
{%- if message.role not in ['system', 'user', 'assistant', 'tool'] -%}
{{ raise_exception('Role ' + message.role + ' is unknown. Use system, user, assistant or tool.') }}
{%- endif -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{ content(message) + '<|im_end|>' }}{%- endgeneration -%}
{%- else -%}{{ content(message) + '<|im_end|>' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
)

CHAT_TEMPLATES = {"vicuna": VICUNA_CHAT_TEMPLATE, "chatml": CHATML_CHAT_TEMPLATE}


def chosen_template(own: str | Mapping[str, str] | None, name: str | None) -> str:
    """Jinja source of the template that a chat is written with.

    Args:
        own: The processor's template, or several by name.
        name: Which one the call asks for: a name, or Jinja source.

    Raises:
        ValueError: There is none, or there are several and no default.
    """
    if isinstance(own, Mapping):
        known = {**CHAT_TEMPLATES, **own}
        if name is None and "default" not in own:
            raise ValueError(f"`chat_template` must name one of this processor's templates: {', '.join(sorted(own))}.")
        name = "default" if name is None else name
        return known.get(name, name)
    template = own if name is None else name
    if template is None:
        raise ValueError(
            "This processor has no chat template. Pass `chat_template='vicuna'`, 'chatml' or Jinja source."
        )
    return CHAT_TEMPLATES.get(template, template)


def with_joined_content(template: str, system: str | None = None) -> str:
    """A language model's own template, which knows text alone, for messages with images.

    Args:
        template: Jinja source that reads each message's `content` as a string.
        system: System prompt of chats that bring none.
    """
    default = "[]" if system is None else f"[{{'role': 'system', 'content': {system!r}}}]"
    return (
        _CONTENT
        + "{%- set joined = namespace(messages=[]) -%}"
        + "{%- if messages[0].role != 'system' -%}{%- set joined.messages = "
        + default
        + " -%}{%- endif -%}"
        + "{%- for message in messages -%}"
        + "{%- set part = {'role': message.role, 'content': content(message)} -%}"
        + "{%- set joined.messages = joined.messages + [part] -%}"
        + "{%- endfor -%}"
        + "{%- set messages = joined.messages -%}"
        + template
    )

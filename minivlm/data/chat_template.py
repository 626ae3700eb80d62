"""How a conversation becomes one string, as Jinja: the form in which other programs read it.

`processor.MiniVLMProcessor` renders by itself, because it has to know which ids are an answer's; tests hold both equal.
"""

from minivlm.config import IMAGE_TOKEN


def chat_template(start: str, end: str, system: str | None = None) -> str:
    """The template of a model whose turns begin with the token `start` and end with `end`.

    One turn may be a string or a list of parts; an image is a part of its own and ends its line. `system` is what a
    system turn says before every conversation that has none of its own; None puts none there.
    """
    template = (
        "{% for message in messages %}START{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}IMAGE\n{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}{% endif %}END\n{% endfor %}"
        "{% if add_generation_prompt %}STARTassistant\n{% endif %}"
    )
    template = template.replace("IMAGE", IMAGE_TOKEN).replace("START", start).replace("END", end)
    if system is None:
        return template
    text = "".join(f"\\u{ord(letter):04x}" if letter in "\\'\"{}%" or ord(letter) < 32 else letter for letter in system)
    return f"{{% if messages[0]['role'] != 'system' %}}{start}system\n{{{{ '{text}' }}}}{end}\n{{% endif %}}" + template

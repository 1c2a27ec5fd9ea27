"""Named chat templates, for tokenizers that come without one."""

from __future__ import annotations

# A system message opens the first user message, where a template has no place of its own for it.
_FOLDED = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system, turns = messages[0]['content'] | trim, messages[1:] %}"
    "{% else %}{% set system, turns = '', messages %}{% endif %}"
    "{% for message in turns %}"
    "{% if message['role'] == 'system' or (loop.first and message['role'] != 'user') %}"
    "{{ raise_exception('a system message must come first, and the user next') }}{% endif %}"
)

# The paper's. An answer opens with a space, and there is no place for a system message.
OFFICIAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [\\INST]"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('the official template has no system message') }}"
    "{% endif %}{% endfor %}"
)

LLAMA2 = (
    _FOLDED + "{% if message['role'] == 'user' %}{{ bos_token }}[INST] "
    "{% if loop.first and system %}{{ '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{% endif %}"
    "{{ message['content'] | trim }} [/INST]"
    "{% else %} {{ message['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

MISTRAL = (
    "{{ bos_token }}" + _FOLDED + "{% if message['role'] == 'user' %}[INST] "
    "{% if loop.first and system %}{{ system + '\\n\\n' }}{% endif %}"
    "{{ message['content'] }} [/INST]"
    "{% else %} {{ message['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)

GEMMA = (
    "{{ bos_token }}" + _FOLDED + "<start_of_turn>"
    "{{ ('model' if message['role'] == 'assistant' else 'user') + '\\n' }}"
    "{% if loop.first and system %}{{ system + '\\n\\n' }}{% endif %}"
    "{{ message['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

# Ordinary text, which every tokenizer can read.
PLAIN = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] | capitalize }}: {{ message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)

CHAT_TEMPLATES = {
    "official": OFFICIAL,
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "chatml": CHATML,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "plain": PLAIN,
}

# The tokens of a model that a template is written in.
TEMPLATE_TOKENS = {
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
}

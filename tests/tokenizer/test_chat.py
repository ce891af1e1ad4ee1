"""Chat templates are rendered as transformers renders them, and cannot leave the sandbox."""

from __future__ import annotations

import pytest
from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from transformers.utils.chat_template_utils import render_jinja_template

from lora_deploy.tokenizer.chat import render_chat

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
MESSAGES = [
    {"role": "system", "content": "  Be <b>brief</b> & 'kind' "},
    {"role": "user", "content": "Grüße\n\n{{ 7 * 7 }} {% endif %}"},
    {"role": "assistant", "content": "ok"},
    {"role": "user", "content": ""},
]
TEMPLATES = {
    "blocks are trimmed": "{% for m in messages %}\n    {% if loop.first %}\n  {{ bos_token }}\n    {% endif %}\n"
    "{{ m.role }}: {{ m['content'] | trim }}\n{%- endfor %}\n\n{{ eos_token }}\n",
    "prompt": "{% if add_generation_prompt is defined and add_generation_prompt %}yes{% else %}no{% endif %}",
    "loop controls": "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ m.content }}"
    "{% if loop.index0 == 2 %}{% break %}{% endif %}{% endfor %}",
    "json": "{{ messages | tojson }}{{ messages[1] | tojson(indent=2, sort_keys=true) }}"
    "{{ {'ü': 1} | tojson(ensure_ascii=true, separators=(',', ':')) }}",
    "namespace": "{% set ns = namespace(n=0, self=5) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}{{ ns.self }}{% set other = namespace({'a': 1}, b=2) %}{{ other.a + other.b }}",
    "dict": "{% set d = dict(a=1) %}{{ d.a }}{{ dict.fromkeys(['x', 'y'], 3) }}{{ dict([('k', 'v')]) }}",
    "generation": "{% for m in messages %}{% set mark = 'outside' %}{% generation %}{{ m.content }}"
    "{% set mark = 'inside' %}{% endgeneration %}{{ mark }}{% endfor %}",
    "what is not there": "{{ tools is none }}{{ documents is none }}{{ pad_token }}{{ messages[0].name }}"
    "{{ messages[0].get('x', 'z') }}{% if tools %}tools{% endif %}",
    "functions": "{{ range(3) | list }}{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') "
    "| join('|') }}{{ 'a,b'.split(',') | last }}{{ messages[-1].role.upper() }}{{ lipsum is defined }}",
    "macro": "{% macro show(m, n=2) %}{{ m.role * n }}{{ caller() if caller else '' }}{% endmacro %}"
    "{{ show(messages[0]) }}{% call show(messages[1], n=1) %}!{% endcall %}",
    "date": "{{ strftime_now('%Y-%m-%d') }}",
}
REFUSED = {
    "raised": "{{ raise_exception('no ' + messages[0].role) }}",
    "no syntax": "{% for m in messages %}",
    "undefined": "{{ nothing.there }}",
    "out of the sandbox": "{{ ''.__class__.__mro__ }}{{ messages.__class__.__base__.__subclasses__() }}",
    "changed list": "{{ messages.append(1) }}",
    "private name": "{{ namespace(_x=1) }}",
    "private name set": "{% set ns = namespace() %}{% set ns.__init__ = 1 %}",
}


def theirs(template: str, prompt: bool) -> str:
    (text,) = render_jinja_template([MESSAGES], chat_template=template, add_generation_prompt=prompt, **SPECIAL)[0]
    return str(text)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_a_template_gives_what_it_gives_in_transformers(name: str, prompt: bool) -> None:
    found = render_chat(TEMPLATES[name], MESSAGES, SPECIAL, add_generation_prompt=prompt)
    assert found == theirs(TEMPLATES[name], prompt)
    assert found


@pytest.mark.parametrize("name", REFUSED)
def test_what_transformers_refuses_is_refused(name: str) -> None:
    errors = []
    for render in (lambda: render_chat(REFUSED[name], MESSAGES, SPECIAL), lambda: theirs(REFUSED[name], False)):
        with pytest.raises(TemplateError) as raised:
            render()
        errors.append(type(raised.value))
    assert errors[0] is errors[1]
    assert (errors[0] is SecurityError) == name.startswith(("out", "changed", "private"))


def test_messages_are_not_changed() -> None:
    before = [dict(message) for message in MESSAGES]
    render_chat(TEMPLATES["json"], MESSAGES, SPECIAL)
    assert before == MESSAGES

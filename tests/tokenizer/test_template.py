"""Chat templates give what transformers gives, and can neither run code nor fill the memory."""

import datetime
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import hostile_templates

from stellarbyte_jax.tokenizer import costs
from stellarbyte_jax.tokenizer.template import ChatTemplate

LOOP = "{% for m in messages %}{{ m.content }}{% endfor %}"
MESSAGES = [{"role": "user", "content": "is 1 < 2 & 'so' \u00e9"}, {"role": "assistant", "content": " yes\n"}]
TEMPLATES = {
    "plain": "{{ bos_token }}" + LOOP,
    "trim and lstrip blocks": "{% for m in messages %}\n  {% if loop.first %}\n{{ m.content }}\n  {% endif %}\n"
    "{% endfor %}\n",
    "generation tag": "{% for m in messages %}{% generation %}[{{ m.content }}]{% endgeneration %}{% endfor %}",
    "generation tag in a condition": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "break": "{% for m in messages %}{{ m.content }}{% break %}{% endfor %}",
    "continue": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "strftime_now": "{{ strftime_now('%Y') }}" + LOOP,
    "tojson": "{% for m in messages %}{{ m | tojson }}{{ m.content | tojson(indent=2) }}{% endfor %}",
    "an argument in the first line": "{%- set thinks = false %}{% macro f() %}{{ thinks is defined }}{% endmacro %}"
    "{% for m in messages %}{% if thinks is defined and not thinks %}{{ m.content }}{% endif %}{% endfor %}{{ f() }}",
    "tools and documents": "{{ tools is none }} {{ documents is none }}" + LOOP,
    "special tokens": "{{ unk_token }}{{ pad_token }}{{ mask_token }}" + LOOP,
    "add_generation_prompt": LOOP + "{% if add_generation_prompt %}>{% endif %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "calls in loops and blocks": "{% block a %}{% for m in messages %}{{ m.content.split('&')[0].strip() }}"
    "{{ m.content.replace('so', 'as', 1) }}{{ ' '.join([m.role, 'x']) }}{% endfor %}{% endblock %}{{ self.a() }}",
    "macros": "{% macro f(m, n=2) %}{{ m.role * n }}{{ caller() if caller }}{% endmacro %}"
    "{% for m in messages %}{{ f(m) }}{% call f(m, n=1) %}!{% endcall %}{% endfor %}",
    "filters": "{{ messages | map(attribute='role') | join(', ') }}"
    "{{ messages | selectattr('role', '==', 'user') | list }}"
    "{{ messages | rejectattr('role', 'in', ['user']) | map(attribute='content') | first | trim | replace('e', 'E') }}"
    "{{ [3, 1] | sort | join }}{{ 'a b' | title }}{{ messages | batch(2) | list | length }}{{ '%s!' | format('a') }}"
    "{{ 2.345 | round(2) }}{{ 'a\nb' | indent(2) }}{{ {'b': 1, 'a': 2} | dictsort }}{{ none | default('x', true) }}",
    "sets": "{% set x %}{% for m in messages %}{{ m.role }}{% endfor %}{% endset %}{{ x | upper }}{{ x ~ 1 ~ none }}"
    "{% filter lower %}ABC{{ x }}{% endfilter %}{% set a, b = 1, [2] %}{{ a + b[0] }}{{ (b + [a])[::-1] }}",
    "recursive loop": "{% for m in [1, [2, [3]]] recursive %}({{ loop(m) if m is iterable else m }}){% endfor %}",
    "a loop": "{% for m in messages %}{{ loop | string | length }}{{ m.role }}{% endfor %}",
    "safe text": "{{ messages[0].content + ('!' | safe) }}{{ ('<' | safe) + messages[0].content }}"
    "{% autoescape true %}{{ ('<' | safe) ~ messages[0].content }}{{ messages[0].content ~ '<' }}{% endautoescape %}",
    "methods": "{{ messages[0]['content'].split('&')[0].strip() }}{{ '%s-%03d' % ('a', 7) }}{{ 'ab'.center(6, '.') }}"
    "{{ '{:>5}'.format(3) }}{{ '-' * 5 }}{{ 2 ** 3 }}",
}
SPECIAL = {"bos_token": "<s>", "unk_token": "<unk>", "pad_token": "<pad>"}


def transformers_text(source, messages, **values):
    from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template([messages], chat_template=source, **values)[0][0]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_the_text_is_that_of_transformers(name, prompt):
    expected = transformers_text(TEMPLATES[name], MESSAGES, add_generation_prompt=prompt, **SPECIAL)
    found = ChatTemplate(TEMPLATES[name], SPECIAL, "here").render(MESSAGES, add_generation_prompt=prompt)
    assert found == expected
    if name == "strftime_now":
        assert found.startswith(str(datetime.datetime.now().year))


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_thoughts_have_the_names_that_templates_read(name):
    """Those of gpt-oss read one, others another, and data sets have a third."""
    messages = [{"role": "assistant", "content": "4", name: "add"}, {"role": "user", "content": "", name: None}]
    source = "{% for m in messages %}{{ m.thinking }}|{{ m.reasoning_content }}|{{ m.content }};{% endfor %}"
    text = ChatTemplate(source, {}, "here").render(messages, add_generation_prompt=False)
    assert text.startswith("add|add|4;") and "add" not in text[len("add|add|4;") :]
    both = [{"content": "4", "thinking": "a", "reasoning_content": "b"}]
    assert ChatTemplate(source, {}, "here").render(both, add_generation_prompt=False) == "a|b|4;"


def test_what_a_template_may_not_do_is_one_short_line():
    """All in one process with limits of its own; one that ends it, and those after it, are missing."""
    done = subprocess.run(
        [sys.executable, hostile_templates.__file__], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    found = dict(json.loads(line) for line in done.stdout.splitlines())
    wrong = {
        name: found.get(name, "no answer")
        for name, (_, said) in hostile_templates.TEMPLATES.items()
        if not re.search(f"^the chat template of here refuses the messages: .*({said})", found.get(name, ""))
        or "\n" in found[name]
        or len(found[name]) >= 500
    }
    assert not wrong


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("{{ messages[0].content.text.x }}", "'str object' has no attribute 'text'"),
        ("{{ messages[0].content + {} }}", "unsupported operand type(s) for +: 'str' and 'dict'"),
    ],
)
def test_a_text_is_a_str_in_what_is_told_of_a_template(source, told):
    with pytest.raises(ValueError, match=r"refuses the messages: ") as raised:
        ChatTemplate(source, {}, "here").render(MESSAGES, add_generation_prompt=False)
    assert str(raised.value).endswith(told)


def test_a_long_conversation_is_rendered():
    """Each step of a template is allowed once for each message, however many there are."""
    source = (
        "{% for m in messages %}{% if m.content is string and m.role != 'system' %}{% if '</t>' in m.content %}"
        "{{ m.content.split('</t>')[-1].lstrip() | trim }}{% else %}{{ m.role + ': ' ~ m.content }}{% endif %}"
        "{{ '!' if loop.index0 == messages | length - 1 }}{% endif %}{% endfor %}"
    )
    messages = [
        {"role": "user", "content": "why? " * 200 + str(i)}
        if i % 2
        else {"role": "assistant", "content": "<t>x</t> so"}
        for i in range(6000)
    ]
    found = ChatTemplate(source, {}, "here").render(messages, add_generation_prompt=False)
    assert found == transformers_text(source, messages)


@pytest.mark.parametrize(("count", "size"), [(1000, 2000), (2000, 300), (140, 30_000)])
def test_a_text_that_is_put_together_piece_by_piece_is_rendered(count, size):
    """As templates of DeepSeek do it for a part of the conversation; a piece costs what is there already."""
    source = (
        "{% set ns = namespace(t='') %}{% for m in messages %}"
        "{% set ns.t = ns.t + m.role + ': ' + m.content + '\\n' %}{% endfor %}{{ ns.t }}"
    )
    messages = [{"role": "user", "content": "a" * size}] * count
    found = ChatTemplate(source, {}, "here").render(messages, add_generation_prompt=False)
    assert found == ("user: " + "a" * size + "\n") * count


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ messages[0].content.split() | length }}", "250000"),
        ("{{ (messages[0].content * 2).split('o', 1) | length }}", "2"),
        ("{{ messages[0].content.replace('w', 'b' * 10**4, 1) | length }}", "1259999"),
    ],
)
def test_what_a_template_may_do_with_a_long_message(source, text):
    messages = [{"content": "word " * 250_000}]
    assert ChatTemplate(source, {}, "here").render(messages, add_generation_prompt=False) == text


def test_a_template_may_go_through_the_lines_of_a_message(monkeypatch):
    monkeypatch.setattr(costs, "MOST_STEPS", 100)
    source = "{% for line in messages[0].content.split('\n') %}{{ '- ' ~ line | trim if line }}{% endfor %}"
    messages = [{"content": " a line\n" * 2000}]
    assert ChatTemplate(source, {}, "here").render(messages, add_generation_prompt=False) == "- a line" * 2000


def test_each_rendering_has_its_own_steps():
    template = ChatTemplate("{% for i in range(99999) %}{{ 'a' ~ i if i < 0 }}{% endfor %}x", {}, "here")
    for _ in range(3):  # of about 400,000 steps
        assert template.render(MESSAGES, add_generation_prompt=False) == "x"


@pytest.mark.parametrize(
    "source",
    [
        "{% for %}",
        "{{",
        "{% generation %}",
        "{% unknown %}",
        "(" * 5000 + "{{" + "(" * 5000,
        "{% for a in [1] %}" * 25 + "{% endfor %}" * 25,
    ],
)
def test_what_is_no_template_is_one_short_line(source):
    with pytest.raises(ValueError, match=r"^the chat template of here is not valid: ") as caught:
        ChatTemplate(source, SPECIAL, "here")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500

"""Chat templates give what transformers gives, and can neither run code nor fill the memory."""

import datetime

import pytest

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
    "tools and documents": "{{ tools is none }} {{ documents is none }}" + LOOP,
    "special tokens": "{{ unk_token }}{{ pad_token }}{{ mask_token }}" + LOOP,
    "add_generation_prompt": LOOP + "{% if add_generation_prompt %}>{% endif %}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "methods": "{{ messages[0]['content'].split('&')[0].strip() }}{{ '%s-%03d' % ('a', 7) }}{{ 'ab'.center(6, '.') }}"
    "{{ '{:>5}'.format(3) }}{{ '-' * 5 }}{{ 2 ** 3 }}",
}
SPECIAL = {"bos_token": "<s>", "unk_token": "<unk>", "pad_token": "<pad>"}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prompt", [True, False])
def test_the_text_is_that_of_transformers(name, prompt):
    from transformers.utils.chat_template_utils import render_jinja_template

    expected, _ = render_jinja_template(
        [MESSAGES], chat_template=TEMPLATES[name], add_generation_prompt=prompt, **SPECIAL
    )
    found = ChatTemplate(TEMPLATES[name], SPECIAL, "here").render(MESSAGES, add_generation_prompt=prompt)
    assert found == expected[0]
    if name == "strftime_now":
        assert found.startswith(str(datetime.datetime.now().year))


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**11 }}",
        "{{ 10**9 * 'a' }}",
        "{{ [1] * 10**9 }}",
        "{{ 10 ** 10 ** 9 }}",
        "{{ 'a'.ljust(10**11) }}",
        "{{ 'a' | center(10**11) }}",
        "{{ 'a' | indent(10**11) }}",
        "{{ '%99999999999d' % 1 }}",
        "{{ '%*d' % (10**11, 1) }}",
        "{{ '%99999999999d' | format(1) }}",
        "{{ '{:99999999999}'.format(1) }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
        "{{ range(10**9) }}",
        "{% include 'x' %}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages[9].content.x }}",
        "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ raise_exception('no roles\nhere') }}",
    ],
)
def test_what_a_template_may_not_do_is_one_short_line(source):
    with pytest.raises(ValueError, match=r"^the chat template of here refuses the messages: ") as caught:
        ChatTemplate(source, SPECIAL, "here").render(MESSAGES, add_generation_prompt=True)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{", "{% generation %}", "{% unknown %}", "(" * 5000 + "{{" + "(" * 5000]
)
def test_what_is_no_template_is_one_short_line(source):
    with pytest.raises(ValueError, match=r"^the chat template of here is not valid: ") as caught:
        ChatTemplate(source, SPECIAL, "here")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500

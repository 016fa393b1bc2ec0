"""Chat templates: any text ends in one line, a valid one renders as transformers renders it."""

from helpers.hostile import TEXTS, accepts
from hypothesis import example, given
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from stellarbyte_jax.tokenizer.provenance import said
from stellarbyte_jax.tokenizer.template import ChatTemplate

MESSAGES = [
    {"role": "user", "content": "is 1 < 2 & 'so' é\n"},
    {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": [1, None]}}]},
]
SPECIAL = {"bos_token": "<s>"}

# Expressions that mean something: each grows from smaller ones. None is large, since transformers has no limits.
ATOMS = st.sampled_from(
    "messages m n none true '' 'ab' 'Ab\\t' 0 1 -2 2.5 [] [1,'a'] {'a':1} (1,2) range(3) bos_token tools loop"
    " nothing messages[0].content messages[-1]['role'] messages[1:] messages[0].content[::-2]"
    " ns.x m.role m.content m.tool_calls loop.index".split()
)
FILTERS = st.sampled_from(
    "tojson tojson(indent=2) length count first last upper lower title trim list string int float abs join join('-')"
    " default('d') default('d',true) d(1) sort unique|list reverse|list items|list dictsort map('string')|list"
    " indent(2) map(attribute='role')|list selectattr('role')|list select|list reject('none')|list replace('a','bc')"
    " safe batch(2)|list slice(2)|list sum round round(1,'floor') center(9) wordcount truncate(4,true) wordwrap(3)"
    " format(1) urlencode groupby('role') min max attr('x') capitalize striptags forceescape pprint xmlattr".split()
)
TESTS = st.sampled_from(
    "defined none string mapping iterable number sequence odd true sameas(1) eq(1) in([1]) lower boolean".split()
)
METHODS = st.sampled_from(
    ".strip() .split('a') .split() .startswith('a') .upper() .replace('a','b') .items() .get('role') .keys()|list"
    " .join(['x','y']) .format(1) .index('a') .count(1) .lstrip('a') .splitlines() .rsplit(None,1) .encode() .find('b')"
    " .title() .zfill(4) .ljust(5) .expandtabs(2) .partition('a') .rfind('b') [0] ['role'] .copy()".split()
)


def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.builds("{}|{}".format, inner, FILTERS),
        st.builds("({}){}".format, inner, METHODS),
        st.builds("({}) is {}".format, inner, TESTS),
        st.builds("({}) is not {}".format, inner, TESTS),
        st.builds("({}){}({})".format, inner, st.sampled_from(["+", "~", "-", "%", "//", "/", "and", "or"]), inner),
        st.builds("({}) {} ({})".format, inner, st.sampled_from(["==", "!=", "<", ">=", "in", "not in"]), inner),
        st.builds("({}) * {}".format, inner, st.integers(-1, 3)),
        st.builds("({} if {} else {})".format, inner, inner, inner),
        st.builds("not ({})".format, inner),
        st.builds("[{}, {}]".format, inner, inner),
        st.builds("{{'k':{}}}".format, inner),
    )


EXPRESSIONS = st.recursive(ATOMS, grown, max_leaves=5)


def nested(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.builds("{}{}".format, inner, inner),
        st.builds("{{% if {} %}}{}{{% else %}}{}{{% endif %}}".format, EXPRESSIONS, inner, inner),
        st.builds("{{% for m in {} %}}\n{}{{% else %}}e{{% endfor %}}".format, EXPRESSIONS, inner),
        st.builds("{{% for m in messages if {} %}}{}{{% break %}}{{% endfor %}}".format, EXPRESSIONS, inner),
        st.builds("{{% for m in [1,[2,[3]]] recursive %}}{}{{{{ loop(m) }}}}{{% endfor %}}".format, inner),
        st.builds("{{% set n = {} %}}{}".format, EXPRESSIONS, inner),
        st.builds("{{% set n %}}{}{{% endset %}}{{{{ n }}}}".format, inner),
        st.builds("{{% set ns = namespace(x={}) %}}{{% set ns.x = ns.x ~ 1 %}}{}".format, EXPRESSIONS, inner),
        st.builds("{{% macro f(m, n=1) %}}{}{{% endmacro %}}{{{{ f({}) }}}}".format, inner, EXPRESSIONS),
        st.builds("{{% macro f() %}}{{{{ caller() }}}}{{% endmacro %}}{{% call f() %}}{}{{% endcall %}}".format, inner),
        st.builds("{{% filter {} %}}{}{{% endfilter %}}".format, st.sampled_from(["upper", "trim", "indent"]), inner),
        st.builds("{{% generation %}}{}{{% endgeneration %}}".format, inner),
        st.builds("{{% block b %}}{}{{% endblock %}}".format, inner),
        st.builds("{{%- with n = {} -%}} {} {{%- endwith -%}}".format, EXPRESSIONS, inner),
        st.builds("{{% autoescape true %}}{}{{% endautoescape %}}".format, inner),
    )


OUTPUTS = st.builds("{{{{ {} }}}}".format, EXPRESSIONS)
VALID = st.recursive(OUTPUTS | st.sampled_from(["text", "\n  ", "{# no #}", "{% continue %}"]), nested, max_leaves=4)
# The same, with numbers and texts that are too large for a template without limits.
HOSTILE = st.builds(
    lambda source, old, new: source.replace(old, new),
    VALID,
    st.sampled_from(["1", "2", "'ab'", "range(3)", "messages", "m", "upper", ")", "%}", "x"]),
    st.sampled_from(
        "10**10 99999999999 ('a'*10**6) range(99999) [[1]*9999]*9999 (10**9) f() 1e999 '\\0' lipsum(n=10**9) cycler(1)"
        " ''.__class__ namespace raise_exception('\\n'*9**6) self % {%".split()
    ),
)


def rendered(source: str) -> str:
    return ChatTemplate(source, SPECIAL, "here").render(MESSAGES, add_generation_prompt=True)


@given(HOSTILE | TEXTS)
@example("{{ " + "(" * 20_000)
@example("{% if " * 3000)
@example("{{ '\n' ~ raise_exception('x' * 200000) }}")
@example("{{ ''.__class__.__mro__[1].__subclasses__() }}")
def test_any_text_ends_in_one_line(source: str) -> None:
    accepts(lambda: rendered(source))


@given(VALID)
@example("{% for m in messages %}{{ m.content.split('a')[-1] }}{{ loop.index0 == messages|length - 1 }}{% endfor %}")
def test_a_valid_template_renders_as_transformers_renders_it(source: str) -> None:
    try:
        expected = render_jinja_template([MESSAGES], chat_template=source, add_generation_prompt=True, **SPECIAL)[0][0]
    except Exception:  # what is wrong in the template, in any way that Python can say it
        accepts(lambda: rendered(source))
    else:
        assert rendered(source) == expected


SAID = [
    {"role": "user", "content": "\u00a7a \u00a7 b\n\u00a7"},
    {"role": "assistant", "content": "", "tool_calls": [{"name": "\u00a7", "arguments": {"\u00a7": ["\u00a7", None]}}]},
]


@given(VALID)
def test_no_template_loses_what_a_message_brought(source: str) -> None:
    """A character that only messages have is never taken for the template's own."""
    try:
        text = ChatTemplate(source, SPECIAL, "here").render(SAID, add_generation_prompt=True)
    except ValueError:
        return
    places = {at for begin, end in said(text) for at in range(begin, end)}
    assert all(at in places for at, character in enumerate(text) if character == "\u00a7")

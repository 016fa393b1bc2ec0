"""Templates that would run for hours or fill the memory. As a program: renders each, in a limited process."""

import json
import resource
import sys

MESSAGES = [{"role": "user", "content": "hello"}]
TEXTS = "{% set x = 'a' * 10**6 %}{% set y = 'a' * 9999999 %}"
LISTS = "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
TUPLES = "{% set ns = namespace(x=(1,)) %}{% for i in range(60) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}"
BYTES = "{% set b = ('a' * 10**6).encode() %}"
KEPT = "{{% set ns = namespace(x=[]) %}}{{% for i in range(99999) %}}{{% set ns.x = ns.x + [{}] %}}{{% endfor %}}"
STEPS, LARGE, PADDING = "it takes|it reads", "a value of more than", "a width or a count above"
TEXT, LIST, NUMBER = "a text of [0-9]+ char", "a list of [0-9]+ elem", "a number that is too large"


def often(inner: str, times: int = 99999) -> str:
    return f"{{% for i in range({times}) %}}{inner}{{% endfor %}}"


def doubled(step: str, start: str = "'a' * 16") -> str:
    return f"{{% set ns = namespace(x={start}) %}}" + often(step, 40)


TEMPLATES = {
    # loops, calls and what they pass through
    "loops": (often(often("")), STEPS),
    "loops whose condition never holds": ("{% for i in range(9999) if i < 0 %}{% endfor %}" * 30, STEPS),
    "a wide body": (often("{% if i %}{% endif %}" * 2000), STEPS),
    "wide lists that are kept": (KEPT.format("[" + "1," * 2000 + "]"), STEPS),
    "a recursive loop": (
        "{% for a in [1] recursive %}{{ loop([1, 2]) if loop.depth < 60 }}{% endfor %}",
        STEPS,
    ),
    "macros": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        STEPS,
    ),
    "a macro with a wide body": (
        "{% macro f() %}" + "{% if i %}{% endif %}" * 4000 + "{% endmacro %}" + often("{{ f() }}", 9999),
        STEPS,
    ),
    "callers": (
        "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}" + "{% call m() %}" * 14 + "{% endcall %}" * 14,
        STEPS,
    ),
    "blocks": (
        "{% block a %}" + "{% if i %}{% endif %}" * 4000 + "{% endblock %}" + often("{{ self.a() }}", 9999),
        STEPS,
    ),
    # 9,000 passes with four calls each: 36,000 steps without what a call itself costs
    "calls": (
        "{% set c = cycler(1) %}" + often("{{ c.next() }}{{ c.next() }}{{ c.next() }}{{ c.next() }}", 9000),
        STEPS,
    ),
    "a filter in a loop": (often("{% set z = range(99999) | map('string') | list %}", 9999), STEPS),
    "tests in a loop": (TEXTS + often("{% set z = [y] | select('in', [y ~ '']) | list %}"), STEPS),
    "callers with a wide body": (
        "{% macro m() %}"
        + often("{{ caller() }}", 999)
        + "{% endmacro %}{% call m() %}"
        + "{% if i %}{% endif %}" * 4000
        + "{% endcall %}",
        STEPS,
    ),
    # reading a long text again and again
    "slices": (TEXTS + often("{% set z = y[1:] %}"), STEPS),
    "comparisons": (TEXTS + "{% set z = y ~ '' %}" + often("{% if z == y %}{% endif %}"), STEPS),
    "containment": (TEXTS + often("{% if 'b' in y %}{% endif %}"), STEPS),
    "methods": (TEXTS + often("{% set z = y.upper() %}"), STEPS),
    "methods of lists": ("{% set l = [1] * 10**4 %}" + often("{% set z = l.count(2) %}", 9999), STEPS),
    "operators": ("{% set l = [1] * 10**5 %}" + often("{% set z = l + [1] %}"), STEPS),
    "sorting": ("{% set l = ['a' * 10**6] * 9 %}" + often("{% set z = l | sort %}"), STEPS),
    "a search from behind": (TEXTS + "{{ x.rfind('b' + x[:500000]) }}", STEPS),
    "stripped characters": (TEXTS + "{{ y.strip('b' + x) }}", STEPS),
    "a slow filter": (TEXTS + "{{ y | title | length }}", STEPS),
    "batches that are kept": (KEPT.format("[1] | batch(99999, 1) | list"), STEPS),
    "texts that are kept": (KEPT.format("'a' * 9999999"), STEPS),
    # growth by doubling
    "doubled by ~": (doubled("{% set ns.x = ns.x ~ ns.x %}"), LARGE),
    "doubled by +": (doubled("{% set ns.x = ns.x + ns.x %}"), TEXT),
    "doubled lists": (doubled("{% set ns.x = ns.x + ns.x %}", "[1]"), LIST),
    "doubled by a block": (doubled("{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}"), TEXT),
    "doubled by a filter": (
        doubled("{% set ns.x %}{% filter upper %}{{ ns.x }}{{ ns.x }}{% endfilter %}{% endset %}"),
        TEXT,
    ),
    "squared": (doubled("{% set ns.x = ns.x * ns.x %}", "99"), NUMBER),
    "output": (TEXTS + "{{ y }}{{ y }}", TEXT),
    # one call
    "a repeated text": ("{{ 'a' * 10**11 }}", TEXT),
    "a repeated text, turned round": ("{{ 10**9 * 'a' }}", TEXT),
    "a repeated list": ("{{ [1] * 10**9 }}", LIST),
    "repeated bytes": (BYTES + "{% set c = b * 10**6 %}", TEXT),
    "a power": ("{{ 10 ** 10 ** 9 }}", "a power that is too large"),
    "a padded text": ("{{ 'a'.ljust(10**11) }}", PADDING),
    "a centred text": ("{{ 'a' | center(10**11) }}", PADDING),
    "a truncated text": ("{{ 'a' | truncate(10**11) }}", PADDING),
    "an indented text": ("{{ ('a\n' * 10**6) | indent(10**5) }}", TEXT),
    "an indentation that is a text": (TEXTS + "{{ ('\n' * 10**6) | indent(x) | length }}", TEXT),
    "tabs": ("{% set t = '\t' * 10**6 %}{{ t.expandtabs(10**6) | length }}", TEXT),
    "bytes of a number": ("{{ (1).to_bytes(10**11, 'big') }}", PADDING),
    "hexadecimal bytes": ("{% set b = ('a' * 6000000).encode() %}{{ b.hex() | length }}", TEXT),
    "a number of bytes": (BYTES + "{{ (5).from_bytes(b, 'big') > 1 }}", NUMBER),
    "a number of hexadecimal digits": (TEXTS + "{{ ('f' * 10**6) | int(0, 16) > 1 }}", NUMBER),
    "replace": (TEXTS + "{{ x.replace('a', x) | length }}", TEXT),
    "replace between": (TEXTS + "{{ x.replace('', x) | length }}", TEXT),
    "replace as a filter": (TEXTS + "{{ x | replace('a', x) | length }}", TEXT),
    "replace in a map": (TEXTS + "{{ [x] | map('replace', 'a', x) | list | length }}", TEXT),
    "translate": (TEXTS + "{{ x.translate({97: x}) | length }}", TEXT),
    "join": (TEXTS + "{{ x.join(range(10**4) | map('string')) | length }}", TEXT),
    "join as a filter": (TEXTS + "{{ range(10**4) | join(x) | length }}", TEXT),
    "join of a map": (TEXTS + "{{ range(10**4) | map('string') | join(x) | length }}", TEXT),
    "join of bytes": (BYTES + "{{ b.join([b] * 9) | length }}", TEXT),
    "split": (TEXTS + "{{ y.split('a') | length }}", LIST),
    "split at spaces": ("{% set t = 'a ' * 4000000 %}{{ t.split() | length }}", LIST),
    "split from behind": ("{% set t = 'a ' * 4000000 %}{{ t.rsplit(' ') | length }}", LIST),
    "lines": ("{% set t = '\n' * 4000000 %}{{ t.splitlines() | length }}", LIST),
    "characters": (TEXTS + "{{ y | list | length }}", LIST),
    "a sum of lists": ("{{ ([[1]] * 9999) | sum(start=[]) | length }}", LIST),
    "a width": ("{{ '%99999999999d' % 1 }}", PADDING),
    "a width that is a value": ("{{ '%*d' % (10**11, 1) }}", "a width that is a value"),
    "a width in braces": ("{{ '{:99999999999}'.format(1) }}", PADDING),
    "a width that is a value, in braces": ("{{ '{:{}}'.format('a', 10**10) }}", "a width that is a value"),
    "a width of the filter": ("{{ '%99999999999d' | format(1) }}", PADDING),
    "many widths": ("{{ ('%9999d' * 10**5) % 1 }}", PADDING),
    "a value that is named often": (TEXTS + "{{ ('{0}' * 99).format(x) | length }}", TEXT),
    "a value that is named often, by %": (TEXTS + "{{ ('%(a)s' * 99) % {'a': x} }}", TEXT),
    "a mapping that is named often": (TEXTS + "{{ ('{a}' * 99).format_map({'a': x}) }}", TEXT),
    "JSON": ("{{ messages | tojson(indent=10**10) | length }}", PADDING),
    "deep JSON": (
        "{% set ns = namespace(x=[1] * 1000) %}"
        + often("{% set ns.x = [ns.x] %}", 300)
        + "{{ ns.x | tojson(indent=9999) | length }}",
        TEXT,
    ),
    "separators of JSON": (TEXTS + "{{ ([1] * 999) | tojson(separators=(x, x)) | length }}", TEXT),
    "a batch": ("{{ [1] | batch(10**10, 'x') | list | length }}", PADDING),
    "slices of a list": ("{{ [1] | slice(10**9) | list | length }}", PADDING),
    "digits": ("{{ 1.5 | round(10**9, 'ceil') }}", "rounding to more than 100 digits"),
    "dummy text": ("{{ lipsum(n=10**6) | length }}", "1000000 paragraphs"),
    "wrapped lines": (TEXTS + "{{ x | wordwrap(1, wrapstring=x) | length }}", "steps|a text of"),
    "short wrapped lines": ("{{ ('a' * 100000) | wordwrap(1, wrapstring='b' * 1000) | length }}", TEXT),
    "a long form of a date": ("{{ strftime_now('%c' * 10**6) | length }}", TEXT),
    "a long range": ("{{ range(10**9) }}", "[Rr]ange"),
    # values that hold one value many times
    "shared lists, written": (LISTS + "{{ ns.x }}", LARGE),
    "shared lists, put together": (LISTS + "{{ (ns.x ~ 'a') | length }}", LARGE),
    "shared lists, compared": (LISTS + LISTS.replace("ns", "ms") + "{{ ns.x == ms.x }}", LARGE),
    "shared lists, as a filter's value": (LISTS + "{{ ns.x | string | length }}", LARGE),
    "shared lists, formatted": (LISTS + "{{ '%s' % ns.x }}", LARGE),
    "shared lists, as a method's argument": (LISTS + "{{ '{}'.format(ns.x) }}", LARGE),
    "shared lists, in a loop's memory": (LISTS + often("{{ loop.changed(ns.x) }}", 2), LARGE),
    "long numbers": ("{% set n = 10000**100 %}{{ ([n] * 99999) | string | length }}", LARGE),
    "long keys": ("{% set y = 'a' * 9999999 %}{{ ([{y: 1}] * 30) | string | length }}", LARGE),
    "shared tuples, as a key": (TUPLES + "{{ {ns.x: 1} | length }}", LARGE),
    "shared tuples, as an index": (TUPLES + "{{ {}[ns.x] }}", LARGE),
    "shared tuples, in a dict": (TUPLES + "{{ dict([(ns.x, 1)]) | length }}", LARGE),
    "a namespace that holds itself": ("{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}", LARGE),
    # what is not there, and what Python refuses
    "another file": ("{% include 'x' %}", "loader"),
    "a changed list": ("{{ messages.append(1) }}", "append"),
    "a class": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "a class by a filter": ("{{ (''|attr('__class__')).x }}", "unsafe|undefined"),
    "no such message": ("{{ messages[9].content.x }}", "undefined|no element"),
    "a division": ("{{ 1 / 0 }}", "division"),
    "endless recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "a refusal": ("{{ raise_exception('no roles\nhere') }}", "no roles here"),
    "a long refusal": ("{{ raise_exception('x' * 200000) }}", "x" * 200),
}
# Of which each step takes long: they have a tenth of the steps, and a tenth of the passes.
WITH_FEWER_STEPS = ("loops whose condition never holds", "a recursive loop", "macros", "a macro with a wide body")
WITH_FEWER_STEPS += ("callers", "blocks", "calls", "a filter in a loop", "callers with a wide body", "methods of lists")


def render_all() -> None:
    """Prints what became of each; a memory limit ends the template, a time limit this process."""
    from stellarbyte_jax.tokenizer import costs
    from stellarbyte_jax.tokenizer.template import ChatTemplate

    most = costs.MOST_STEPS
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    for name, (source, _) in TEMPLATES.items():
        costs.MOST_STEPS = most // 10 if name in WITH_FEWER_STEPS else most
        used = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        resource.setrlimit(resource.RLIMIT_CPU, (int(used) + 60, -1))
        try:
            text = ChatTemplate(source, {}, "here").render(MESSAGES, add_generation_prompt=True)
            line = f"renders {len(text)} characters"
        except ValueError as error:
            line = str(error)
        print(json.dumps([name, line]), flush=True)


if __name__ == "__main__":
    sys.exit(render_all())

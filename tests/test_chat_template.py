"""Chat templates: what published ones must give, and what hostile ones must not do to us."""

import sys
import time
import tracemalloc

import pytest

from jaxserve import chat_template
from jaxserve.chat_template import render
from jaxserve.errors import CheckpointError, RequestError

LLAMA3 = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
CHATML = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(count=0, last=messages|length - 1) %}
{%- for message in messages if message.role != 'system' %}
    {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
    {{- '<|im_start|>' ~ message.role ~ '\n' ~ content ~ '<|im_end|>\n' }}
    {%- set ns.count = ns.count + 1 %}
{%- endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
MISTRAL = """{{ bos_token }}{% for m in messages %}
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate user/assistant') }}
{% endif %}
{% if m['role'] == 'user' %}
{{- '[INST] ' + m['content'] + ' [/INST]' }}
{%- elif m['role'] == 'assistant' %}
{{- m['content'] + eos_token }}
{%- endif %}
{% endfor %}
"""
TALK = [
    {"role": "user", "content": " Hi, größe? "},
    {"role": "assistant", "content": "<think>hm</think>\nYes."},
    {"role": "user", "content": "Why {{ x }}?"},
]
SYSTEM = {"role": "system", "content": "Be brief."}


def test_llama_3_style():
    text = render(LLAMA3, [SYSTEM, TALK[0]], {"bos_token": "<s>", "add_generation_prompt": True})
    assert text == (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi, größe?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_chatml_style_with_namespace_and_tools():
    text = render(CHATML, [SYSTEM, *TALK], {"add_generation_prompt": True, "tools": [{"name": "füße"}]})
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n Hi, größe? <|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nWhy {{ x }}?<|im_end|>\n"
        '[{"name": "füße"}]<|im_start|>assistant\n'
    )


def test_mistral_style_and_its_refusal():
    variables = {"bos_token": "<s>", "eos_token": "</s>"}
    text = render(MISTRAL, TALK, variables)
    assert "[INST]  Hi, größe?  [/INST]<think>hm</think>\nYes.</s>" in text
    assert text.startswith("<s>")
    with pytest.raises(RequestError, match="refuses these messages: roles must alternate"):
        render(MISTRAL, TALK[1:], variables)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ loop.index }}{% endfor %}", "23"),
        ("{% macro f(x, y='!') %}<{{ x }}{{ y }}>{% endmacro %}{{ f('a') }}{{ f('b', y='?') }}", "<a!><b?>"),
        ("{% set x %}a{{ 1 + 1 }}{% endset %}{{ x * 2 }}", "a2a2"),
        ("{{ messages | map(attribute='role') | join(', ') }}", "user, assistant, user"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "2"),
        ("{{ [3, 1, 2] | sort | first }}{{ 'abc'[::-1] }}{{ 'a-b'.split('-') | last }}", "1cbab"),
        ("{{ {'a': [1, None]} | tojson }}{{ 'a\"' | tojson(indent=4) }}", '{"a": [1, null]}"a\\""'),
        ("{{ 'aXbX'.replace('X', '.') }}{{ 'aX' | replace('X', '-') }}{{ ','.join(['x', 'y']) }}", "a.b.a-x,y"),
        ("{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}{{ v }}{% endfor %}{{ missing is defined }}", "a1b2False"),
        ("{% for k, v in {'b': 2} | items %}{{ k }}{{ v }}{% endfor %}{{ nothing | default('x') }}", "b2x"),
        ("{% generation %}", None),
        ("{% if messages is string or messages is mapping %}no{% else %}yes{% endif %}", "yes"),
        ("{{ strftime_now('%%') }}{{ dict(a=1)['a'] }}{{ namespace(b=2).b }}", "%12"),
        ("{{ messages[0]['content'].strip().startswith('Hi') }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 10 }}", "True331024"),
        ("{{ ['a', 'b'] | join }}{{ 'x' ~ 1 ~ none }}{{ (1, 2) + (3,) }}", "abx1None(1, 2, 3)"),
        (
            "{% for role, group in messages | groupby('role') %}{{ role }} {{ group | length }} {% endfor %}",
            "assistant 1 user 2 ",
        ),
        ("{% for row in range(5) | batch(2, 'x') %}{{ row | join }} {% endfor %}", "01 23 4x "),
        ("{% for row in 'abc' | batch(2) %}{{ row | join }} {% endfor %}{{ [] | batch(9) | list }}", "ab c []"),
        ("{{ [1, 2.5] | sum }} {{ [{'a': 3}] | sum(attribute='a', start=1) }} {{ [] | sum }}", "3.5 4 0"),
        (
            "{{ 2.675 | round(1) }} {{ 2.1 | round(0, 'ceil') | int }} {{ 1234 | round(-2, 'floor') | int }}",
            "2.7 3 1200",
        ),
        ("{{ 'a\n\nb' | indent(2) }} {{ 'a\nb' | indent('> ', first=true) }}", "a\n\n  b > a\n> b"),
        ("{{ '{} {}: {{{n:>4.1f}}}'.format('a', [1], n=2) }}{{ '{1}{0}'.format(1, 'b') }}", "a [1]: { 2.0}b1"),
    ],
)
def test_what_published_templates_use_works(template, text):
    if text is None:
        with pytest.raises(CheckpointError, match="TemplateSyntaxError"):
            render(template, TALK, {})
    else:
        assert render(template, TALK, {}) == text


def test_messages_are_not_changed_by_a_template():
    messages = [{"role": "user", "content": "x", "list": [1]}]
    for template in (
        "{{ messages.append(1) }}",
        "{% set _ = messages[0].update({'role': 1}) %}",
        "{{ messages.pop() }}",
    ):
        with pytest.raises(CheckpointError):
            render(template, messages, {})
    assert messages == [{"role": "user", "content": "x", "list": [1]}]


def test_a_long_conversation_is_well_within_the_budget():
    talk = [{"role": ("user", "assistant")[i % 2], "content": "word " * 500} for i in range(401)]
    for template in (LLAMA3, CHATML, MISTRAL):
        variables = {"bos_token": "", "eos_token": "", "add_generation_prompt": True}
        assert len(render(template, talk, variables)) > 1_000_000


DOUBLE = "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = STEP %}{% endfor %}"
HOSTILE = {
    "not jinja": "{% for %}",
    "unclosed": "{{ 'a",
    "undefined call": "{{ missing() }}",
    "undefined attribute": "{{ missing.a.b }}",
    "zero": "{{ 1 // 0 }}",
    "index": "{{ [].pop() }}",
    "nested loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "empty loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% if a %}{% endif %}{% endfor %}{% endfor %}",
    "output loop": "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "long range": "{{ range(10**9) | list }}",
    "huge range": "{% for i in range(10**9) %}x{% endfor %}",
    "classes": "{{ ''.__class__.__mro__ }}",
    "subclasses": "{{ ''.__class__.__base__.__subclasses__()[0] }}",
    "item classes": "{{ ''['__class__'] }}{{ ()['__class__']['__base__'] }}",
    "attr filter": "{{ '' | attr('__class__') }}",
    "map attribute": "{{ [''] | map(attribute='__class__') | list | first() }}{{ [''|attr('x')] }}",
    "macro globals": "{% macro f() %}{% endmacro %}{{ f.__globals__ }}{{ f.__init__.__globals__.os }}",
    "refuse globals": "{{ raise_exception.__globals__['sys'] }}{{ raise_exception.__globals__.sys }}",
    "format reach": "{{ '{0.__class__}'.format(1) }}",
    "format width": "{{ '{:>999999999}'.format(1) }}",
    "format_map": "{{ '{a:>999999999}'.format_map({'a': 1}) }}",
    "printf width": "{{ '%0999999999d' % 1 }}",
    "format filter": "{{ '%0999999999d' | format(1) }}",
    "times": "{{ 'x' * 10**9 }}",
    "times left": "{{ 10**9 * 'x' }}",
    "times list": "{{ ([0] * 10**9) | length }}",
    "times true": "{{ ('x' * 999999) * 999999 }}",
    "center": "{{ 'x' | center(10**9) }}{{ 'x'.center(10**9) }}",
    "ljust": "{{ 'x'.ljust(10**10) }}",
    "zfill": "{{ 'x'.zfill(10**10) }}",
    "tabs": "{{ '\\t'.expandtabs(10**9) }}",
    "indent": "{{ 'x\nx' | indent(10**9) }}",
    "batch": "{{ [1] | batch(10**9, 'x') | list | length }}",
    "slice": "{{ [1] | slice(10**9) | list | length }}",
    "replace": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "replace filter": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "replace nothing": "{{ ('a' * 99999).replace('', 'b' * 99999) }}",
    "join": "{{ ('b' * 999999).join('a' * 99999) }}",
    "join filter": "{{ range(99999) | join('b' * 999999) }}",
    "join map": "{{ [range(99999)] | map('join', 'b' * 999999) | list }}",
    "join list": "{{ ['b' * 999999] * 9999 }}",
    "translate": "{{ ('a' * 99999).translate({97: 'b' * 99999}) }}",
    "concat": DOUBLE.replace("START", "'x'").replace("STEP", "ns.x ~ ns.x") + "{{ ns.x | length }}",
    "plus": DOUBLE.replace("START", "'x'").replace("STEP", "ns.x + ns.x") + "{{ ns.x | length }}",
    "plus lists": DOUBLE.replace("START", "[1]").replace("STEP", "ns.x + ns.x") + "{{ ns.x | length }}",
    "nested lists": DOUBLE.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]") + "{{ ns.x }}",
    "nested json": DOUBLE.replace("START", "[1]").replace("STEP", "[ns.x, ns.x]") + "{{ ns.x | tojson }}",
    "nested tuples": DOUBLE.replace("START", "(1,)").replace("STEP", "(ns.x, ns.x)") + "{{ {ns.x: 1} }}",
    "nested dicts": DOUBLE.replace("START", "{}").replace("STEP", "{'a': ns.x, 'b': ns.x}") + "{{ ns.x }}",
    "nested dict calls": DOUBLE.replace("START", "{}").replace("STEP", "dict(a=ns.x, b=ns.x)") + "{{ ns.x }}",
    "nested namespaces": DOUBLE.replace("START", "1").replace("STEP", "namespace(a=ns.x, b=ns.x)") + "{{ ns.x }}",
    "own namespace": "{% set ns = namespace() %}{% set ns.a = ns %}{{ ns }}",
    "blocks": "{% set a = 'x' * 999999 %}{% set b %}{% for i in range(99999) %}{{ a }}{% endfor %}{% endset %}",
    "block doubling": "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
    "{% set ns.x = y %}{% endfor %}",
    "macro text": "{% macro f(a) %}{% for i in range(99999) %}{{ a }}{% endfor %}{% endmacro %}{{ f('x' * 999999) }}",
    "macro doubling": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}x{% endmacro %}{{ f(99) }}",
    "macro recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "call recursion": "{% macro f() %}{% call f() %}{{ caller() }}{% endcall %}{% endmacro %}{{ f() }}",
    "loop recursion": "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "power": "{{ 10**(10**10) }}",
    "power tower": DOUBLE.replace("START", "3").replace("STEP", "ns.x ** 60") + "{{ ns.x }}",
    "squares": DOUBLE.replace("START", "3").replace("STEP", "ns.x * ns.x") + "{{ ns.x }}",
    "big compares": "{% set a = 'x' * 999999 %}{% set b = 'x' * 999999 ~ 'y' %}"
    "{% for i in range(99999) %}{% for j in range(99) %}{% if b.count(a) %}{% endif %}{% endfor %}{% endfor %}",
    "many big values": "{% for i in range(99999) %}{% set a = ('x' * 999999) ~ i %}{% endfor %}",
    "round": "{{ 1.5 | round(10**9, 'ceil') }}",
    "sum": "{{ ([[1]] * 99999) | sum(start=[]) | length }}",
    "striptags": "{{ ('<' * 99999) | striptags }}",
    "urlize": "{{ ('a.' * 99999) | urlize }}",
    "cycler": "{{ cycler('a').next() }}",
    "lipsum": "{{ lipsum(n=10**6) }}",
    "joiner": "{{ joiner(',')() }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os }}",
    "from": "{% from 'os' import system %}",
    "extends": "{% extends 'x' %}",
    "self": "{{ self.__init__.__globals__ }}",
    "context": "{{ self._TemplateReference__context.environment }}",
    "deep source": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep loops": "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
    "deep list": "{{ " + "[" * 300 + "]" * 300 + " }}",
    "format attribute": "{{ '{a.__class__}'.format(a=1) }}",
    "format item": "{{ '{0[0]}'.format([1]) }}",
    "format nested width": "{{ '{:{}}'.format(1, 10**9) }}",
    "format conversion": "{{ '{!r}'.format('x') }}",
    "format precision": "{{ '{:.999999999f}'.format(1) }}",
    "format repeated": "{{ ('{0}' * 99999).format('x' * 999999) }}",
    "format padded": "{{ ('{0:999}' * 99999).format(1) }}",
    "format missing": "{{ '{}{}'.format(1) }}",
    "format mixed": "{{ '{5}'.format(1) }}{{ '{'.format() }}",
    "format through map": "{{ ['{0.__class__}'] | map(attribute='format') | first }}"
    "{{ (['{0.__class__}'] | map(attribute='format') | first)(1) }}",
    "format globals": "{{ ''.format.__globals__ }}{{ ''.format.__closure__[0].cell_contents }}",
    "batch rows": "{% for row in [1] | batch(99999, 'x' * 999999) %}{{ row }}{% endfor %}",
    "batch backwards": "{{ [1] | batch(0) | list }}",
    "sum of lists": "{{ [[1]] | sum(start=[]) }}",
    "sum of strings": "{{ ['x' * 999999] | sum(start='') }}",
    "sum of big numbers": DOUBLE.replace("START", "3").replace("STEP", "([ns.x] * 99999) | sum") + "{{ ns.x }}"
    "{% for i in range(99999) %}{% set ns.x = ([ns.x] * 99999) | sum %}{% endfor %}",
    "sum attribute": "{{ [''] | sum(attribute='__class__') }}",
    "round text": "{{ 'x' | round(9, 'ceil') }}",
    "round list": "{{ ([1] * 99999) | round(9, 'floor') }}",
    "indent lines": "{{ ('\n' * 999999) | indent(999999) }}",
    "indent by text": "{{ ('\r' * 999999) | indent('x' * 999999) }}",
    "group by class": "{{ ['', 1] | groupby('__class__') }}",
    "group nested": DOUBLE.replace("START", "[{'a': 1}]").replace("STEP", "[{'a': ns.x | groupby('a')}]")
    + DOUBLE.replace("START", "[1]").replace("STEP", "[[ns.x, ns.x]] | groupby(0)"),
    "constant": "{{ 'x' * 99999 * 99999 }}{{ ['x'] | batch(10**9, 'y') | list }}",
    "sort by attribute": "{{ [1] | sort(attribute='__class__') }}{{ [1] | map('attr', '__class__') | list }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_ends_in_an_error_soon_and_small(name, monkeypatch):
    monkeypatch.setattr(chat_template, "_MAX_SECONDS", 1.0)
    tracemalloc.start()
    try:
        begin_s = time.monotonic()
        if name in HARMLESS:
            assert render(HOSTILE[name], TALK, {}) == HARMLESS[name]
        else:
            with pytest.raises((CheckpointError, RequestError)) as caught:
                render(HOSTILE[name], TALK, {})
            assert len(str(caught.value)) < 1500
        assert time.monotonic() - begin_s < 30, "far beyond the budget of seconds, even on a busy machine"
        assert tracemalloc.get_traced_memory()[1] < 1 << 29
    finally:
        tracemalloc.stop()


HARMLESS = {
    "own namespace": "<Namespace {'a': <Namespace {...}>}>",
}


def test_the_trace_is_taken_back_after_an_error():
    before = sys.gettrace()
    with pytest.raises(CheckpointError):
        render("{{ 1 // 0 }}", [], {})
    assert sys.gettrace() is before

"""Chat templates from strangers: bounded time and memory, and the same text as before for all others."""

from __future__ import annotations

import resource
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from data_pipeline import template_sandbox
from data_pipeline.chat_template import SHIPPED, ChatTemplate, FrozenMessage, load_tokenizer, read_template
from data_pipeline.encode import Encoder
from data_pipeline.errors import DataError
from data_pipeline.template_sandbox import TemplateLimitError, compile_template, render
from tests.data_pipeline import test_real_templates
from tests.data_pipeline.test_chat_template import CHAT, TOOLS

LOOPS = "{%% for a in range(99999) %%}{%% for b in range(99999) %%}%s{%% endfor %%}{%% endfor %%}"
DOUBLING = "{%% set n = namespace(x=%s) %%}{%% for i in range(64) %%}{%% set n.x = %s %%}{%% endfor %%}%s"
HOSTILE = {
    # Those that were observed.
    "nested loops": LOOPS % "",
    "a repeated text": "{{ 'a' * 3000000000 }}",
    "a repeated text, turned": "{{ 3000000000 * 'a' }}",
    "a width": "{{ 'a'.center(2000000000) }}",
    # Others of their kinds.
    "loops that print": LOOPS % "text",
    "loops in a block": "{% set x %}" + LOOPS % "text" + "{% endset %}",
    "a loop over a long text": "{% for a in 'ab' * 30000000 %}{% for b in 'ab' * 30000000 %}{% endfor %}{% endfor %}",
    "macros that call themselves": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "a loop that calls itself": "{% for x in [[[[]]]] recursive %}{{ loop(x) }}{{ loop([[[[[[]]]]]] * 100) }}"
    "{% endfor %}",
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a filter's width": "{{ 'a' | center(2000000000) }}",
    "an indentation": "{{ ('a\n' * 1000000) | indent(9999) }}",
    "an indentation of JSON": "{{ messages | tojson(indent=2000000000) }}",
    "tabs": "{{ ('\t' * 1000000).expandtabs(9999) }}",
    "zeros": "{{ '1'.zfill(width=2000000000) }}",
    "a batch": "{{ [1] | batch(2000000000, 'x') | list }}",
    "slices": "{{ [1] | slice(2000000000) | list }}",
    "a format": "{{ '%2000000000d' % 1 }}",
    "a format with a width": "{{ '%*d' % (2000000000, 1) }}",
    "a filter's format": "{{ '%2000000000d' | format(1) }}",
    "a format of Python": "{{ '{:2000000000}'.format(1) }}",
    "a format of Python with a width": "{{ '{:{}}'.format(1, 2000000000) }}",
    "a format of Python by name": "{{ '{a:{b}}'.format_map({'a': 1, 'b': 2000000000}) }}",
    "random words": "{{ lipsum(n=100000000) }}",
    "replacements": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "a filter's replacements": "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "a separator": "{{ ('a' * 1000000) | list | join('b' * 1000000) }}",
    "a method's separator": "{{ ('b' * 1000000).join(('a' * 1000000) | list) }}",
    "a translation": "{{ ('a' * 1000000).translate({97: 'b' * 1000000}) }}",
    "bytes": "{{ 'a'.encode() * 3000000000 }}",
    "a slow encoding": "{{ ('ü' * 1000000).encode('punycode') }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "a large power": "{{ 10 ** 1000000000 }}",
    "a number in bytes": "{{ (5).to_bytes(2000000000, 'big') }}",
    "a rounding": "{{ 5 | round(2000000000) }}",
    "doubled texts": DOUBLING % ("'a'", "n.x ~ n.x", ""),
    "added texts": DOUBLING % ("'a'", "n.x + n.x", ""),
    "added lists": DOUBLING % ("[1]", "n.x + n.x", ""),
    "lists in lists": DOUBLING % ("[]", "[n.x, n.x]", "{{ n.x | tojson }}"),
    "tuples in tuples": DOUBLING % ("[]", "(n.x, n.x)", "{{ n.x == (n.x,) }}"),
    "dictionaries": DOUBLING % ("[]", "{'a': n.x, 'b': n.x}", "{{ n.x }}"),
    "dictionaries by name": DOUBLING % ("[]", "dict(a=n.x, b=n.x)", "{{ n.x }}"),
    "namespaces": DOUBLING % ("[]", "namespace(a=n.x, b=n.x)", "{{ n.x }}"),
    "namespaces that change": (
        "{% set n = namespace(x=1) %}{% for i in range(64) %}{% set m = namespace() %}{% set m.a = n.x %}"
        "{% set m.b = n.x %}{% set n.x = m %}{% endfor %}{{ n.x }}"
    ),
    "doubled numbers": DOUBLING % ("3", "n.x * n.x", ""),
    "doubled blocks": "{% set n = namespace(x='a') %}{% for i in range(64) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}"
    "{% set n.x = y %}{% endfor %}",
    "many long texts": "{% set n = namespace(x=[]) %}{% for i in range(99999) %}"
    "{% set n.x = n.x + ['a' * 60000000 ~ i] %}"
    "{% endfor %}",
    "a nest of filters": "{{ messages | map('center', 2000000000) | list }}",
    "its own filter's name": "{% set _round = 1 %}" + LOOPS % "",
}
MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.fixture(autouse=True, scope="module")
def short():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(template_sandbox, "MAX_SECONDS", 0.1)
        yield


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_template_ends_soon_with_an_error(source):
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Exception) as caught:
        render(compile_template(source), {"messages": MESSAGES})
    assert time.process_time() - began < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # kilobytes
    assert isinstance(caught.value, (TemplateLimitError, RecursionError)) or "undefined" in str(caught.value)


def test_the_bound_on_widths_is_exact():
    for method in ("ljust", "rjust", "center", "zfill"):
        with pytest.raises(TemplateLimitError):
            render(compile_template(f"{{{{ 'a'.{method}(10001) }}}}"), {})
    assert len(render(compile_template("{{ 'a'.ljust(10000) }}"), {})) == 10000


@pytest.mark.parametrize("text", ["('a' * 9000).replace('a', 'b' * 9000)", "('a' * 9000) | replace('a', 'b' * 9000)"])
def test_a_product_that_exceeds_the_bound_on_texts_is_never_made(text):
    with pytest.raises(TemplateLimitError, match="too large together"):
        render(compile_template("{{ (" + text + ") | length }}"), {})


def test_a_search_in_a_long_text_makes_no_product():
    source = "{{ content.startswith('<tool_response>') }}"
    assert render(compile_template(source), {"content": "a" * 5_000_000}) == "False"


def test_all_filters_and_methods_that_take_a_width_are_known():
    """A new version of jinja2 or Python may bring others."""
    environment = compile_template("").environment
    known = set(template_sandbox._WIDENING) | {"format", "tojson", "_round", "_made", "_added", "_joined"}
    harmless = set(
        "abs attr capitalize count d default dictsort e escape filesizeformat first float forceescape groupby int "
        "items join last length list lower map max min pprint random reject rejectattr replace reverse safe select "
        "selectattr sort string striptags sum title trim truncate unique upper urlencode urlize "
        "wordcount wordwrap xmlattr".split()
    )
    assert set(environment.filters) <= known | harmless
    assert set(environment.globals) == {
        "range",
        "dict",
        "cycler",
        "joiner",
        "namespace",
        "raise_exception",
        "strftime_now",
    }


PLAIN = {
    "operators": "{{ 1 + 2 }} {{ 1.5 + 2 }} {{ 'a' + 'b' + 'c' }} {{ [1] + [2] }} {{ (1, 2) + (3,) }} "
    "{{ 2 ** 10 }} {{ 7 % 4 }}"
    "{{ 'ab' * 3 }} {{ 3 * [1] }} {{ '%s: %05.1f' % ('a', 2) }} "
    "{{ -1 - 2 // 3 / 4 }} {{ 1 ~ 'a' ~ none ~ [1] ~ true }}",
    "additions": "{{ 'a' + (1 + 2)|string + ('b' + 'c') }}{{ messages[0].role + ('x' + 'y') + messages[1].role }}"
    "{% set l = [messages[0]] + messages[1:] + [] %}{{ l }}",
    "literals": "{{ {'a': [1, (2, 'x'), {}]} }} {{ () }} {{ [] }} {% for k, v in {'a': 1, 'b': 2}.items() %}"
    "{{ k }}{{ v }}{% endfor %}",
    "assignment": "{% set a, b = 1, [2, messages|length] %}{{ a }}{{ b }}{% set n = namespace(x='') %}"
    "{% for m in messages %}{% set n.x = n.x ~ m.role %}{% endfor %}{{ n.x }}",
    "filters": "{{ messages|tojson }} {{ messages|tojson(indent=2) }} {{ 'a b'|title|center(20) }} "
    "{{ 'x'|default(131072) }}"
    "{{ missing|default(131072) }} {{ [3,1]|sort|join(', ') }} {{ messages|map(attribute='role')|list }}"
    "{{ messages|selectattr('role','equalto','user')|list|length }} "
    "{{ '%s %d'|format('a', 99999) }} {{ 'a\nb'|indent(4, true) }}"
    "{{ [1,2,3]|batch(2, 0)|list }} {{ 3.14159|round(2) }} {{ ' x '|trim }} {{ 'abc'|first }} {{ '<'|e }}",
    "methods": "{{ 'a,b'.split(',')[-1] }} {{ ' a '.strip() }} {{ 'abc'.replace('b', 'x') }} "
    "{{ '{} {:>5}'.format('a', 'b') }}"
    "{{ 'a'.startswith('a') }} {{ {'a': 1}.get('b', 7) }} {{ 'x'.join(['1', '2']) }} "
    "{{ 'x' in 'xyz' }} {{ 'ü'.encode('utf-8') }}",
    "tests": "{{ messages is iterable }} {{ x is defined }} {{ 'a' is string }} {{ messages[0] is mapping }}",
    "macros": "{% macro f(x, y=1) %}[{{ x }}{{ y }}{{ caller() if caller }}]{% endmacro %}{{ f('a') }}"
    "{% call f(2, y='z') %}in{% endcall %}",
    "control": "{% for m in messages if m.role == 'user' %}{{ loop.index }}{{ loop.cycle('x', 'y') }}"
    "{% continue %}{% else %}no{% endfor %}"
    "{% for i in range(3) %}{% if i == 1 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "recursion": "{% for x in [[1, [2]], 3] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}",
    "blocks": "{% set x %}a{{ 1 }}{% endset %}{{ x }}{% filter upper %}abc{% endfilter %}{% with a=1 %}"
    "{{ a }}{% endwith %}"
    "{% generation %}g{% endgeneration %}",
    "space": "  {%- if true %}\n  a\n  {% endif %}\n b {{- ' c' -}}  d",
    "undefined": "[{{ x }}][{{ x ~ 'a' }}][{{ messages[9] }}]",
    "fails": "{{ raise_exception('no ' + 'tools') }}",
    "fails on types": "{{ 'a' + 1 }}",
    "fails on none": "{{ 'a' + none + 'b' }}",
    "fails on undefined": "{{ 'a' + x.y }}",
    "fails on undefined, added": "{{ x + 'a' }}",
    "fails on calls": "{{ messages[0].content.nothing() }}",
    "numbers": "{% set budget = namespace(n=32768) %}{{ budget.n }} {{ range(50000)|length }} {{ 'abc'.find('c', 1) }}",
}
REAL = {name: value for name, value in vars(test_real_templates).items() if name.isupper() and isinstance(value, str)}
TEMPLATES = PLAIN | REAL | {name: read_template(name) for name in SHIPPED}


def outcome(function, *arguments) -> str:
    try:
        return function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_the_text_is_that_of_transformers(source):
    for messages in (MESSAGES, CHAT, []):
        for tools in (None, TOOLS):
            variables = {"messages": messages, "tools": tools, "add_generation_prompt": True, "bos_token": "<s>"}
            # Passed in both, because the date of their own changes.
            variables["strftime_now"] = lambda form: "today"
            expected = outcome(_compile_jinja_template(source).render, variables)
            assert outcome(render, compile_template(source), variables) == expected


def test_threads_have_budgets_of_their_own():
    slow, quick = compile_template(HOSTILE["nested loops"]), compile_template("{% for i in range(1000) %}x{% endfor %}")
    results: list[str] = []
    thread = threading.Thread(target=lambda: results.append(outcome(lambda: render(slow, {}))))
    thread.start()
    for _ in range(50):
        assert render(quick, {}) == "x" * 1000
    thread.join()
    assert results == ["TemplateLimitError: it takes more than 0.1 seconds"]


def frozen(content: str) -> tuple[FrozenMessage, ...]:
    return (FrozenMessage("user", content, b""),)


def test_the_error_is_one_line_and_costs_its_time_at_most_three_times():
    template = ChatTemplate(HOSTILE["nested loops"], {}, source="the model", advice="; choose another")
    began = time.process_time()
    for number in range(100):
        with pytest.raises(DataError) as caught:
            template.render(frozen(str(number)), None, False, f"row {number}")
        line = str(caught.value)
        assert (
            line.startswith(f"row {number}: the chat template of the model exceeds a bound: it ") and "\n" not in line
        )
        assert line.endswith("; choose another")
    assert time.process_time() - began < 2
    assert "on 3 conversations already" in line


DEEP = {
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "lists": "{{ " + "[" * 5000 + "]" * 5000 + " }}",
    "conditions": "{% if a %}" * 5000 + "{% endif %}" * 5000,
    "loops": "{% for a in b %}" * 500 + "{% endfor %}" * 500,
    "not": "{{ " + "not " * 5000 + "a }}",
    "filters": "{{ a" + "|trim" * 5000 + " }}",
    "attributes": "{{ a" + ".b" * 5000 + " }}",
    "additions": "{{ a" + " + a" * 5000 + " }}",
    "a long number": "{{ " + "9" * 5000 + " }}",
    "too long": "x" * ((1 << 18) + 1),
    "not a template": "{% for %}",
    "unknown": "{{ a | nothing }}",
    "including": "{% include 'x' %}{% extends 'y' %}",
    "not closed": "{{ '" + "a" * 1000,
}


@pytest.mark.parametrize("source", DEEP.values(), ids=DEEP.keys())
def test_a_template_that_nests_deeply_or_is_none_is_one_line(source):
    try:
        template = ChatTemplate(source, {}, source="the model")
        template.render(frozen("x"), None, False, "row 0")
    except DataError as error:
        assert "the chat template of the model" in str(error) and "\n" not in str(error) and len(str(error)) < 500


def test_bytes_that_are_no_text_are_one_line(tmp_path, chatml_tokenizer):
    chatml_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ messages }} \xff")
    for read in (load_tokenizer, Encoder.load):
        with pytest.raises(DataError, match=r"chat_template.jinja: byte 15 is not UTF-8; convert the file"):
            read(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        read_template(tmp_path / "chat_template.jinja")


@pytest.mark.slow
def test_a_deep_template_does_not_crash_python():
    """In a process of its own, since a crash would end the tests: in a thread, which has a smaller stack."""
    program = textwrap.dedent(
        """
        import threading
        from tests.data_pipeline.test_template_sandbox import DEEP, ChatTemplate, frozen, outcome
        def work():
            for source in DEEP.values():
                outcome(lambda: ChatTemplate(source, {}, source="m").render(frozen("x"), None, False, "row"))
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        print("alive")
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout == "alive\n", done.stderr[-500:]

import time

import pytest

from dots1_local.errors import GGUFError
from dots1_local.files import chat_template
from dots1_local.files.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "hi"}]
LOOPS = "{% for a in range(99999) %}" * 5 + "{% endfor %}" * 5


def test_renders_up_to_the_answer() -> None:
    source = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}{{ end }}"
    template = ChatTemplate(source + "{% if add_generation_prompt %}>{% endif %}", "f.gguf")
    assert template.render(MESSAGES, end="!") == "[user:hi]!>"


@pytest.mark.parametrize(
    "source",
    [
        LOOPS,
        LOOPS.replace("}{% endfor", "}{{ messages|length }}{% endfor", 1),
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        LOOPS.replace("range(99999)", "messages * 1000"),
        "{% for a in [1] recursive %}{% if loop.depth < 30 %}{{ loop([1] * 2) }}{% endif %}"
        "{% endfor %}",
    ],
)
def test_an_endless_template_is_ended(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_SECONDS", 0.2)
    begun = time.monotonic()
    with pytest.raises(GGUFError, match=r"f\.gguf.*0\.2 seconds"):
        ChatTemplate(source, "f.gguf").render(MESSAGES)
    assert time.monotonic() - begun < 5


def test_a_template_that_was_too_slow_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    source = LOOPS + "{# once #}"
    monkeypatch.setattr(chat_template, "_SECONDS", 0.05)
    for _ in range(2):
        with pytest.raises(GGUFError, match="computes for more than"):
            ChatTemplate(source, "f.gguf").render(MESSAGES)
        monkeypatch.setattr(chat_template, "_SECONDS", 3600)


@pytest.mark.parametrize(
    "source", ["{{ lipsum(n=10**8) }}", "{{ [1]|slice(10**18)|list }}", "{{ [1]|batch(10**9, 1) }}"]
)
def test_functions_that_count_without_end_are_missing(source: str) -> None:
    with pytest.raises(GGUFError, match=r"f\.gguf"):
        ChatTemplate(source, "f.gguf").render(MESSAGES)


def test_loops_and_macros_stay_what_they_are() -> None:
    source = (
        "{% macro f(n) %}{{ n }}{{ caller() if caller }}{% endmacro %}"
        "{% for a in range(5) if a != 3 %}{% if a == 4 %}{% break %}{% endif %}"
        "{{ loop.index }}{{ f(a) }}{% else %}none{% endfor %}{% call f(9) %}!{% endcall %}"
    )
    assert ChatTemplate(source, "f.gguf").render(MESSAGES) == "10213" + "29!"


@pytest.mark.parametrize(
    "source",
    [
        "{{ 10 ** (10 ** 10) }}",
        "{{ 'x' * 10000000000 }}",
        "{% set x = [1] * 10000000000 %}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '%.100000000f'|format(1) }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 1000000000) }}",
        "{{ 'a'.ljust(1000000000) }}",
        "{{ 'a'.zfill(width=1000000000) }}",
        "{{ 'a'|center(1000000000) }}",
        "{{ 'a'|indent(1000000000, true) }}",
        "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    ],
)
def test_huge_numbers_and_texts_are_refused_before_they_are_made(source: str) -> None:
    with pytest.raises(GGUFError, match="something too large"):
        ChatTemplate(source, "f.gguf").render(MESSAGES)


def test_output_is_bounded() -> None:
    with pytest.raises(GGUFError, match="16777216"):
        ChatTemplate("{% for i in range(30) %}{{ 'x' * 1000000 }}{% endfor %}", "f.gguf").render(
            MESSAGES
        )


def test_ordinary_arithmetic_stays() -> None:
    source = (
        "{{ '  ' * 2 }}{{ [0] * 2 }}{{ 2 ** 3 }}{{ 1.5 * 2 }}{{ 7 % 2 }}"
        "{{ ' %s %d' % ('x12345678', 1700000000) }}{{ '%d'|format(1700000000) }}"
        "{{ 'a {} {:>3}'.format(1700000000, 'b') }}{{ '012345678'|indent(2) }}{{ 'a'.ljust(2) }}"
    )
    assert ChatTemplate(source, "f.gguf").render(MESSAGES) == (
        "    [0, 0]83.01 x12345678 17000000001700000000a 1700000000   b012345678a "
    )


def test_json_is_written_as_transformers_does() -> None:
    source = "{{ it | tojson }}{{ it | tojson(indent=1) }}{{ it | tojson(separators=(',', ':')) }}"
    it = {"b": "<é> & '", "a": None}
    assert ChatTemplate(source, "f.gguf").render(MESSAGES, it=it) == (
        '{"b": "<é> & \'", "a": null}{\n "b": "<é> & \'",\n "a": null\n}{"b":"<é> & \'","a":null}'
    )


def test_knows_which_variables_a_template_reads() -> None:
    source = (
        "{# a #}{% set b = 1 %}{% if c is defined %}{{ messages[0].d }}{{ 'e' ~ b }}{% endif %}"
    )
    assert ChatTemplate(source, "f.gguf").variables == {"c", "messages"}


def test_a_templates_own_words_reach_a_terminal_as_one_harmless_line() -> None:
    with pytest.raises(GGUFError) as error:
        ChatTemplate("{{ raise_exception('a\x1b[2J\\nb') }}", "f.gguf").render(MESSAGES)
    assert str(error.value) == "the chat template of f.gguf fails: a [2J b"


def test_the_sandbox_keeps_python_out() -> None:
    for source in ("{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"):
        with pytest.raises(GGUFError, match=r"unsafe|not safely"):
            ChatTemplate(source, "f.gguf").render(MESSAGES)

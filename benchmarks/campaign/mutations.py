"""Changes to files that know their structure: JSON, safetensors, templates, and any bytes.

Each function takes random numbers and a file's content, and returns another content.
"""

import json
from random import Random
from typing import Any

__all__ = ["TEXTS", "mutate_bytes", "mutate_json", "mutate_safetensors", "mutate_template"]

_NUMBERS: list[Any] = [
    0, 1, -1, 2, 7, 255, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 63) - 1, 1 << 63, 1 << 64, 10**40,
    -(1 << 63), 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), -float("inf"),
]  # fmt: skip
TEXTS = [
    "", " ", "a", "0", "\0", "\ud800", "中文", "🙂" * 40, "../../x", "/dev/zero", "/dev/stdin",
    "a" * 100_000, "%s%n", "\x1b[2J", "F32", "Q4_K", "\N{RIGHT-TO-LEFT OVERRIDE}", "nan",
    "(a+)+$", "[", "\r\n",
]  # fmt: skip
_JINJA = [
    "{% for i in range(10**9) %}x{% endfor %}", "{{ 'x' * 10**9 }}", "{{ 2**(10**7) }}",
    "{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}", "{{ 10 ** 10 ** 10 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% include '/etc/passwd' %}", "{{", "{# ",
    "{% if %}", "{{ messages[99].content }}", "{{ raise_exception('no') }}", "{{ none + 1 }}", "\0",
    "{% set x = [1] %}{% for i in x %}{{ x.append(i) }}{% endfor %}", "{{ '%1000000000d' % 1 }}",
    "{{ messages|map(attribute='x')|list }}", "{{ 'a'|center(10**9) }}", "{% extends 'x' %}",
    "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "{{ 1/0 }}",
    "{{ namespace(a=1).a.b.c }}", "{{ messages|tojson|length }}", "{{ lipsum(10**6) }}",
    "{{ strftime_now('%' * 9999) }}",
]  # fmt: skip


def mutate_json(random: Random, content: bytes) -> bytes:
    """Change one to three values of a JSON document, or now and then its bytes."""
    if random.random() < 0.15:
        return mutate_bytes(random, content)
    value = json.loads(content)
    for _ in range(random.randint(1, 3)):
        value = _changed(random, value)
    text = json.dumps(value)
    if random.random() < 0.05 and isinstance(value, dict) and value:  # the last of a name counts
        name = json.dumps(random.choice(list(value)))
        text = f"{text[:-1]}, {name}: {json.dumps(_other(random, None))}}}"
    return text.encode()


def _changed(random: Random, value: Any) -> Any:
    """The value with a part of it changed, added or taken away."""
    if not isinstance(value, dict | list) or not value or random.random() < 0.05:
        return _other(random, value)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key: Any = random.choice(keys)
    deeper = isinstance(value[key], dict | list) and random.random() < 0.8
    if deeper or random.random() < 0.6:
        value[key] = _changed(random, value[key]) if deeper else _other(random, value[key])
    elif random.random() < 0.5:
        del value[key]
    elif isinstance(value, dict):
        value[random.choice([*TEXTS, key + "_"])] = _other(random, value[key])
    else:
        value.insert(key, random.choice([value[key], _other(random, value[key])]))
    return value


def _other(random: Random, value: Any) -> Any:
    """A value in place of one, often of the same type."""
    if isinstance(value, int | float) and not isinstance(value, bool) and random.random() < 0.6:
        return random.choice([*_NUMBERS, value + 1, value - 1, -value, value * 2])
    if isinstance(value, str) and random.random() < 0.6:
        return random.choice([*TEXTS, value[::-1], value + value, value[:-1]])
    nested: list[Any] = []
    for _ in range(random.choice([1, 10, 900])):
        nested = [nested]
    return random.choice([None, True, False, [], {}, nested, *_NUMBERS[:8], *TEXTS[:6]])


def mutate_bytes(random: Random, content: bytes) -> bytes:
    """Flip, cut, insert, blank or repeat bytes."""
    data, size = bytearray(content), len(content)
    for _ in range(random.choice([1, 1, 2, 8])):
        at = random.randrange(min(size, random.choice([64, 4096, size])) or 1)
        match random.randrange(6):
            case 0:
                del data[at:]
            case 1:
                data[at:at] = random.randbytes(random.choice([1, 4, 1000]))
            case 2:
                data[at : at + 64] = bytes(len(data[at : at + 64]))
            case 3:
                data += data[at : at + 1000]
            case _:
                data[at : at + 1] = bytes([random.randrange(256)])
    return bytes(data)


def mutate_safetensors(random: Random, content: bytes) -> bytes:
    """Change the header of a safetensors file, its length, or now and then any bytes."""
    end = 8 + int.from_bytes(content[:8], "little")
    choice = random.random()
    if choice < 0.1:
        return mutate_bytes(random, content)
    if choice < 0.2:
        length = random.choice([0, 1, end - 9, end, 1 << 20, 100_000_001, 1 << 40, (1 << 64) - 1])
        return length.to_bytes(8, "little") + content[8:]
    if choice < 0.35:  # weights
        data = bytearray(content)
        at = end + random.randrange(max(len(data) - end - 64, 1))
        data[at : at + 64] = random.choice([b"\xff", b"\x7f\x80", b"\x80\xff"]) * 64
        return bytes(data[: len(content)])
    header = mutate_json(random, content[8:end])
    return len(header).to_bytes(8, "little") + header + content[end:]


def mutate_template(random: Random, content: bytes) -> bytes:
    """Put hostile or broken Jinja into a template."""
    if random.random() < 0.3:
        return mutate_bytes(random, content)
    text = content.decode()
    at = random.randrange(len(text) + 1)
    return (text[:at] + random.choice(_JINJA) + text[at:]).encode()

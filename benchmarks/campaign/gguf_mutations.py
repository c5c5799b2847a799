"""Changes to the headers of GGUF files: keys, tensors and counts that lie."""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random

from benchmarks.campaign.mutations import TEXTS, mutate_bytes

__all__ = ["mutate_gguf"]

_SCALARS = {
    0: "B", 1: "b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "?",
    10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class _Key:
    name: bytes
    kind: int
    value: bytes  # as stored


@dataclass(frozen=True)
class _Tensor:
    name: bytes
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class _Header:
    version: int
    counts: tuple[int, int] | None  # of tensors and keys, where they aren't the real ones
    keys: tuple[_Key, ...]
    tensors: tuple[_Tensor, ...]


def mutate_gguf(random: Random, content: bytes) -> bytes:
    """Change one to three keys, tensors or counts of a GGUF header, or now and then any bytes."""
    header, end = _read(content)
    data = content[end + -end % 32 :]
    choice = random.random()
    if choice < 0.1:
        return mutate_bytes(random, content[:end]) + content[end:]
    if choice < 0.2:
        return content[: end + -end % 32] + mutate_bytes(random, data)
    changes: Sequence[Callable[[Random, _Header], _Header]] = (
        _keys,
        _keys,
        _tensors,
        _tensors,
        _counts,
    )
    for _ in range(random.randint(1, 3)):
        header = random.choice(changes)(random, header)
    written = _write(header)
    return written + bytes(-len(written) % 32) + data


def _read(content: bytes) -> tuple[_Header, int]:
    version, tensors, keys = struct.unpack_from("<IQQ", content, 4)
    at, found, infos = 24, [], []
    for _ in range(keys):
        name, at = _text(content, at)
        (kind,) = struct.unpack_from("<I", content, at)
        end = _skip(content, at + 4, kind)
        found.append(_Key(name, kind, content[at + 4 : end]))
        at = end
    for _ in range(tensors):
        name, at = _text(content, at)
        (rank,) = struct.unpack_from("<I", content, at)
        *shape, kind, offset = struct.unpack_from(f"<{rank}QIQ", content, at + 4)
        infos.append(_Tensor(name, tuple(shape), kind, offset))
        at += 4 + 8 * rank + 12
    return _Header(version, None, tuple(found), tuple(infos)), at


def _text(content: bytes, at: int) -> tuple[bytes, int]:
    (length,) = struct.unpack_from("<Q", content, at)
    return content[at + 8 : at + 8 + length], at + 8 + length


def _skip(content: bytes, at: int, kind: int) -> int:
    if kind == _STRING:
        return _text(content, at)[1]
    if kind != _ARRAY:
        return at + struct.calcsize(_SCALARS[kind])
    of, count = struct.unpack_from("<IQ", content, at)
    at += 12
    if of in _SCALARS:
        return at + int(count) * struct.calcsize(_SCALARS[of])
    for _ in range(count):
        at = _skip(content, at, of)
    return at


def _write(header: _Header) -> bytes:
    counts = header.counts or (len(header.tensors), len(header.keys))
    parts = [b"GGUF", struct.pack("<IQQ", header.version, *counts)]
    for key in header.keys:
        parts += [_stored(key.name), struct.pack("<I", key.kind), key.value]
    for tensor in header.tensors:
        rank = len(tensor.shape)
        numbers = (*tensor.shape, tensor.kind, tensor.offset)
        parts += [_stored(tensor.name), struct.pack(f"<I{rank}QIQ", rank, *numbers)]
    return b"".join(parts)


def _stored(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _keys(random: Random, header: _Header) -> _Header:
    keys = list(header.keys)
    at = random.randrange(len(keys))
    key = keys[at]
    match random.randrange(7):
        case 0:
            del keys[at]
        case 1:
            keys.insert(random.randrange(len(keys)), key)  # twice
        case 2:
            keys[at] = replace(key, name=_name(random, key.name))
        case 3:
            keys[at] = replace(key, kind=random.choice([*range(14), 1 << 20]))
        case _:
            keys[at] = _with_value(random, key)
    return replace(header, keys=tuple(keys))


def _with_value(random: Random, key: _Key) -> _Key:
    if key.kind in _SCALARS and random.random() < 0.8:
        size = len(key.value)
        value = random.choice(
            [bytes(size), b"\xff" * size, random.randbytes(size), _plus_one(key.value)]
        )
        return replace(key, value=value)
    if key.kind == _STRING and random.random() < 0.8:
        text = random.choice(TEXTS).encode(errors="surrogatepass")
        lie = struct.pack("<Q", random.choice([1 << 20, 1 << 40, (1 << 64) - 1])) + text
        return replace(key, value=random.choice([_stored(text), _stored(text), lie]))
    if key.kind == _ARRAY and len(key.value) > 12 and random.random() < 0.8:
        of, count = struct.unpack_from("<IQ", key.value)
        if random.random() < 0.3:
            lie = random.choice([0, count - 1, count + 1, 1 << 40, (1 << 64) - 1])
            return replace(key, value=struct.pack("<IQ", of, lie) + key.value[12:])
        if random.random() < 0.3:
            return replace(
                key, value=struct.pack("<IQ", random.randrange(14), count) + key.value[12:]
            )
        data = bytearray(key.value)
        for _ in range(random.choice([1, 5, 50])):
            data[random.randrange(12, len(data))] = random.randrange(256)
        return replace(key, value=bytes(data))
    kind = random.choice([4, 6, 7, _STRING])
    value = _stored(b"x") if kind == _STRING else struct.pack(_SCALARS[kind], 1)
    return replace(key, kind=kind, value=value)


def _plus_one(value: bytes) -> bytes:
    number = int.from_bytes(value, "little") + 1
    return (number % (1 << 8 * len(value))).to_bytes(len(value), "little")


def _name(random: Random, name: bytes) -> bytes:
    return random.choice(
        [b"", name + b"x", name[:-1], name.upper(), b"\xff\xfe", b"a" * 70, name[::-1]]
    )


def _tensors(random: Random, header: _Header) -> _Header:
    tensors = list(header.tensors)
    at = random.randrange(len(tensors))
    tensor = tensors[at]
    match random.randrange(7):
        case 0:
            del tensors[at]
        case 1:
            tensors.insert(random.randrange(len(tensors)), tensor)  # twice
        case 2:
            tensors[at] = replace(tensor, name=_name(random, tensor.name))
        case 3:
            tensors[at] = replace(tensor, kind=random.choice([*range(45), 1 << 20]))
        case 4:
            offsets = [0, tensor.offset + 32, tensor.offset + 1, 1 << 40, (1 << 64) - 32]
            tensors[at] = replace(tensor, offset=random.choice(offsets))
        case _:
            shape = list(tensor.shape)
            axis = random.randrange(len(shape))
            sizes = [0, 1, shape[axis] + 1, shape[axis] * 2, 1 << 32, (1 << 63) - 1, (1 << 64) - 1]
            shape[axis] = random.choice(sizes)
            shapes = [shape, shape[::-1], shape[:-1], [*shape, 1], [*shape, 1, 1, 1]]
            tensors[at] = replace(tensor, shape=tuple(random.choice(shapes)))
    return replace(header, tensors=tuple(tensors))


def _counts(random: Random, header: _Header) -> _Header:
    tensors, keys = len(header.tensors), len(header.keys)
    if random.random() < 0.3:
        return replace(header, version=random.choice([0, 1, 2, 4, 0x03000000, (1 << 32) - 1]))
    lies = [(0, keys), (tensors, 0), (tensors + 1, keys), (tensors, keys + 1), (tensors - 1, keys),
            (1 << 40, keys), (tensors, 1 << 40), ((1 << 64) - 1, (1 << 64) - 1)]  # fmt: skip
    return replace(header, counts=random.choice(lies))

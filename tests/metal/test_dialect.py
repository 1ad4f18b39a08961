"""What C++ accepts and Metal does not, looked for in our sources."""

import re

import pytest

from dflash_mlx.metal import attention_source, quantized_rows

SOURCES = {
    "header": attention_source.HEADER,
    "few": quantized_rows.FEW,
    "many": quantized_rows.MANY,
    "attend": attention_source.ATTEND,
    "merge": attention_source.MERGE,
}

# Qualifiers of functions and address spaces: no variable may be called so.
RESERVED = {"fragment", "vertex", "kernel", "thread", "device", "constant", "threadgroup", "half"}


@pytest.fixture(params=SOURCES)
def source(request):
    return re.sub(r"//[^\n]*", "", SOURCES[request.param])


def test_words_that_metal_does_not_know(source):
    for word in ("double", r"std::", "virtual", "try", "catch", "throw", "new", "delete", "goto"):
        assert not re.search(rf"\b{word}\b" if word.isalpha() else word, source), word
    assert not re.search(r"\[[&=]?\]\s*\(", source), "a lambda"
    assert not re.search(r"\bvec\b|\breinterpret_cast\b", source)


def test_reserved_words_name_nothing(source):
    declared = re.findall(
        r"\b(?:int|uint|float|bool|T|auto|size_t|simdgroup_matrix<[^>]*>)\s+(\w+)", source
    )
    assert not RESERVED.intersection(declared)


def test_float_literals_are_float(source):
    for literal in re.findall(
        r"(?<![\w.])\d+\.\d*(?:e[+-]?\d+)?\w*|(?<![\w.])\d+e-?\d+\w*", source
    ):
        assert literal.endswith("f"), literal


def test_pointers_say_their_address_space(source):
    for match in re.finditer(r"(\w+)\s*\*\s*(?=[a-z_]\w*\s*[,);=])", source):
        before = source[max(0, match.start() - 40) : match.end()]
        product = not re.match(r"(?:T|float|int|uint|half|bfloat)$", match[1])
        assert product or re.search(r"(device|threadgroup|thread|constant)\s+\w+\s*\*", before)


def test_threadgroup_arrays_stand_at_the_top(source):
    declarations = [m.start() for m in re.finditer(r"\n\s*threadgroup\s", source)]
    for at in declarations:
        assert source[:at].count("{") == source[:at].count("}")
        assert "=" not in source[at : source.index(";", at)]


def test_no_thread_leaves_before_a_barrier(source):
    if "_barrier(" in source:
        assert "return" not in source

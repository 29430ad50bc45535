"""Patterns out of configurations: the same answers as Python's re, and an answer soon to those that make re hang."""

from __future__ import annotations

import re
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkernels.formats.patterns import LONGEST, Pattern

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.down_proj",
    "model.layers.3.mlp.experts.127.gate_up_proj",
    "lm_head",
    "visual.blocks.1.attn-qkv",
    "",
    "a\n",
]
PATTERNS = [
    r".*lm_head.*",
    r".*down_proj$",
    r"model\.layers\.\d+\.self_attn\.(q|k|v|o)_proj",
    r"^model[.]layers[.](?:0|3|1[0-5])[.].*",
    r".*\.mlp\.(gate|up|gate_up)_proj$|.*experts.*",
    r"model.layers.[0-9]{2}.+?",
    r"(?:model\.)?layers",
    r"visual\.[^.]*s\.\w+\.attn\-qkv",
    r"[]a.]*",
    r"[^\d\s]{3,}head",
    r"(a|b)+$",
    r"(ab?)?",
    r"x{0,2}$",
    r"()*",
    r"(|a)+$",
    r"|z",
    r"a{1,2}?$",
    r"\S\D\W?",
    "",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_as_re_matches(pattern: str) -> None:
    read = Pattern(pattern)
    for name in NAMES:
        assert read.matches(name) == (re.match(pattern, name) is not None), name


_ATOMS = st.sampled_from(["a", "b", ".", "\\.", "\\d", "\\w", "[ab]", "[^a]", "[a-b1]", "^", "$", "1", "\\D"])
_ANY = st.recursive(
    _ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda ways: f"({'|'.join(ways)})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{,2}", "{1,}", "*?", "?+", "{2}?"])).map(
            "".join
        ),
    ),
    max_leaves=8,
)


@settings(max_examples=1000, deadline=None)
@given(_ANY, st.text("ab1.\n", max_size=12))
def test_any_pattern_is_matched_as_re_does_or_refused(pattern: str, name: str) -> None:
    try:
        found = Pattern(pattern).matches(name)
    except ValueError:
        return
    assert found == (re.match(pattern, name) is not None)


@settings(max_examples=1000, deadline=None)
@given(st.text("ab.*+?()[]{}|^$\\d1,-:!=<>P\n&~", max_size=20))
def test_any_text_is_matched_as_re_does_or_refused(pattern: str) -> None:
    try:
        found = Pattern(pattern).matches("ab.b1")
    except ValueError:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # re warns of some classes
        assert found == (re.match(pattern, "ab.b1") is not None)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?!lm_head).*",
        r"(?=a)",
        r"(?i)a",
        r"(?P<n>a)",
        r"(a)\1",
        r"\ba",
        r"\A",
        r"a*+",
        r"a**",
        r"(a*)*",
        r"((a+)b)+",
        r"(ab){2}",
        r"*a",
        r"(*a)",
        r"^*",
        r"a{65}",
        r"a{3,2}",
        r"a{,3}",
        r"(a",
        r"a)",
        r"[a",
        r"[b-a]",
        r"[[a]",
        r"[a--b]",
        r"[a||b]",
        "a" * (LONGEST + 1),
        "\\",
    ],
)
def test_what_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=r"pattern|class of characters"):
        Pattern(pattern)


def test_long_names_are_refused() -> None:
    assert Pattern(".*b").matches("a" * (LONGEST - 1) + "b")
    with pytest.raises(ValueError, match=f"has {LONGEST + 1} characters"):
        Pattern("a").matches("a" * (LONGEST + 1))


@pytest.mark.parametrize(
    "pattern",
    [
        "(a|a)*b",
        "(a|a)+(a|a)+b",
        "a?" * 60 + "a" * 60 + "b",
        "(a|a)" * 50 + "b",
        ".*" * 100 + "b",
        "(.|a)*" * 40 + "b",
        "(" * 120 + "a" + ")" * 120,
        "(((a?)?)?)?" * 20 + "b",
        ".{64}" * 50 + "b",
        ".{0,64}" * 36 + "b",
    ],
)
def test_patterns_that_never_end_elsewhere(pattern: str) -> None:
    start = time.perf_counter()
    found = Pattern(pattern).matches("a" * LONGEST)
    assert time.perf_counter() - start < 5
    assert found == (pattern.startswith("(((("))

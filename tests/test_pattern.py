"""Patterns match what Python's re matches from the start, and take no time where it takes for ever."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qkernels.formats.pattern import Pattern, literal

ATOMS = ["a", "b", "ab", ".", r"\.", "[ab]", "[^a]", r"\d", r"\w", r"\W", r"\S", "[a-b1]", "[]a]", "[a-]", r"[\d.]",
         "1", "^", "$", r"\b", r"\n", "_", ""]  # fmt: skip
REPEATS = ["*", "+", "?", "{2}", "{1,2}", "{0,}", "*?", "+?", "??", "{3}", "{2,3}?"]


def _grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"({two[0]}|{two[1]})"),
        inner.map(lambda one: f"(?:{one})"),
        st.tuples(st.sampled_from(["(?=", "(?!"]), inner).map(lambda two: f"{two[0]}{two[1]})"),
        st.tuples(inner, st.sampled_from(REPEATS)).map(lambda two: f"(?:{two[0]}){two[1]}"),
    )


@settings(max_examples=1500, deadline=None)
@given(
    pattern=st.recursive(st.sampled_from(ATOMS), _grow, max_leaves=6),
    texts=st.lists(st.text("ab1._\n-]", max_size=7), min_size=4, max_size=8),
)
def test_it_matches_what_re_matches(pattern: str, texts: list[str]) -> None:
    found = Pattern(pattern)
    expected = re.compile(pattern, re.ASCII)
    for text in texts:
        assert found.matches(text) == (expected.match(text) is not None)


@pytest.mark.parametrize(
    ("pattern", "text", "wanted"),
    [
        (r".*\.18\..*gate.*", "model.layers.18.mlp.gate_proj", True),
        (r".*\.18\..*gate.*", "model.layers.8.mlp.gate_proj", False),
        (r"model\.layers\.(?:[0-9]|1[0-5])\.", "model.layers.15.x", True),
        (r"model\.layers\.(?:[0-9]|1[0-5])\.", "model.layers.16.x", False),
        (r"^(?!.*(?:q|k)_proj).*", "a.q_proj", False),
        (r"^(?!.*(?:q|k)_proj).*", "a.v_proj", True),
        (r".*mlp\.experts(\.|$)", "a.mlp.experts", True),
        (r"b", "ab", False),
        ("a{2,3}b", "aab", True),
        ("a{2,3}b", "aaab", True),
        ("a{2,3}b", "ab", False),
        ("a{2,3}b", "aaaab", False),
        ("a{2}b", "aaab", False),
        ("a{2,}b", "aaaab", True),
        ("a?b", "aab", False),
        ("", "", True),
        ("a$", "a\n", True),
    ],
)
def test_names_of_modules(pattern: str, text: str, wanted: bool) -> None:
    assert Pattern(pattern).matches(text) is wanted


@pytest.mark.parametrize(
    "pattern",
    ["(a", "a)", "[a", "*a", "a**", "a*+", "a{", "a{x}", "a{2,1}", "a{99999}", "^*", "(?=a)*", "(?<=a)", "(?i)a",
     "(?P<n>a)", r"(a)\1", "\\", r"\Z", "[b-a]", "[[:alpha:]]", r"[\D]", "(" * 51 + ")" * 51, "a" * 1001, r"[a-\d]"],
)  # fmt: skip
def test_what_is_not_supported_is_said(pattern: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        Pattern(pattern)


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a*)*b", "((a?){999}){999}b", "(a|aa|a.)*b", "(.*)(.*)(.*)(.*)(.*)(.*)b"]
)
def test_no_pattern_takes_long(pattern: str) -> None:
    start = time.perf_counter()
    Pattern(pattern).matches("a" * 300 + "!")
    assert time.perf_counter() - start < 5


def test_patterns_of_one_string() -> None:
    assert literal(r"^a\.b-c$") == "a.b-c"
    assert literal("^$") == ""
    for pattern in ("a", "^a", "a$", "^a.b$", r"^a\d$", "^a|b$", "^(a)$", "^a\\$", "$", ""):
        assert literal(pattern) is None
    assert literal("^") is None

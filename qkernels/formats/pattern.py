"""Regular expressions from files, matched in a time that no pattern can make long.

Configurations name modules by patterns. A file is not to be trusted, and backtracking, as in Python's re, can take for
ever; here all ways to match go on at once, each step a few operations on a set of positions.

    a  .  [a-z_]  [^.]  \\d \\w \\s \\D \\W \\S     one character; ASCII, . is any but a newline
    \\.                                       a character that is no letter or digit, as it is
    ^  $  \\b                                  a place: start, end, the edge of a word
    ab  a|b  (a)  (?:a)  (?=a)  (?!a)         as usual
    *  +  ?  {2}  {2,}  {2,5}                 repeated; lazy ones (*?) match the same strings

Others (backward references, lookbehind, flags, names, atomic groups) are refused.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import string
from collections.abc import Callable

LONGEST = 1000  # characters in a pattern
DEEPEST = 50  # parentheses in parentheses
_WORD = frozenset(string.ascii_letters + string.digits + "_")
_CLASSES = {"d": frozenset(string.digits), "w": _WORD, "s": frozenset(" \t\n\r\f\v")}
_CONTROL = {"n": "\n", "t": "\t", "r": "\r", "f": "\f"}
_SPECIAL = frozenset("\\^$.|?*+()[]{}")


@dataclasses.dataclass
class _Text:
    """What is matched. A set of positions, 0 to its length, is an int: bit p is position p."""

    characters: str
    ahead: dict[int, dict[int, bool]] = dataclasses.field(
        default_factory=dict
    )  # lookaheads: node -> position -> whether it matches


# text, positions where it may begin -> positions where it may end
_Node = Callable[[_Text, int], int]


class Pattern:
    """A compiled pattern.

    Raises:
        ValueError: the pattern is not one, or has something that is not supported; it is named.
    """

    def __init__(self, pattern: str) -> None:
        if len(pattern) > LONGEST:
            raise ValueError(f"a pattern has at most {LONGEST} characters, got {len(pattern)}")
        self._node = _Parser(pattern).whole()

    def matches(self, text: str) -> bool:
        """Whether some start of text, maybe all of it, matches: as re.match finds it."""
        return self._node(_Text(text), 1) != 0


def literal(pattern: str) -> str | None:
    """The one string that matches, if the pattern is ^, that string, escaped, and $; else None."""
    if not (pattern.startswith("^") and pattern.endswith("$")):
        return None
    found, at = "", 1
    while at < len(pattern) - 1:
        escaped = pattern[at] == "\\"
        at += escaped
        if at == len(pattern) - 1 or (pattern[at].isalnum() if escaped else pattern[at] in _SPECIAL):
            return None
        found += pattern[at]
        at += 1
    return found


class _Parser:
    def __init__(self, pattern: str) -> None:
        self.pattern, self.at, self.depth = pattern, 0, 0

    def whole(self) -> _Node:
        node = self._alternatives()
        if self.at < len(self.pattern):
            raise self._error("a ) that closes nothing")
        return node

    def _error(self, what: str) -> ValueError:
        return ValueError(f"the pattern {self.pattern!r} is not supported: {what}, before its character {self.at}")

    def _take(self, *options: str) -> str:
        """The option that comes next, which is then behind; or ""."""
        found = next((option for option in options if self.pattern.startswith(option, self.at)), "")
        self.at += len(found)
        return found

    def _next(self) -> str:
        if self.at == len(self.pattern):
            raise self._error("it ends too early")
        self.at += 1
        return self.pattern[self.at - 1]

    def _alternatives(self) -> _Node:
        found = [self._sequence()]
        while self._take("|"):
            found.append(self._sequence())
        return found[0] if len(found) == 1 else _either(found)

    def _sequence(self) -> _Node:
        found: list[_Node | str] = []  # characters side by side are one string
        while self.at < len(self.pattern) and self.pattern[self.at] not in "|)":
            atom, place = self._atom()
            repeat = self._repeat()
            if repeat is not None:
                if place or self._repeat() is not None:
                    raise self._error("a repetition of nothing, or of a repetition")
                found.append(_repeated(_string(atom) if isinstance(atom, str) else atom, *repeat))
            elif isinstance(atom, str) and found and isinstance(found[-1], str):
                found[-1] += atom
            else:
                found.append(atom)
        return _one_by_one([_string(each) if isinstance(each, str) else each for each in found])

    def _repeat(self) -> tuple[int, int | None] | None:
        mark = self._take("*", "+", "?", "{")
        if not mark:
            return None
        least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(mark, (0, None))
        if mark == "{":
            end = self.pattern.find("}", self.at)
            low, comma, high = self.pattern[self.at : max(end, self.at)].partition(",")
            numbers = (low, high) if high else (low,)
            if not all(n.isascii() and n.isdigit() and len(n) <= 4 for n in numbers):
                raise self._error("a { that is no repetition")
            least, most = int(low), int(high) if high else None if comma else int(low)
            if most is not None and most < least:
                raise self._error("a repetition from more to fewer")
            self.at = end + 1
        if self._take("+"):
            raise self._error("a repetition that gives nothing back, or of a repetition")
        self._take("?")  # lazy
        return least, most

    def _atom(self) -> tuple[_Node | str, bool]:
        """A node or a character, and whether it is a place, which cannot be repeated."""
        c = self._next()
        if c == "(":
            return self._group()
        if c == "[":
            return _one_of(*self._class()), False
        if c == ".":
            return _one_of(frozenset("\n"), outside=True), False
        if c in "^$":
            return _at_start if c == "^" else _at_end, True
        if c == "\\":
            if self._take("b"):
                return _at_edge, True
            members, outside = self._escape()
            return (min(members), False) if len(members) == 1 else (_one_of(members, outside), False)
        if c in "*+?{":
            raise self._error("a repetition of nothing")
        return c, False

    def _group(self) -> tuple[_Node, bool]:
        kind = self._take("?:", "?=", "?!")
        if not kind and self.pattern.startswith(("?", "*"), self.at):
            raise self._error("a group of another kind than (, (?:, (?= and (?!")
        self.depth += 1
        if self.depth > DEEPEST:
            raise self._error(f"more than {DEEPEST} groups in one another")
        node = self._alternatives()
        self.depth -= 1
        if not self._take(")"):
            raise self._error("a ( that is not closed")
        return (_ahead(node, wanted=kind == "?="), True) if kind in ("?=", "?!") else (node, False)

    def _escape(self) -> tuple[frozenset[str], bool]:
        c = self._next()
        if c.lower() in _CLASSES:
            return _CLASSES[c.lower()], c.isupper()
        if c.isalnum() and c not in _CONTROL:
            raise self._error(f"\\{c}")
        return frozenset(_CONTROL.get(c, c)), False

    def _class(self) -> tuple[frozenset[str], bool]:
        outside, found, first = bool(self._take("^")), set[str](), True
        while first or not self._take("]"):
            first = False
            start = self._member()
            if self.pattern.startswith("-", self.at) and not self.pattern.startswith("-]", self.at):
                self.at += 1
                end = self._member()
                if len(start) != 1 or len(end) != 1 or min(end) < min(start):
                    raise self._error("a range that is none")
                start = frozenset(map(chr, range(ord(min(start)), ord(min(end)) + 1)))
            found |= start
        return frozenset(found), outside

    def _member(self) -> frozenset[str]:
        """One character, or several, in brackets."""
        c = self._next()
        if c == "[":
            raise self._error("a [ in brackets that is not escaped")
        if c != "\\":
            return frozenset(c)
        members, outside = self._escape()
        if outside:
            raise self._error("\\D, \\W or \\S in brackets")
        return members


# ---- nodes ----


def _where(starts: int, holds: Callable[[int], bool]) -> int:
    """Those of the positions for which something holds."""
    found = 0
    while starts:
        low = starts & -starts
        if holds(low.bit_length() - 1):
            found |= low
        starts ^= low
    return found


def _one_of(members: frozenset[str], outside: bool = False) -> _Node:
    def node(text: _Text, starts: int) -> int:
        c = text.characters
        return _where(starts, lambda at: at < len(c) and (c[at] in members) != outside) << 1

    return node


def _string(wanted: str) -> _Node:
    def node(text: _Text, starts: int) -> int:
        return _where(starts, lambda at: text.characters.startswith(wanted, at)) << len(wanted)

    return node


def _one_by_one(nodes: list[_Node]) -> _Node:
    def node(text: _Text, starts: int) -> int:
        for each in nodes:
            starts = each(text, starts)
        return starts

    return node


def _either(nodes: list[_Node]) -> _Node:
    def node(text: _Text, starts: int) -> int:
        return functools.reduce(operator.or_, (each(text, starts) for each in nodes))

    return node


def _repeated(once: _Node, least: int, most: int | None) -> _Node:
    def node(text: _Text, starts: int) -> int:
        for _ in range(least):
            before, starts = starts, once(text, starts)
            if starts in (0, before):  # and so it stays
                break
        ends = fresh = starts
        left = most - least if most is not None else len(text.characters)
        while fresh and left:
            fresh = once(text, fresh) & ~ends
            ends |= fresh
            left -= 1
        return ends

    return node


def _at_start(text: _Text, starts: int) -> int:
    return starts & 1


def _at_end(text: _Text, starts: int) -> int:
    c = text.characters
    return _where(starts, lambda at: c[at:] in ("", "\n"))


def _at_edge(text: _Text, starts: int) -> int:
    c = text.characters
    return _where(starts, lambda at: (at > 0 and c[at - 1] in _WORD) != (at < len(c) and c[at] in _WORD))


def _ahead(inner: _Node, wanted: bool) -> _Node:
    def node(text: _Text, starts: int) -> int:
        known = text.ahead.setdefault(id(inner), {})  # once for each position, however often it is asked

        def holds(at: int) -> bool:
            if at not in known:
                known[at] = inner(text, 1 << at) != 0
            return known[at] == wanted

        return _where(starts, holds)

    return node

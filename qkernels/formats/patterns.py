"""Regular expressions out of a configuration, in time that is bounded whatever they are.

Python's own matcher tries one way after another, and (a|a)*b keeps it busy for ever. This one follows all ways at once:
after each piece of the pattern it knows the set of places in the name that may have been reached, so a piece costs at
most a step for each place. Read are the pieces that names of modules need:

    abc \\. \\d \\w \\s .  [a-z0-9] [^.]     one character
    x* x+ x? x{2} x{2,} x{2,5}             of one character, or *, + and ? of a group; lazy ones (x*?) match the same
    (a|b) (?:a|b)                          groups
    ^ $                                    the start, and the end or a line break before it

These mean what Python's `re.match` says. Anything else is refused: looking ahead, back references, flags, word
boundaries, repeated groups that hold repetitions themselves, and patterns or names longer than LONGEST.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Set
from itertools import count

LONGEST = 256  # characters of a pattern, and of a name that it is held against
_MOST_REPEATS = 64  # numbers in {}

Match = Callable[[str, Set[int]], Set[int]]  # a name, places in it -> places after the piece
_TOKEN = re.compile(
    r"(?P<one>\\[dDwWsS]|\\[^\w\s]|\[\^?\]?(?:\\[dDwWsS]|\\[^\w\s]|[^\]\\\[])*\]|[^\\\[\](){}|*+?^$])"
    r"|(?P<open>\((?:\?:)?(?!\?))|(?P<close>\))|(?P<bar>\|)|(?P<edge>[\^$])"
    r"|(?P<times>(?:[*+?]|\{(?P<low>\d{1,4})(?P<more>,(?P<high>\d{1,4})?)?\})\??)(?![*+?{])"
)


class Pattern:
    """A pattern; `matches(name)` as `re.match(pattern, name) is not None`.

    Raises:
        ValueError: it is too long, not a regular expression, or not one of those that are read.
    """

    def __init__(self, text: str) -> None:
        if len(text) > LONGEST:
            raise ValueError(f"a pattern must have at most {LONGEST} characters, got {len(text)}")
        self._text, self._place = text, 0
        self._next()
        self._match, _ = self._alternatives()
        if self._kind:
            raise self._refused()

    def matches(self, name: str) -> bool:
        """Whether the pattern matches at the start of a name; ValueError for a name that is too long."""
        if len(name) > LONGEST:
            raise ValueError(f"a name that a pattern is held against has {len(name)} characters, more than {LONGEST}")
        return bool(self._match(name, {0}))

    def _next(self) -> None:
        """Read the next token: its kind (None at the end) and its text."""
        self._kind, self._found = None, None
        if self._place < len(self._text):
            self._found = _TOKEN.match(self._text, self._place)
            if self._found is None:
                raise self._refused()
            self._kind = next(k for k in ("one", "open", "close", "bar", "edge", "times") if self._found[k] is not None)
            self._place = self._found.end()

    def _refused(self) -> ValueError:
        start = self._found.start() if self._found else self._place
        rest = f"{self._text[start:]!r:.20}"
        return ValueError(f"pattern {self._text!r}: what is at character {start} is not read: {rest}")

    def _alternatives(self) -> tuple[Match, bool]:
        """Up to a closing bracket or the end; whether anything in it is repeated."""
        ways, repeated = [], False
        while True:
            way, has = self._sequence()
            ways.append(way)
            repeated |= has
            if self._kind != "bar":
                break
            self._next()
        return lambda name, places: set().union(*(way(name, places) for way in ways)), repeated

    def _sequence(self) -> tuple[Match, bool]:
        pieces: list[Match] = []
        repeated = False
        while self._kind in ("one", "open", "edge"):
            assert self._found is not None
            kind, text, inner = self._kind, self._found[0], False
            if kind == "open":
                self._next()
                piece, inner = self._alternatives()
                if self._kind != "close":
                    raise ValueError(f"pattern {self._text!r}: a bracket is not closed")
            elif kind == "edge":
                piece = _start if text == "^" else _end
            else:
                piece = _one(text)
            self._next()
            if self._kind == "times" and kind != "edge":
                piece = self._times(piece, kind == "open", inner)
                inner = True
                self._next()
            pieces.append(piece)
            repeated |= inner
        if self._kind == "times":
            raise self._refused()

        def sequence(name: str, places: Set[int]) -> Set[int]:
            for piece in pieces:
                if not places:
                    break
                places = piece(name, places)
            return places

        return sequence, repeated

    def _times(self, piece: Match, group: bool, inner: bool) -> Match:
        """A piece as often as the token says."""
        assert self._found is not None
        sign, low, high = self._found[0][0], 0, None
        if sign == "{":
            low = int(self._found["low"])
            top = self._found["high"] if self._found["more"] else self._found["low"]
            high = None if top is None else int(top)
        elif sign == "+":
            low = 1
        elif sign == "?":
            high = 1
        if group and (sign == "{" or (inner and sign != "?")):
            raise self._refused()
        if max(low, high or 0) > _MOST_REPEATS or (high is not None and high < low):
            raise self._refused()
        return _repeated(piece, low, high)


def _one(text: str) -> Match:
    """One character, such as a class: text is a pattern of re's, which cannot go wrong on one character."""
    try:
        if any(sign in text for sign in ("--", "&&", "~~", "||")):  # re warns that they may come to mean something
            raise ValueError(f"{text!r} is no class of characters that is read")
        test = re.compile(text).fullmatch
    except re.error as error:
        raise ValueError(f"{text!r} is no class of characters: {error}") from None
    return lambda name, places: {at + 1 for at in places if at < len(name) and test(name[at])}


def _start(name: str, places: Set[int]) -> Set[int]:
    return places & {0}


def _end(name: str, places: Set[int]) -> Set[int]:
    return places & ({len(name), len(name) - 1} if name.endswith("\n") else {len(name)})


def _repeated(piece: Match, low: int, high: int | None) -> Match:
    def match(name: str, places: Set[int]) -> Set[int]:
        for _ in range(low):
            places = piece(name, places)
        reached = set(places)
        for _ in count() if high is None else range(high - low):
            places = piece(name, places) - reached  # only places that are new: each is looked at once
            if not places:
                break
            reached |= places
        return reached

    return match

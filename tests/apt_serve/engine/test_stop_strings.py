from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from apt_serve.engine.stop_strings import StopMatch, StopStringMatcher

stop_strings = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4).map(tuple)
pieces = st.lists(st.text("abc", max_size=4), max_size=20)


def naive(text: str, stops: tuple[str, ...], num_ignored: int = 0) -> StopMatch | None:
    """The first end of any stop string behind the ignored characters, and of those that end there the longest."""
    for end in range(num_ignored + 1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return StopMatch(text[: end - len(longest)], longest)
    return None


def push_all(matcher: StopStringMatcher, pieces: list[str], *, counts: bool = True) -> tuple[str, StopMatch | None]:
    """What was passed on in all, and the match, if there was one."""
    passed = ""
    for piece in pieces:
        found = matcher.push(piece, counts=counts)
        if isinstance(found, StopMatch):
            return passed + found.text, found
        passed += found
    return passed, None


def test_without_stop_strings_text_passes_at_once() -> None:
    assert StopStringMatcher(()).push("abc") == "abc"


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    matcher = StopStringMatcher(("END",))
    assert [matcher.push(piece) for piece in ("xE", "N", "EN", "d")] == ["x", "", "EN", "ENd"]


def test_a_stop_string_is_found_across_pieces_and_cut() -> None:
    assert push_all(StopStringMatcher(("END",)), ["xE", "N", "Dy"]) == ("x", StopMatch("", "END"))


def test_the_first_to_be_complete_wins() -> None:
    assert StopStringMatcher(("abcd", "bc")).push("abcd") == StopMatch("a", "bc")


def test_of_those_complete_at_once_the_longest_wins() -> None:
    assert StopStringMatcher(("c", "abc")).push("xabc") == StopMatch("x", "abc")


def test_flush_gives_what_was_held_back_once() -> None:
    matcher = StopStringMatcher(("END",))
    matcher.push("xEN")
    assert (matcher.flush(), matcher.flush()) == ("EN", "")


def test_a_stop_string_that_did_not_count_never_does() -> None:
    matcher = StopStringMatcher(("ab", "abcx"))
    assert matcher.push("ab", counts=False) == ""
    assert matcher.push("d") == "abd"


def test_a_stop_string_begun_before_it_would_count_does() -> None:
    matcher = StopStringMatcher(("ab",))
    assert matcher.push("xa", counts=False) == "x"
    assert matcher.push("b") == StopMatch("", "ab")


@given(pieces, stop_strings)
@example(["a", "ab"], ("aab", "ab"))
def test_pieces_match_as_the_whole_text_would(pieces: list[str], stops: tuple[str, ...]) -> None:
    text = "".join(pieces)
    expected = naive(text, stops)
    matcher = StopStringMatcher(stops)
    passed, match = push_all(matcher, pieces)
    if expected is None:
        assert match is None and passed + matcher.flush() == text
    else:
        assert match is not None and (passed, match.stop) == (expected.text, expected.stop)


@given(pieces, pieces, stop_strings)
def test_what_does_not_count_is_passed_over_as_in_the_whole_text(
    ignored: list[str], pieces: list[str], stops: tuple[str, ...]
) -> None:
    text = "".join([*ignored, *pieces])
    expected = naive(text, stops, num_ignored=len("".join(ignored)))
    matcher = StopStringMatcher(stops)
    before, none = push_all(matcher, ignored, counts=False)
    after, match = push_all(matcher, pieces)
    assert none is None
    if expected is None:
        assert match is None and before + after + matcher.flush() == text
    else:
        assert match is not None and (before + after, match.stop) == (expected.text, expected.stop)


@given(pieces, stop_strings)
def test_no_more_is_held_back_than_may_become_a_stop_string(pieces: list[str], stops: tuple[str, ...]) -> None:
    matcher = StopStringMatcher(stops)
    passed, match = push_all(matcher, pieces)
    if match is None:
        text = "".join(pieces)
        starts = [size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])]
        assert len(text) - len(passed) == max(starts, default=0)

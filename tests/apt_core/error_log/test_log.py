from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from apt_core.error_log.log import ErrorLogger
from apt_core.error_log.record import ErrorRecord

PLACES = ("rank", "step")


def failed(message: str) -> Exception:
    try:
        raise RuntimeError(message)
    except RuntimeError as error:
        return error


def of_rank(folder: Path, rank: int, **settings: Any) -> ErrorLogger:
    return ErrorLogger(folder, f"rank{rank}", PLACES, **settings)


def test_an_error_is_one_line_with_its_context_and_traceback(tmp_path: Path) -> None:
    of_rank(tmp_path, 2).log_to_file(failed("two\nlines"), {"step": 7, "phase": "backward", "path": tmp_path})
    (line,) = (tmp_path / "errors-rank2.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["kind"], record["message"]) == ("RuntimeError", "two\nlines")
    assert "in failed" in record["traceback"]
    assert record["context"] == {"step": 7, "phase": "backward", "path": str(tmp_path)}


def test_errors_that_differ_in_numbers_only_have_one_cause_over_all_processes(tmp_path: Path) -> None:
    first, second = of_rank(tmp_path, 0), of_rank(tmp_path, 1)
    for step in (3, 4):
        first.log_to_file(failed(f"no {step * 100} bytes at 0xab{step}"), {"rank": 0, "step": step})
    second.log_to_file(failed("no 7.5 bytes at 0x1"), {"rank": 1, "step": 4})
    second.log_to_file(failed("something else"), {"rank": 1})
    patterns = first.analyze_error_patterns()
    assert patterns.total == 4
    frequent, rare = patterns.causes
    assert (frequent.name, frequent.count) == ("RuntimeError: no # bytes at #", 3)
    assert (frequent.seen_at("rank"), frequent.seen_at("step")) == ("0, 1", "3, 4")
    assert (rare.count, rare.seen_at("step")) == (1, "-")
    assert dict(patterns.places["rank"]) == {0: 2, 1: 2}
    assert patterns.places["step"] == ((4, 2), (3, 1))


def test_many_places_are_told_as_a_range_or_by_the_first_of_them(tmp_path: Path) -> None:
    logger = of_rank(tmp_path, 0)
    for step in range(7):
        logger.log_to_file(failed("x"), {"rank": f"node{step}", "step": step})
    (cause,) = logger.analyze_error_patterns().causes
    assert cause.seen_at("step") == "0 to 6"
    assert cause.seen_at("rank") == "node0, node1, node2, node3, node4 and 2 more"


def test_what_is_older_does_not_count(tmp_path: Path) -> None:
    logger = of_rank(tmp_path, 0)
    logger.keep(ErrorRecord("OldError", "long ago", 1000.0))
    logger.log_to_file(failed("now"))
    assert [cause.name for cause in logger.analyze_error_patterns(since=1001.0).causes] == ["RuntimeError: now"]
    assert logger.analyze_error_patterns().total == 2


def test_the_log_stays_bounded_and_keeps_the_newest(tmp_path: Path) -> None:
    logger = of_rank(tmp_path, 0, max_bytes=20_000)
    for step in range(200):
        logger.log_to_file(failed("x" * 500), {"step": step})
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 20_000
    (cause,) = logger.analyze_error_patterns().causes
    assert cause.values["step"][-1] == 199
    assert cause.count > 5


def test_of_many_processes_the_files_of_the_last_stay(tmp_path: Path) -> None:
    for number in range(5):
        of_rank(tmp_path, number, max_files=3).log_to_file(failed(f"process {chr(97 + number)}"))
        os.utime(tmp_path / f"errors-rank{number}.jsonl", (number, number))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"errors-rank{number}.jsonl" for number in (2, 3, 4)]


def test_one_huge_error_is_cut(tmp_path: Path) -> None:
    of_rank(tmp_path, 0).log_to_file(failed("x" * 1_000_000))
    assert (tmp_path / "errors-rank0.jsonl").stat().st_size < 50_000


def test_a_line_that_a_crash_cut_off_is_passed_over(tmp_path: Path) -> None:
    logger = of_rank(tmp_path, 0)
    logger.log_to_file(failed("whole"))
    with (tmp_path / "errors-rank0.jsonl").open("ab") as file:
        file.write(b'{"kind": "Runt\xff')
    assert logger.analyze_error_patterns().total == 1


def test_reports_name_causes_and_places_and_escape_what_messages_hold(tmp_path: Path) -> None:
    logger = of_rank(tmp_path, 5)
    logger.log_to_file(failed("<script>a|b</script>"), {"rank": 5, "step": 12})
    files = logger.generate_error_report()
    markdown, page = files.markdown.read_text(), files.html.read_text()
    assert "| cause | errors | ranks | steps | last |" in markdown
    assert "| RuntimeError: &lt;script&gt;a\\|b&lt;/script&gt; | 1 | 5 | 12 |" in markdown
    assert "<td>RuntimeError: &lt;script&gt;a|b&lt;/script&gt;</td><td>1</td><td>5</td><td>12</td>" in page
    assert "<script>" not in page
    assert "in failed" in page and "in failed" in markdown


def test_a_report_without_errors_says_so(tmp_path: Path) -> None:
    files = of_rank(tmp_path, 0).generate_error_report()
    assert "No errors were logged." in files.markdown.read_text()

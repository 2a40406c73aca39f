from __future__ import annotations

import json
from pathlib import Path

from apt_train.errors.log import ErrorLogger


def failed(message: str) -> Exception:
    try:
        raise RuntimeError(message)
    except RuntimeError as error:
        return error


def test_an_error_is_one_line_with_its_rank_step_and_traceback(tmp_path: Path) -> None:
    ErrorLogger(tmp_path, rank=2).log_to_file(failed("two\nlines"), {"step": 7, "phase": "backward", "path": tmp_path})
    (line,) = (tmp_path / "errors-rank2.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert (record["kind"], record["message"], record["rank"], record["step"]) == ("RuntimeError", "two\nlines", 2, 7)
    assert "in failed" in record["traceback"]
    assert record["context"] == {"phase": "backward", "path": str(tmp_path)}


def test_errors_that_differ_in_numbers_only_have_one_cause_over_all_ranks(tmp_path: Path) -> None:
    first, second = ErrorLogger(tmp_path, rank=0), ErrorLogger(tmp_path, rank=1)
    for step in (3, 4):
        first.log_to_file(failed(f"no {step * 100} bytes at 0xab{step}"), {"step": step})
    second.log_to_file(failed("no 7.5 bytes at 0x1"), {"step": 4})
    second.log_to_file(failed("something else"), {})
    patterns = first.analyze_error_patterns()
    assert patterns.total == 4
    frequent, rare = patterns.causes
    assert (frequent.name, frequent.count, frequent.ranks) == ("RuntimeError: no # bytes at #", 3, (0, 1))
    assert (frequent.first_step, frequent.last_step) == (3, 4)
    assert (rare.count, rare.steps) == (1, "-")
    assert dict(patterns.ranks) == {0: 2, 1: 2}
    assert patterns.steps == ((4, 2), (3, 1))


def test_the_log_stays_bounded_and_keeps_the_newest(tmp_path: Path) -> None:
    logger = ErrorLogger(tmp_path, rank=0, max_bytes=20_000)
    for step in range(200):
        logger.log_to_file(failed("x" * 500), {"step": step})
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 20_000
    (cause,) = logger.analyze_error_patterns().causes
    assert cause.last_step == 199
    assert cause.count > 5


def test_one_huge_error_is_cut(tmp_path: Path) -> None:
    ErrorLogger(tmp_path, rank=0).log_to_file(failed("x" * 1_000_000))
    assert (tmp_path / "errors-rank0.jsonl").stat().st_size < 50_000


def test_a_line_that_a_crash_cut_off_is_passed_over(tmp_path: Path) -> None:
    logger = ErrorLogger(tmp_path, rank=0)
    logger.log_to_file(failed("whole"))
    with (tmp_path / "errors-rank0.jsonl").open("ab") as file:
        file.write(b'{"kind": "Runt\xff')
    assert logger.analyze_error_patterns().total == 1


def test_reports_name_causes_ranks_and_steps_and_escape_what_messages_hold(tmp_path: Path) -> None:
    logger = ErrorLogger(tmp_path, rank=5)
    logger.log_to_file(failed("<script>a|b</script>"), {"step": 12})
    files = logger.generate_error_report()
    markdown, page = files.markdown.read_text(), files.html.read_text()
    assert "| RuntimeError: &lt;script&gt;a\\|b&lt;/script&gt; | 1 | 5 | 12 |" in markdown
    assert "<td>RuntimeError: &lt;script&gt;a|b&lt;/script&gt;</td><td>1</td><td>5</td><td>12</td>" in page
    assert "<script>" not in page
    assert "in failed" in page and "in failed" in markdown


def test_a_report_without_errors_says_so(tmp_path: Path) -> None:
    files = ErrorLogger(tmp_path, rank=0).generate_error_report()
    assert "No errors were logged." in files.markdown.read_text()

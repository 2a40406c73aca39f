"""SIGKILL of worker, server and Redis at random moments: every line is in the output exactly once."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.apt_serve.jobs.stack import REDIS, Driver, Stack
from tests.apt_serve.records.postgres import needs_postgres

NUM_LINES = 200
NEEDS_REDIS = pytest.mark.skipif(REDIS is None, reason="needs redis-server")
DRIVERS = [
    "embedded",
    pytest.param("celery", marks=NEEDS_REDIS),
    pytest.param("compose", marks=[NEEDS_REDIS, needs_postgres]),
]


def check_kills(driver: Driver, folder: Path, num_kills: int, seed: int, records_url: str | None) -> None:
    """While a batch runs, kill any of its processes, now and then two of them, and start them again."""
    chance = random.Random(seed)
    with Stack(driver, folder, token_delay_s=0.02, lease_s=1.0, records_url=records_url) as stack:
        batch_id = stack.submit(NUM_LINES)
        num_in_time = 0
        for number in range(num_kills):
            # Somewhere in the next part of the batch, so that kills are spread over all of it.
            mark = (number + chance.random()) * NUM_LINES / num_kills
            stack.wait_until(lambda mark=mark: stack.batch(batch_id)["request_counts"]["completed"] >= mark)
            time.sleep(chance.uniform(0, 0.2))
            victims = chance.sample(stack.names, chance.choice([1, min(2, len(stack.names))]))
            num_in_time += stack.batch(batch_id)["completed_at"] is None
            for name in victims:
                stack.kill(name)
            time.sleep(chance.uniform(0, 0.5))
            for name in victims:
                stack.start(name)
            print(f"kill {number}: {', '.join(victims)}")
        batch = stack.ended(batch_id)
        assert num_in_time >= num_kills // 2
        assert batch["status"] == "completed", stack.logs()
        assert batch["request_counts"] == {"total": NUM_LINES, "completed": NUM_LINES, "failed": 0}
        assert stack.custom_ids(batch["output_file_id"]) == [str(number) for number in range(NUM_LINES)], f"seed {seed}"
        assert batch["error_file_id"] is None


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("driver", DRIVERS)
def test_a_batch_outlives_eight_kills(driver: Driver, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue("postgres").new_database() if driver == "compose" else None
    check_kills(driver, tmp_path, 8, seed=2, records_url=url)

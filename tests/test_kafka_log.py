"""What the Kafka library says while a broker is away, in few lines."""

import logging

from detector.cli import SparseKafkaLog


def said(filter_, name, msg, *args):
    record = logging.LogRecord(name, logging.ERROR, __file__, 1, msg, args, None)
    return record.getMessage() if filter_.filter(record) else None


def test_the_librarys_lines_of_one_kind_come_once_in_ten_seconds_with_a_count():
    now = 0.0
    filter_ = SparseKafkaLog(lambda: now)
    lines = [said(filter_, "kafka.net.manager", "Connection failed: %s", n) for n in range(5)]
    assert lines == ["Connection failed: 0", None, None, None, None]
    assert said(filter_, "kafka.net.manager", "Something else: %s", 1) == "Something else: 1"
    assert said(filter_, "kafka.coordinator", "Connection failed: %s", 1) == "Connection failed: 1"
    now = 10.5
    assert said(filter_, "kafka.net.manager", "Connection failed: %s", 9) == (
        "Connection failed: 9 (4 more of this kind before it.)"
    )


def test_what_others_say_is_left_alone():
    filter_ = SparseKafkaLog(lambda: 0.0)
    assert [said(filter_, "detector.daemon", "Alert %s", n) for n in range(3)] == ["Alert 0", "Alert 1", "Alert 2"]

from detector.batcher import Batcher


class Bus:
    """Items that become available at given times; polling moves the clock."""

    def __init__(self, arrivals):
        self.now = 0.0
        self.arrivals = sorted(arrivals)
        self.polls = 0

    def poll(self, timeout_seconds, max_items):
        self.polls += 1
        if not self._due() and self.arrivals and self.arrivals[0] <= self.now + timeout_seconds:
            self.now = self.arrivals[0]
        elif not self._due():
            self.now += timeout_seconds
        taken = self._due()[:max_items]
        self.arrivals = self.arrivals[len(taken) :]
        return taken

    def _due(self):
        return [a for a in self.arrivals if a <= self.now]


def _gather(bus, max_batch=4, max_wait_seconds=0.01, max_items=100):
    return Batcher(max_batch, max_wait_seconds, lambda: bus.now).gather(bus.poll, 0.2, max_items)


def test_a_full_batch_does_not_wait():
    bus = Bus([0.0] * 4)
    assert len(_gather(bus)) == 4
    assert bus.now == 0.0


def test_what_trickles_in_is_awaited_no_longer_than_told():
    bus = Bus([0.0, 0.004, 0.008, 0.5])
    assert len(_gather(bus)) == 3
    assert bus.now <= 0.0101


def test_a_backlog_is_taken_up_to_the_limit():
    bus = Bus([0.0] * 50)
    assert len(_gather(bus, max_items=30)) == 30


def test_nothing_is_returned_after_the_idle_time():
    bus = Bus([])
    assert _gather(bus) == []
    assert bus.now == 0.2
    assert bus.polls == 1


def test_no_more_is_asked_for_than_may_be_taken():
    bus = Bus([0.0] * 50)
    asked = []

    def poll(timeout_seconds, max_items):
        asked.append(max_items)
        return bus.poll(timeout_seconds, max_items)

    assert len(Batcher(64, 0.01, lambda: bus.now).gather(poll, 0.2, 10)) == 10
    assert min(asked) > 0

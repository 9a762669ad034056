"""Every Prometheus series of the detector, in one place. A registry is passed in, so that each test has its own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

_STAGE_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_LATENCY_BUCKETS = (0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0, 5.0, 15.0, 60.0)


class Metrics:
    """The series, by attribute. No series is labelled by stream: a city of sensors must not become a city of series."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, help_text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"gunfire_{name}", help_text, labels, registry=registry)

        def gauge(name: str, help_text: str, labels: tuple[str, ...] = ()) -> Gauge:
            return Gauge(f"gunfire_{name}", help_text, labels, registry=registry)

        self.registry = registry
        # The account. These count when what came of the records is committed, so each record counts once, whatever died
        # before: received = analysed + duplicate + rejected, and left out = chunks_skipped + records_skipped_unread.
        self.records_in = counter("records_received", "Records heard, each once: counted with its commit.")
        self.chunks_out = counter("chunks_analysed", "Chunks whose examples were scored and decided.")
        self.rejected = counter("chunks_rejected", "Records that were no usable chunk, by reason.", ("reason",))
        self.duplicates = counter("chunks_duplicate", "Chunks whose sequence number had been seen; not analysed again.")
        self.missing = counter("chunks_missing", "Sequence numbers that never came: audio lost before the detector.")
        self.skipped_records = counter(
            "records_skipped", "Records left out because the detector was late (daemon.max_lag_seconds)."
        )
        self.skipped = counter(
            "chunks_skipped", "Lost coverage: chunks among the records left out; the log says of which stream."
        )
        self.unread = counter(
            "records_skipped_unread", "Records left out without a look at whose they are, as that took too long."
        )
        self.lost_records = counter(
            "records_lost", "Records that retention dropped before they were read, by partition.", ("partition",)
        )
        self.cut_records = counter(
            "records_cut", "Records that had been read when the log lost its end, by partition.", ("partition",)
        )
        self.alerts = counter("alerts_published", "Alert events published, by state.", ("state",))
        self.deadletters = counter("deadletters_published", "Records put on the dead-letter topic.")
        # What was read beside that.
        self.reread = counter("records_reread", "Records read again in silence to rebuild state.")
        self.uncommitted = counter(
            "records_uncommitted",
            "Records read of which nothing was committed, as the bus failed or another detector took over; they are "
            "read again.",
        )
        # Work done, counted at once.
        self.chunks_in = counter("chunks_accepted", "Chunks decoded and taken into their stream, also when read again.")
        self.resets = counter("stream_resets", "Times that a stream began anew, by reason.", ("reason",))
        self.rebuilt = counter("chunks_rebuilt", "Chunks read again in silence to rebuild state.")
        self.examples_in = counter("examples_assembled", "Examples cut from chunks.")
        self.examples_out = counter("examples_scored", "Examples that went through network, classifier and decision.")
        self.in_progress = gauge("examples_in_progress", "Examples cut and not yet decided.")
        self.streams = gauge("streams", "Streams with state in memory.")
        self.open_alerts = gauge("alerts_open", "Alerts opened and not closed.")
        self.commits = counter("commits", "Offset commits, by outcome.", ("outcome",))
        self.bus_errors = counter("bus_errors", "Times that the bus failed, by kind.", ("kind",))
        self.lag = gauge("lag_records", "Records in the chunk topic not yet read, by partition.", ("partition",))
        self.lag_seconds = gauge(
            "lag_seconds", "How old the audio being read is, by partition; 0 when all is read.", ("partition",)
        )
        self.ready = gauge("ready", "1 when the detector can really work, else 0.")
        self.batch = Histogram(
            "gunfire_batch_examples",
            "Examples a network call.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
            registry=registry,
        )
        self.stage = Histogram(
            "gunfire_stage_seconds",
            "Time of one pass through a stage.",
            ("stage",),
            buckets=_STAGE_BUCKETS,
            registry=registry,
        )
        self.latency = Histogram(
            "gunfire_capture_to_alert_seconds",
            "From the end of the chunk's capture to the alert's publication.",
            buckets=_LATENCY_BUCKETS,
            registry=registry,
        )
        self.model = Info("gunfire_model", "The model that is served.", registry=registry)

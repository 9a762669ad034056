"""The bus: topics of byte records. ``base`` says what a bus is; ``embedded`` and ``kafka`` are the two there are."""

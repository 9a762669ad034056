"""Waveform -> embedding: log-mel front end, network, postprocessor."""

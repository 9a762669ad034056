"""Publish sound as chunks: ``source -> chunk -> bus``. Never imports TensorFlow. This module imports nothing."""

"""Builds the models that ``detector`` serves, with the detector's own front end. This module imports nothing."""

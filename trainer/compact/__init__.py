"""How the built-in model ``compact-gunfire`` is made.

pools -> (synthesis, channel) -> scenes -> dataset -> training -> evaluation -> packaging; ``commands`` is the
outside, ``work`` holds a work folder to its settings.
"""

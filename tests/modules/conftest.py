"""Engines run over the stand-ins, in Python and with compiled code."""

from tests.engine_modules import fake as fake

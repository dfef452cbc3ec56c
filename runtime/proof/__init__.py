"""Traces, parity and measurements."""

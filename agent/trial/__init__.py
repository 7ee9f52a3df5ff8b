"""Trials: what a device measures for the gate, beside what it serves.

`book` decides, `trials` carries out, `measure` is a process a candidate.
"""

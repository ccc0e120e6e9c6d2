"""Latency, memory and energy of one bundle on this machine, without torch."""

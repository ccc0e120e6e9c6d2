"""The report: what compression cost, in accuracy, and what it bought, in latency, memory and size."""

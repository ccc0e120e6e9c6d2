"""Readers of data sets: `source` is the one door; `balance` chooses among samples. One module per layout on disk."""

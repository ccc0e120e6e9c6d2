"""Data set readers, one module per format; `source` opens them all, `balance` chooses among samples."""

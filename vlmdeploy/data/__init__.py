"""Readers of data sets. One module per layout on disk; each offers `read_samples(path) -> Iterator[Sample]`."""

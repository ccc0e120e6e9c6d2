"""The tests are a package, so that they share `tests.reference`, `tests.tiny_checkpoint` and the other modules here."""

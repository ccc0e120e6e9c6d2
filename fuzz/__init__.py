"""Attacks on everything that reads what came from outside.

    make fuzz MINUTES=10          every target, then the storage faults
    python -m fuzz --minutes 1 --target image --target manifest

A target is a function of bytes; it must return, or raise an error of ours in one printable line. Anything else is a
finding: another exception, a crash of the process, 20 seconds without an answer, more than 4 GB. The input is kept in
`corpus/TARGET/`, which `make test` replays. With Atheris installed (`pip install atheris`) coverage guides the search;
without it the inputs are mutated blindly.
"""

"""Power cuts and failing disks, for everything that writes an output.

    python -m fuzz.storage                                  # every moment and every operation of every command
    python -m fuzz.storage --scenario export --kind faults  # of one command, what fails while it runs
    python -m fuzz.storage --minutes 10 --seed 7            # a sample, then random power cuts until the time is over

A scenario (scenarios.py) is a command, what lies in its folder before, and what may lie there after a fault. It runs
once while shim.c records every operation on that folder. Then, one case at a time (campaign.py):

- a power cut: replay.py builds what the disk may hold after the first k operations, in order or with the losses that it
  allows. The output must be the old one or the new one, and the same command, given again, must end in the same bytes,
  redo no unit that was finished, and leave nothing beside its output.
- a fault: one operation fails, or writes half of its bytes, or the disk is full from then on. The command must succeed,
  or fail with a VlmdeployError, keep the old output and leave nothing beside it. Then the same command, given again,
  must end in the same bytes.
- both: one operation fails, and then the power.

Prints a line per scenario and one per finding; the exit status is 1 if there is a finding. Needs Linux and a C
compiler.
"""

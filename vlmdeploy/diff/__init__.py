"""Two models side by side, stage by stage: where the second leaves the first."""

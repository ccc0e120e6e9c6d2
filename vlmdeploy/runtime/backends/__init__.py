"""What executes the graphs of a bundle, behind one door."""

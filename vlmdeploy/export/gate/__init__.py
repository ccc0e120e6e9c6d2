"""Every stage of a bundle against PyTorch, before anything is published."""

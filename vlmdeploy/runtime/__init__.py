"""What runs on the target device: opens a bundle and answers questions about pictures, without torch."""

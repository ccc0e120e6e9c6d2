"""Will a model fit on a device, and how fast could it be: from widths and the device's figures alone."""

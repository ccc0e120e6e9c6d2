"""Plans from widths and a device's figures alone: will a model fit, and how fast could it be?"""

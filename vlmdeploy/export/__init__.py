"""From a checkpoint to a verified bundle: graphs are built from the family's spec, weights streamed into them."""

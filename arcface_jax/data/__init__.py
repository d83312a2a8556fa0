"""Where images come from: record files, drawn faces, pairs; and the batches made of them."""

"""The vision encoder: in chunks of frames, its attention, and how many frames it was given."""

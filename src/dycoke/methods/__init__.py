"""Methods beside DyCoke, through the same doors."""

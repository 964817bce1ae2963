"""Speed and memory of the methods, side by side on true shapes."""

"""Questions about many videos: rows that survive whatever kills a process."""

"""What runs under ``generate()``. Read `method`, `layers`, `cache`, `engine`, in this order."""

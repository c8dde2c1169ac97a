"""What bounds are fitted to, and how."""

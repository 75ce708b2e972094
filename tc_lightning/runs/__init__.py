"""What `lightning fit` leaves behind, on disk and in memory, and comparisons of many runs."""

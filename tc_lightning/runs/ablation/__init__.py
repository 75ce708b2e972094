"""TokenCache against itself: what its choices are worth at equal cost."""

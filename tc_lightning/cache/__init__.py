"""What caching means, written once: hard, soft, and a whole network in the soft form."""

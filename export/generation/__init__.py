"""Many images, on one machine or a cluster: Ray Data starts the actors, each writes whole Parquet shards. Never imports torch."""

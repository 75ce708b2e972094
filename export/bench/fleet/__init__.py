"""A fleet of serving machines without one: images a GPU-hour on paper, and queues by simulation. Standard library and numpy alone."""

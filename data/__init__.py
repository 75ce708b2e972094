"""What goes in: image data modules, recorded trajectories, and the small teacher that ships with the package."""

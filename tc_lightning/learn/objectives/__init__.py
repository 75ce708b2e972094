"""What a distiller trains and by which loss: one class for each, chosen by class path in YAML."""

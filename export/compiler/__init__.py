"""Plan -> programs -> graphs and weights -> proof -> artefact."""

"""The real models' commands of the READMEs, offline, on random models in the hub's own layout."""

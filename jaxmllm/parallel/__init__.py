"""Many devices and many processes: meshes, process groups, runs that are interrupted and taken up again."""

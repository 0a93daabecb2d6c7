"""The options of every job, one file per job, for the command line, YAML files and Python."""

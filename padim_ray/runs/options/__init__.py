"""Every job's options, one file per job: behind the command line, YAML files and Python."""

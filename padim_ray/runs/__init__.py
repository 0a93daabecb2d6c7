"""What a job is asked to do and what it leaves: options, records, directories, summaries."""

"""Studies: a YAML that names many training runs, a launcher that runs and resumes them, and their table."""

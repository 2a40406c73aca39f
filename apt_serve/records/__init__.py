"""What must outlive the server: keys, jobs and usage in one SQL database."""
